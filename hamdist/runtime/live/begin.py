"""The beginning of a live run, and its repetition."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hamdist.config import EngineKind, Level, Settings, lay_over
from hamdist.dynamics.graph.graph import OUTPUT_KEY, Graph
from hamdist.dynamics.user_modules.code_digest import code_digests
from hamdist.dynamics.user_modules.copies import copied
from hamdist.errors import HamdistWarning, SettingsError
from hamdist.runtime.live.callbacks import Callback, check_callbacks
from hamdist.runtime.live.journal import Journal, named_tensors, read_named
from hamdist.runtime.live.run import LiveRun
from hamdist.runtime.plan.learners import own_optimizer
from hamdist.runtime.results.events import EventListener, FolderStarted
from hamdist.runtime.results.result import RunResult
from hamdist.runtime.results.run_events import EventFile
from hamdist.runtime.storage.snapshot_files import latest_complete
from hamdist.runtime.storage.store import storage
from hamdist.runtime.train.prepare import make_level, make_rule
from hamdist.streams.iterable import IterableStream
from hamdist.streams.live import LiveStream
from hamdist.streams.sample import Sample

# What the bits of a run depend on, of `engine`, and what they do not depend on:
COMPUTES = {"threads", "step", "bits", "blocks", "compress", "feedback", "topk_share"}
_ASIDE = {"snapshots", "trackers", "metrics"}


def live_run(
    work: Any,
    model: nn.Module | Graph,
    reader: IterableStream,
    *,
    patience: int,
    classes: Any = None,
    idle: float | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    repeats: bool = False,
    callbacks: Sequence[Callback] = (),
    listeners: Sequence[EventListener] = (),
) -> LiveRun:
    """Start a live run. Raises HamdistError before anything starts.

    Args:
        work: `train` with all arguments but the stream, `on_progress` and `resume`.
        model: as the user gave it.
        reader: a stream of the example, which turns what is fed into samples.
        repeats: the journal in `out` is read, and nothing is added to it.
        listeners: called with the run's events, which `out` gets as a file, too.
    """
    check_callbacks(callbacks)
    settings: Settings = work.keywords["settings"]
    if settings.level is Level.AUTO:
        raise SettingsError(
            "level 'auto' is chosen by a look at the stream, which a live run does not have yet; "
            "name one (trace learns from any)"
        )
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise SettingsError("start() was called inside torch.autocast: call it outside")
    if resume is not None and out is None:
        raise SettingsError("resume: a live run goes on with its journal: give out=, too")
    example = next(reader.samples())
    journal = None if out is None else Journal(out, reads=repeats)
    try:
        if journal is not None:
            facts = {"classes": classes, "patience": patience, "layers": layers_of(model)}
            facts |= {**_recorded(work.keywords), "digests": _digests(model, work.keywords)}
            if repeats:
                _warn_of_other_code(journal, facts)
            else:
                resume = _write_beginning(journal, facts, settings, model, example, resume)
        zeros = {n: torch.zeros_like(u) for n, u in (example.inputs or {}).items()}
        stream = LiveStream(
            reader.live_spec(patience),
            Sample(torch.zeros_like(example.u), inputs=zeros or None),
            idle=idle,
            lockstep=settings.engine.kind is EngineKind.INPROCESS,
            log=journal,
        )

        def run(stream: Any, on_progress: Any) -> RunResult:
            done: RunResult = work(stream=stream, on_progress=on_progress, resume=resume)
            return done

        hooks = [*listeners]
        if journal is not None and not repeats:
            hooks.append(EventFile(journal.folder, warnings.warn, "a"))
            hooks[-1](FolderStarted(process=os.getpid(), goes_on=not journal.new))
        loss = work.keywords["loss"]
        return LiveRun(run, stream, reader, settings, loss, journal, callbacks, hooks)
    except BaseException:
        if journal is not None:
            journal.close()
        raise


def _write_beginning(
    journal: Journal,
    facts: dict[str, Any],
    settings: Settings,
    model: nn.Module | Graph,
    example: Sample,
    resume: str | Path | None,
) -> str | Path | None:
    """Write the beginning of a new run; return the snapshot from which an earlier one goes on."""
    where, snapshots = str(journal.folder), settings.snapshots.path
    if (resume is None) != journal.new:
        raise SettingsError(
            f"out {where!r} holds no journal to go on with: leave resume out"
            if journal.new
            else f"out {where!r} holds the journal of an earlier run: resume={where!r} goes on "
            "with it; or give another folder"
        )
    if resume is not None:
        _note_changes(journal, facts)
        resumes = snapshots is not None and latest_complete(storage(snapshots)) is not None
        return resume if Path(resume) != journal.folder else snapshots if resumes else None
    u = example.u if example.inputs is None else example.inputs
    tensors = {
        **named_tensors("u", u),
        **named_tensors("y", example.y),
        **named_tensors("weights", _weights(model)),
    }
    journal.write({"event": "begin", **facts}, tensors)
    return None


def _recorded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run with the rules that have names, and the names of its code."""
    rules, level = fields["rules"] or {}, fields.get("level")
    named = {p: rule for p, rule in rules.items() if isinstance(rule, (str, Mapping))}
    settings = fields["settings"].model_dump(mode="json", exclude_unset=True)
    if named:
        settings = lay_over(settings, {"learning": {"rules": named}})
    kind = type(level)
    is_named = "<locals>" not in kind.__qualname__ and kind.__module__ != "__main__"
    code = [name for name in ("loss", "phi", "optimizer", "scheduler") if fields[name] is not None]
    code += ["partition"] if fields["policy"] is not None else []
    code += ["rules"] if len(named) < len(rules) else []
    code += (
        ["level"]
        if level is not None and (getattr(level, "__dict__", None) or not is_named)
        else []
    )
    return {"settings": settings, "code": code}


