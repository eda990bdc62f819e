"""`hamdist study levels`, `depth`, `smoothness`, `batch`: studies of a grid of runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hamdist.cli.console import note, print_table, report, say
from hamdist.cli.options import command_line

if TYPE_CHECKING:
    from hamdist.study.grid.run import RunRecord

StudyArgument = Annotated[
    str, typer.Argument(metavar="SETTINGS", help="A study's YAML file, or a shipped one.")
]
StudySetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the study, e.g. seeds=5."),
]
StudyOutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder for runs and report; a study that was ended goes on there.",
        show_default="results/NAME",
    ),
]
ChosenOption = Annotated[
    bool, typer.Option("--chosen", help="Tune nothing: take what the file names as `best`.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Runs at a time.", show_default="one per core"),
]
GRIDS = {  # by command: its help
    "levels": "Levels beside centralised backpropagation, each side tuned on a validation part.",
    "depth": "The same, against the number of layers (axes.depth).",
    "smoothness": "The same, against the samples that a sample takes to fade into the next "
    "(axes.smoothness).",
    "batch": "The same, against the rows of a sample (axes.batch), of equally many samples.",
}


def grid_command(name: str) -> Callable[..., None]:
    """Return the command `hamdist study NAME`, of GRIDS."""
    axis = None if name == "levels" else name

    def command(
        settings: StudyArgument,
        set_: StudySetOption = None,
        chosen: ChosenOption = False,
        workers: WorkersOption = None,
        out: StudyOutOption = None,
    ) -> None:
        run_grid(settings, axis, set_, chosen, workers, out)

    return command


def run_grid(
    source: str,
    axis_name: str | None,
    set_: list[str] | None,
    chosen: bool,
    workers: int | None,
    out: Path | None,
) -> None:
    """Run a study's runs that are not on disk yet, print the tables, and write the report."""
    from hamdist.study.interface.study import study

    result = study(
        source,
        axis_name,
        out=out,
        chosen=chosen,
        workers=workers,
        changes=set_ or [],
        on_record=_say_record,
        command=command_line(),
        say=note,
    )
    for title, table in result.tables.items():
        print_table(table, title)
    report(out=str(result.folder))
    say(f"Report: {result.folder / 'study.html'}")


def _say_record(phase: str, done: int, total: int, record: RunRecord) -> None:
    """Print a finished run on one line."""
    from hamdist.display.table import percent

    level = record.settings["level"] if record.trains == "level" else record.trains
    outcome = record.failure or f"{percent(record.accuracy, digits=2)} %, {record.seconds:.1f} s"
    note(f"[{phase} {done}/{total}] {level}, seed {record.seed}: {outcome}")
