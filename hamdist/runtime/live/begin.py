"""The beginning of a live run, and what its folder keeps of it.

beginning.json           settings, and the number of classes of the targets
beginning.safetensors    the weights it began with, and an example of the samples
journal.*                what was said to it (journal.py)
snapshots/               of the run, unless the settings name another place
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hamdist.config import EngineKind, Level, Settings
from hamdist.dynamics.graph.graph import OUTPUT_KEY, Graph
from hamdist.dynamics.user_modules.copies import copied
from hamdist.errors import SettingsError
from hamdist.runtime.live.journal import Journal, named, read_named
from hamdist.runtime.live.run import LiveRun
from hamdist.runtime.results.result import RunResult
from hamdist.runtime.storage.snapshot_files import complete
from hamdist.runtime.storage.store import storage
from hamdist.streams.iterable import IterableStream
from hamdist.streams.live import LiveStream
from hamdist.streams.sample import Sample

FACTS, TENSORS = "beginning.json", "beginning.safetensors"
WEIGHTS = "weights."


def live_run(
    work: Any,
    model: nn.Module | Graph,
    reader: IterableStream,
    *,
    classes: Any = None,
    idle: float | None = None,
    patience: int = 1024,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    repeats: bool = False,
) -> LiveRun:
    """Start a live run.

    Args:
        work: `train` with all arguments but the stream, `on_progress` and `resume`.
        model: as the user gave it.
        reader: a stream of the example, which turns what is fed into samples.
        repeats: the journal in `out` is read, and nothing is added to it.

    Raises:
        HamdistError: before anything starts.
    """
    settings: Settings = work.keywords["settings"]
    _check(settings)
    example = next(reader.samples())
    journal = None if out is None else Journal(out, reads=repeats)
    try:
        if journal is not None and not repeats:
            resume = _begun(journal, settings, model, example, resume, classes, patience)
        elif resume is not None:
            raise SettingsError("resume: a live run goes on with its journal: give out=, too")
        nothing = Sample(
            torch.zeros_like(example.u),
            inputs=example.inputs and {n: torch.zeros_like(u) for n, u in example.inputs.items()},
        )
        stream = LiveStream(
            reader.live_spec(patience),
            nothing,
            idle=idle,
            lockstep=settings.engine.kind is EngineKind.INPROCESS,
            log=journal,
        )

        def run(stream: Any, on_progress: Any) -> RunResult:
            done: RunResult = work(stream=stream, on_progress=on_progress, resume=resume)
            return done

        return LiveRun(run, stream, reader, settings, work.keywords["loss"], journal)
    except BaseException:
        if journal is not None:
            journal.close()
        raise


def _check(settings: Settings) -> None:
    if settings.level is Level.AUTO:
        raise SettingsError(
            "level 'auto' is chosen by a look at the stream, which a live run does not have yet; "
            "name one (trace learns from any)"
        )
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise SettingsError("start() was called inside torch.autocast: call it outside")


def _begun(
    journal: Journal,
    settings: Settings,
    model: nn.Module | Graph,
    example: Sample,
    resume: str | Path | None,
    classes: Any,
    patience: int,
) -> str | Path | None:
    """Write the beginning of a new run; return the snapshot from which an earlier one goes on."""
    folder = journal.folder
    if resume is None and not journal.empty:
        raise SettingsError(
            f"out {str(folder)!r} holds the journal of an earlier run: go on with it, resume="
            f"{str(folder)!r}, or give another folder"
        )
    if resume is not None and not (folder / FACTS).is_file():
        raise SettingsError(f"resume: {folder} holds no beginning of a run; give the out= it had")
    if resume is not None:
        if Path(resume) != folder:
            return resume
        kept = settings.snapshots.path
        return kept if kept is not None and any(complete(storage(kept))) else None
    facts = {
        "settings": settings.model_dump(mode="json", exclude_unset=True),
        "classes": classes,
        "patience": patience,
    }
    u = example.u if example.inputs is None else example.inputs
    tensors: dict[str, Tensor | None] = {}
    tensors |= {f"{WEIGHTS}{name}": t for name, t in _weights(model).items()}
    tensors |= {**named("u", u), **named("y", example.y)}
    kept_tensors = {n: t.detach().clone().contiguous() for n, t in tensors.items() if t is not None}
    save_file(kept_tensors, folder / TENSORS)
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return None


def read_beginning(out: str | Path) -> tuple[dict[str, Any], Any, dict[str, Tensor]]:
    """Return the facts of a run, its example, and its first weights. Raises SettingsError."""
    try:
        facts = json.loads((Path(out) / FACTS).read_text("utf-8"))
        read = load_file(Path(out) / TENSORS)
        keys = {"settings", "classes", "patience"}
        if not isinstance(facts, dict) or set(facts) != keys:
            raise ValueError(f"it has not {', '.join(sorted(keys))}")
    except (OSError, ValueError, SafetensorError) as error:
        raise SettingsError(
            f"{Path(out) / FACTS}: {error}; give the folder that a live run had as out="
        ) from None
    weights = {n.removeprefix(WEIGHTS): t for n, t in read.items() if n.startswith(WEIGHTS)}
    example = {"u": read_named("u", read), "y": read_named("y", read)}
    return facts, example, weights


def with_first_weights(
    model: nn.Module | Graph, weights: Mapping[str, Tensor]
) -> nn.Module | Graph:
    """Return a copy of `model` with the weights that a run began with. Raises SettingsError."""
    own = model.copy() if isinstance(model, Graph) else copied(model)
    names = set(_weights(own))
    if names != set(weights):
        strange = sorted(names ^ set(weights))[0]
        raise SettingsError(f"the run was one of another model: {strange!r} is only in one of them")
    for prefix, module in _modules(own).items():
        state = {n[len(prefix) :]: t for n, t in weights.items() if n.startswith(prefix)}
        try:
            module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1].strip()
            raise SettingsError(f"the run was one of another model: {last}") from None
    return own


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