def _digests(model: nn.Module | Graph, fields: Mapping[str, Any]) -> dict[str, str]:
    """Return digests of the user's code, by what it is to the run."""
    settings: Settings = fields["settings"]
    named_rules = {**settings.learning.rules, **(fields["rules"] or {})}
    rules = {f"the rule of {p}": make_rule(f"rules.{p}", rule) for p, rule in named_rules.items()}
    code = {n: fields[n] for n in ("loss", "phi", "optimizer", "scheduler", "level") if n in fields}
    if code.get("level") is None and settings.locality.level is not None:
        code["level"] = make_level("locality.level", settings.locality.level)
    code["learning.optimizer"] = own_optimizer(settings.learning.optimizer)
    return code_digests({"the model": _modules(model), **code, **rules})


def _other_code(began: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    then, now = began.get("digests", {}), facts["digests"]
    return [f"the code of {name}" for name in now if then.get(name, now[name]) != now[name]]


def _warn_of_other_code(journal: Journal, facts: Mapping[str, Any]) -> None:
    other = _other_code(read_beginning(journal.folder)[0], facts)
    if other:
        warnings.warn(
            f"{journal.folder}: {', '.join(other)} has changed since the run, or the constants in "
            "it: the result may have other bits",
            HamdistWarning,
            stacklevel=2,
        )


def _note_changes(journal: Journal, facts: Mapping[str, Any]) -> None:
    """Write down what a resumed run has otherwise than its journal began with, and warn of it."""
    began = read_beginning(journal.folder)[0]
    then, now = (Settings.model_validate(f["settings"]).model_dump() for f in (began, facts))
    for dumped in (then, now):
        dumped["engine"] = {name: dumped["engine"][name] for name in COMPUTES}
    names = [n for n in now if n not in _ASIDE and then[n] != now[n]]
    names += [n for n in ("code", "layers") if began.get(n, facts[n]) != facts[n]]
    names += _other_code(began, facts)
    if names:
        journal.write({"event": "resume", "changed": names}, {})
        warnings.warn(
            f"the run goes on otherwise than its journal began ({', '.join(names)}): `replay` "
            "cannot repeat it",
            HamdistWarning,
            stacklevel=2,
        )


def check_repeatable(out: str | Path, facts: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Raise SettingsError where a replay would be another run. fields: all but the settings."""
    missing = [name for name in facts.get("code", ()) if fields.get(name) is None]
    if missing:
        raise SettingsError(
            f"replay({str(out)!r}): the run had {', '.join(missing)} of its program's code, which "
            f"a journal does not hold: give it again, as in replay(out, model, {missing[0]}=...)"
        )
    changed = Journal(out, reads=True).changes()
    if changed:
        raise SettingsError(
            f"replay({str(out)!r}): the run went on otherwise than it began "
            f"({', '.join(changed)}), which a journal cannot repeat: resume={str(out)!r} goes on"
        )


def read_beginning(out: str | Path) -> tuple[dict[str, Any], Any, Any]:
    """Return the facts of a run, its example, and its first weights. Raises SettingsError."""
    facts, read = next(Journal(out, reads=True).lines(), ({}, {}))
    if facts.get("event") != "begin":
        raise SettingsError(f"{out}: no journal of a live run; give the folder that it had as out=")
    example = {"u": read_named("u", read), "y": read_named("y", read)}
    return facts, example, read_named("weights", read)


def with_first_weights(model: nn.Module | Graph, weights: Mapping[str, Tensor]) -> Any:
    """Return a copy of `model` with the weights that a run began with. Raises SettingsError."""
    copy = model.copy() if isinstance(model, Graph) else copied(model)
    mine = _weights(copy)
    for name in sorted({*mine, *weights}):
        kinds = [_kind(ours.get(name)) for ours in (mine, weights)]
        if kinds[0] != kinds[1]:
            difference = f"{name!r} is {kinds[0]} in this one, and {kinds[1]} there"
            raise SettingsError(f"the run was one of another model: {difference}")
    for prefix, module in _modules(copy).items():
        state = {n[len(prefix) :]: t for n, t in weights.items() if n.startswith(prefix)}
        module.load_state_dict(state, strict=False)
    return copy


def _kind(value: Tensor | None) -> str:
    return "missing" if value is None else f"{value.dtype} {tuple(value.shape)}"


def layers_of(model: nn.Module | Graph) -> str:
    """Return the digest of a model's layers: classes and arguments, as torch prints them."""
    text = "\n".join(f"{prefix} {module!r}" for prefix, module in _modules(model).items())
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()


def _modules(model: nn.Module | Graph) -> dict[str, nn.Module]:
    if isinstance(model, nn.Module):
        return {"": model}
    outputs = {f"{b.name}/{OUTPUT_KEY}": b.output for b in model.blocks.values() if b.output}
    return {**{f"{b.name}//": b.module for b in model.blocks.values()}, **outputs}


def _weights(model: nn.Module | Graph) -> dict[str, Tensor]:
    return {
        prefix + name: value
        for prefix, module in _modules(model).items()
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }
