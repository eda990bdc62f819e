"""`hamdist export` and `diff`: the weights of a snapshot as a file; where two runs part."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hamdist.cli.console import note, report, say
from hamdist.cli.options import RunOptions
from hamdist.errors import FAILED


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
        lines = [str(one) for one in partings[:SHOWN]]
        lines += [f"and {len(partings) - SHOWN} more"] if len(partings) > SHOWN else []
        head = f"{name}: " if len(results) > 1 else ""
        say(f"{head}equal" if not partings else head + "\n".join(lines))
    if any(results.values()):
        raise typer.Exit(FAILED)
