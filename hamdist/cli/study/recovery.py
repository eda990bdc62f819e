"""`hamdist study recovery`: gradient descent recovered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hamdist.cli.console import note, print_table, say_written
from hamdist.cli.options import OutOption, OverwriteOption, command_line, names
from hamdist.errors import FAILED, SettingsError
from hamdist.study.shared.result_folder import free_folder


def recovery(
    full: Annotated[
        bool, typer.Option("--full", help="The paper's epochs: 40, for sequences 80.")
    ] = False,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Epochs.", show_default="1")
    ] = None,
    models: Annotated[
        str | None,
        typer.Option("--models", metavar="A,B", help="linear, mlp, resnet, vit, rnn, lstm."),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Dampen the first momentum step, too (HL App. E).")
    ] = False,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder of IDX files, instead.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="Texts of two classes (pos, neg), instead.")
    ] = None,
    glove: Annotated[
        Path | None, typer.Option("--glove", help="Word vectors of 50 numbers to begin with.")
    ] = None,
    out: OutOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Gradient descent recovered: six networks against torch.optim.SGD, in float64."""
    if full and epochs is not None:
        raise SettingsError(f"--epochs {epochs} with --full, which has its own: give one of them")
    from hamdist.config import FirstStep
    from hamdist.study.gradient_descent.data import Paths
    from hamdist.study.gradient_descent.models import MODELS
    from hamdist.study.gradient_descent.report import (
        in_order,
        recovery_line,
        recovery_table,
        save_recovery,
    )
    from hamdist.study.gradient_descent.scenarios import RowWorkers, jobs

    rows_to_make = jobs(
        tuple(MODELS) if models is None else names(models),
        epochs=None if full else epochs or 1,
        first_step=FirstStep.DAMPENED if paper else FirstStep.UNDAMPENED,
        paths=Paths(images, texts, glove),
    )
    if out is not None:
        out = free_folder(out, overwrite=overwrite, say=note)
    finished = []
    with RowWorkers(rows_to_make) as rows:
        for row in rows.finished():
            finished.append(row)
            note(f"[{len(finished)}/{len(rows_to_make)}] {recovery_line(row)}")
    finished = in_order(finished)
    if out is not None:
        save_recovery(out, finished, command_line())
    print_table(recovery_table(finished), "Gradient descent recovered")
    if out is not None:
        say_written(out)
    if not all(row.passed for row in finished):
        raise typer.Exit(FAILED)
