"""`hamdist export`: the weights of a snapshot as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hamdist.cli.console import note, report, say
from hamdist.cli.options import ModelOption


def export(
    snapshots: Annotated[
        str, typer.Argument(metavar="DIR|URL", help="Snapshots of a run, or one.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The safetensors file to write.")],
    model: ModelOption = None,
) -> None:
    """Write the weights at the latest snapshot of a run as a plain state_dict."""
    from hamdist.models.build import load_factory
    from hamdist.study.report.save import save_weights
    from hamdist.study.run.export import exported

    factory = None if model is None else load_factory(model)
    state, name = exported(snapshots, factory, note)
    save_weights(file, state)
    report(snapshot=name, file=str(file))
    say(f"{name} written to {file}")
