"""`hamdist compare`: levels beside centralised backpropagation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from hamdist.cli.console import LABELS, complain, console
from hamdist.cli.display import Display
from hamdist.cli.exits import exit_codes
from hamdist.cli.options import (
    DEFAULT_SETTINGS,
    EngineOption,
    ModelOption,
    SeedOption,
    SetOption,
    SettingsArgument,
    StabiliseOption,
    StepsOption,
    StreamOption,
    changes,
    given,
    load,
)
from hamdist.cli.prepare import command_line, own_stream, prepare, results_of
from hamdist.config import Level, Settings
from hamdist.errors import HamdistError, SettingsError

if TYPE_CHECKING:
    from rich.console import JustifyMethod

    from hamdist.study.compare import Planned
    from hamdist.study.runs import OnProgress, Run
    from hamdist.study.table import Table as StudyTable

# A narrower terminal gets the comparison as two tables: how well (so many columns), at what cost.
WIDE = 110
QUALITY = 6


def compare(
    settings: SettingsArgument = DEFAULT_SETTINGS,
    levels: Annotated[
        str | None, typer.Option("--levels", metavar="A,B", help="Levels to compare.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="How many seeds.")] = None,
    engine: EngineOption = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    set_: SetOption = None,
    model: ModelOption = None,
    stream: StreamOption = None,
    stabilise: StabiliseOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the result's files.", show_default="results/NAME"),
    ] = None,
) -> None:
    """Compare levels with centralised backpropagation on the same stream."""
    with exit_codes():
        asked = {"levels": None if levels is None else _split_levels(levels), "seeds": seeds}
        options = changes(engine=engine, seed=seed, steps=steps, stabilise=stabilise)
        loaded = load(settings, set_, {**options, **given({"compare": given(asked) or None})})
        _compare(loaded, model, stream, results_of(loaded.name) if out is None else out)


def _split_levels(text: str) -> list[str]:
    """Raises SettingsError for what is no level, or nothing."""
    known = [level.value for level in Level]
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise SettingsError(
            f"--levels {text!r}: {', '.join(wrong) or 'nothing'} is no level; "
            f"levels: {', '.join(known)}"
        )
    return names


def _compare(
    settings: Settings, model_name: str | None, stream_name: str | None, out: Path
) -> None:
    factory = prepare(out, model_name)
    data = own_stream(stream_name, settings)

    from hamdist.study.compare import compare as runs_of
    from hamdist.study.compare import plan
    from hamdist.study.table import finished_line

    planned = plan(settings)
    finished: list[Run] = []
    try:
        with Display() as display:
            watch = _titles(display, planned, settings.stream.batch if data is None else None)
            runs = runs_of(settings, planned, factory=factory, data=data, on_progress=watch)
            for result in runs:
                finished.append(result)
                display.say(finished_line(result))
    except (HamdistError, KeyboardInterrupt):
        _conclude(finished, settings, out, interrupted=True)
        raise
    interrupted = finished[-1].interrupted
    _conclude(finished, settings, out, interrupted=interrupted)
    if interrupted:
        raise KeyboardInterrupt


def _titles(
    display: Display, planned: list[Planned], batch: int | None
) -> Callable[[Planned], OnProgress]:
    """For each planned run, what shows its progress."""
    numbers = {item: number for number, item in enumerate(planned, start=1)}

    def watch(item: Planned) -> OnProgress:
        title = f"[{numbers[item]}/{len(planned)}] seed {item.seed}, {item.name}"
        return display.watch(title, batch)

    return watch


def _conclude(finished: list[Run], settings: Settings, out: Path, *, interrupted: bool) -> None:
    """Write the runs that finished to `out`, and print their table."""
    from hamdist.study.aggregate import aggregate
    from hamdist.study.save import save_comparison
    from hamdist.study.table import comparison_table

    rows = aggregate(finished)
    try:
        if finished:
            command = command_line()
            save_comparison(out, finished, settings, command=command, interrupted=interrupted)
    finally:
        if rows:
            _print_comparison(comparison_table(rows), settings.name)
        if interrupted:
            complain(
                "Ended early: only the runs that finished are kept." if rows else "No run finished."
            )
    if finished:
        console().print(Text(f"Report: {out / 'report.html'}"))


def _print_comparison(cells: StudyTable, title: str) -> None:
    screen = console()
    columns = range(len(cells.titles))
    split = [columns] if screen.width >= WIDE else [columns[:QUALITY], [0, *columns[QUALITY:]]]
    for part in split:
        table = Table(
            title=title,
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            show_lines=any("\n" in row[i] for row in cells.rows for i in part),
        )
        for i in part:
            side: JustifyMethod = "left" if i < LABELS else "right"
            table.add_column(cells.titles[i], justify=side, overflow="fold")
        for row in cells.rows:
            table.add_row(*(Text(row[i]) for i in part))
        screen.print(table)
    for note in cells.notes:
        screen.print(Text(f"• {note}"), soft_wrap=True)
