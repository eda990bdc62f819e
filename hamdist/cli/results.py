"""What is left of runs: `hamdist export`, the weights of a snapshot as a file; `diff` and `bisect`,
where two runs part; `rewind`, what a block did at a tick."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hamdist.cli.console import note, print_facts, print_rows, report, say
from hamdist.cli.options import RunOptions
from hamdist.errors import FAILED

if TYPE_CHECKING:
    from hamdist.study.replay.replay import RecordedRun


def export(
    snapshots: Annotated[
        str, typer.Argument(metavar="DIR|URL", help="Snapshots of a run, or one.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The safetensors file to write.")],
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
_Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of --out, or digests.json.")]


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


_OfReplay = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run's --out.")]


def _recorded(folder: Path, options: RunOptions) -> RecordedRun:
    from hamdist.study.replay.replay import recorded_run

    run = recorded_run(folder, options.factory())
    return replace(run, data=options.data(run.settings))


def rewind(
    folder: _OfReplay,
    *,
    block: Annotated[str, typer.Option("--block", help="Its name.")],
    tick: Annotated[int, typer.Option("--tick", min=0, help="Of the block.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="A safetensors file for all its tensors."),
    ] = None,
    options: Annotated[RunOptions, "model stream"],
) -> None:
    """Replay a run up to one tick of one block, to the same bits, and show what it did there."""
    from hamdist.study.replay.replay import rewind as rewound
    from hamdist.study.replay.replay import tensors_of
    from hamdist.study.report.save import save_weights

    seen = rewound(_recorded(folder, options), block, tick)
    tensors = tensors_of(seen)
    if out is not None:
        save_weights(out, tensors)
    began = "the beginning" if seen.began is None else str(seen.began)
    rows = [
        [name, " x ".join(map(str, t.shape)), f"{float(t.double().norm()):.6g}"]
        for name, t in tensors.items()
    ]
    report(
        block=block, tick=tick, began=began, marks=seen.met, norms={n: float(t) for n, _, t in rows}
    )
    met = f"{seen.met} marks of the run's digests met" if seen.met else "the run has no digests"
    print_facts(f"{block}, tick {tick}", {"replayed from": began, "the same bits": met})
    print_rows("Signals and state", [["tensor", "shape", "norm"], *rows])


def bisect(
    first: _OfReplay,
    second: _OfReplay,
    *,
    options: Annotated[RunOptions, "model stream"],
    second_model: Annotated[
        str | None,
        typer.Option("--second-model", metavar="FILE.py:FUNCTION", help="Of the second run."),
    ] = None,
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
