"""`hamdist export`: the weights of a snapshot as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hamdist.cli.console import note, report, say
from hamdist.cli.options import RunOptions


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
