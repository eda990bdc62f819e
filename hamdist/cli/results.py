"""Results of runs: `hamdist export`, the weights of a snapshot as a file; `diff` and `bisect`,
where two runs part; `rewind`, what a block did at a tick; `fork`, a run once more, otherwise."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hamdist.cli.console import note, print_facts, print_rows, report, say
from hamdist.cli.options import OverwriteOption, RunOptions, argument, option
from hamdist.errors import FAILED, SettingsError
from hamdist.study.shared.result_folder import results_of

if TYPE_CHECKING:
    from hamdist.study.replay.replay import RecordedRun


def export(
    snapshots: Annotated[str, argument("Snapshots of a run, or one.", "DIR|URL")],
    file: Annotated[Path, argument("The safetensors file to write.", "FILE")],
    *,
    options: Annotated[RunOptions, "model"],
) -> None:
    """Write the weights at the latest snapshot of a run as a plain state_dict."""
    from hamdist.study.report.save import save_weights
    from hamdist.study.run.export import exported

    state, name = exported(snapshots, options.factory(), note)
    save_weights(file, state)
    report(snapshot=name, file=str(file))
    say(f"{name} written to {file}")


SHOWN = 5
_Run = Annotated[Path, argument("Folder of --out, or digests.json.", "RUN")]


def diff(first: _Run, second: _Run) -> None:
    """Tell where two runs part (with engine.digests=true). Exit code 0: equal, 1: they part."""
    from hamdist.study.report.digests_diff import compared

    results = compared(first, second)
    records = {name: list(map(asdict, partings)) for name, partings in results.items()}
    report(equal=not any(records.values()), runs=records)
    for name, partings in results.items():
        lines = [str(parting) for parting in partings[:SHOWN]]
        lines += [f"and {len(partings) - SHOWN} more"] if len(partings) > SHOWN else []
        head = f"{name}: " if len(results) > 1 else ""
        say(f"{head}equal" if not partings else head + "\n".join(lines))
    if any(results.values()):
        raise typer.Exit(FAILED)


_OfReplay = Annotated[Path, argument("Folder of a run's --out.", "RUN")]


def _recorded(folder: Path, options: RunOptions) -> RecordedRun:
    from hamdist.study.replay.replay import recorded_run

    run = recorded_run(folder)
    return replace(run, own=options.functions(run.settings))


def rewind(
    folder: _OfReplay,
    *,
    block: Annotated[str, option("Its name.")],
    tick: Annotated[int, option("Of the block.", min=0)],
    out: Annotated[Path | None, option("A safetensors file for all its tensors.", "FILE")] = None,
    record: Annotated[Path | None, option("Write the signals that the block took.", "FILE")] = None,
    signals: Annotated[
        Path | None, option("Replay it alone, with those of --record.", "FILE")
    ] = None,
    options: Annotated[RunOptions, "model stream"],
) -> None:
    """Replay a run up to one tick of one block, to the same bits, and show what it did there."""
    from hamdist.study.replay.alone import alone, write_signals
    from hamdist.study.replay.replay import rewind as rewound
    from hamdist.study.replay.replay import tensors_of
    from hamdist.study.report.save import save_weights

    if record is not None and signals is not None:
        raise SettingsError("--record and --signals: a block alone takes what was recorded; one")
    recorded = _recorded(folder, options)
    if signals is not None:
        seen = alone(recorded, signals, block, tick)
    else:
        seen = rewound(recorded, block, tick, records=record is not None)
    if record is not None:
        write_signals(record, seen)
    tensors = tensors_of(seen)
    if out is not None:
        save_weights(out, tensors)
    began = "the beginning" if seen.began is None else str(seen.began)
    rows = [
        [name, " x ".join(map(str, t.shape)), f"{float(t.double().norm()):.6g}"]
        for name, t in tensors.items()
    ]
    stepped = "the whole network" if signals is None else "this block alone"
    norms = {name: float(norm) for name, _, norm in rows}
    report(block=block, tick=tick, began=began, stepped=stepped, marks=seen.met, norms=norms)
    met = f"{seen.met} marks of the run's digests met" if seen.met else "the run has no digests"
    print_facts(
        f"{block}, tick {tick}", {"replayed from": began, "stepped": stepped, "the same bits": met}
    )
    print_rows("Signals and state", [["tensor", "shape", "norm"], *rows])


def fork(
    folder: _OfReplay,
    *,
    without_sample: Annotated[int | None, option("Leave it out (from 0).", "N", min=0)] = None,
    tick: Annotated[int | None, option("Begin at the latest snapshot up to it.", min=0)] = None,
    out: Annotated[Path | None, option("Folder for its files.", shown="results/NAME-fork")] = None,
    overwrite: OverwriteOption = False,
    options: Annotated[RunOptions, "set_ model stream"],
) -> None:
    """Run a run once more in one process, without one sample, or with other settings (--set)."""
    from hamdist.cli.run import run_settings
    from hamdist.study.replay.replay import SETTINGS

    recorded = _recorded(folder, options)
    begin = None
    if tick is not None or without_sample is not None:
        begin = recorded.latest_before(inf if tick is None else tick, without_sample)
    alone: dict[str, Any] = {"engine": {"kind": "inprocess", "placement": None}}
    settings = options.load(str(folder / SETTINGS), **alone, snapshots={"path": None})
    steps = settings.steps
    if steps is not None and without_sample is not None and without_sample >= steps:
        raise SettingsError(
            f"--without-sample {without_sample}: the run has samples 0 to {steps - 1}"
        )
    where = out or results_of(f"{settings.name}-fork")
    begins, forks = (None if begin is None else str(begin), None), recorded.snapshots is not None
    run_settings(settings, options, where, overwrite, begins, without=without_sample, forks=forks)


def bisect(
    first: _OfReplay,
    second: _OfReplay,
    *,
    options: Annotated[RunOptions, "model stream"],
    second_model: Annotated[str | None, option("Of the second run.", "FILE.py:FUNCTION")] = None,
) -> None:
    """Name the first signal that differs in two runs, by replays. Exit code 0: equal, 1: one."""
    from hamdist.study.replay.replay import bisect as bisected

    other = options if second_model is None else replace(options, model=second_model)
    parting = bisected(_recorded(first, options), _recorded(second, other))
    report(equal=parting is None, parting=None if parting is None else asdict(parting))
    if parting is None:
        say("equal")
        return
    say(
        f"equal up to tick {parting.after}; first differs: block {parting.block}, tick "
        f"{parting.tick} ({parting.channel}), after {parting.replays} replays"
    )
    if parting.cause is not None:
        say(f"known no closer: {parting.cause}")
    raise typer.Exit(FAILED)
