"""`hamdist compare`: levels beside centralised backpropagation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from hamdist.cli.console import LABELS, complain, console, exit_codes, report
from hamdist.cli.display import Display
from hamdist.cli.options import (
    DEFAULT_SETTINGS,
    EngineOption,
    ModelOption,
    OverwriteOption,
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
from hamdist.cli.prepare import code_of, command_line, own_stream, prepare
from hamdist.config import Level, Settings, did_you_mean
from hamdist.errors import SettingsError
from hamdist.study.shared.result_folder import results_of

if TYPE_CHECKING:
    from rich.console import JustifyMethod

    from hamdist.display.table import Table as StudyTable
    from hamdist.study.interface.compare import Comparison

# A narrower terminal gets the comparison as two tables: how well (so many columns), at what cost.
FIRST_COST = "wall, s"  # title of the first column of costs


def compare(
    settings: SettingsArgument = DEFAULT_SETTINGS,
    levels: Annotated[
        str | None, typer.Option("--levels", metavar="A,B", help="Levels to compare.")
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option(
            "--rules",
            metavar="A,B",
            help="Levels and rules of learning to compare (hamdist rules, or FILE.py:NAME).",
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="How many seeds.")] = None,
    engine: EngineOption = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    set_: SetOption = None,
    model: ModelOption = None,
    stream: StreamOption = None,
    stabilise: StabiliseOption = None,
    baseline_model: Annotated[
        str | None,
        typer.Option(
            "--baseline-model",
            metavar="FILE.py:FUNCTION",
            help="Makes the module of centralised training, where it is another one; it begins "
            "with the model's weights where names and shapes fit.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for the result's files; a comparison that was ended goes on there.",
            show_default="results/NAME",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare levels with centralised backpropagation on the same stream."""
    with exit_codes():
        if levels is not None and rules is not None:
            raise SettingsError("--levels and --rules: give one; --rules names levels, too")
        named = None if rules is None else _split(rules) or _split_levels(rules)
        levels_of = None if levels is None else _split_levels(levels)
        asked = {"levels": levels_of, "rules": named, "seeds": seeds}
        options = changes(engine=engine, seed=seed, steps=steps, stabilise=stabilise)
        loaded = load(settings, set_, {**options, **given({"compare": given(asked) or None})})
        folder = results_of(loaded.name) if out is None else out
        _compare(loaded, model, stream, baseline_model, folder, overwrite)


def _split_levels(text: str) -> list[str]:
    """Split a list of levels. Raises SettingsError for an unknown level, or an empty list."""
    known = [level.value for level in Level]
    names = _split(text)
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise SettingsError(
            f"--levels {text!r}: {', '.join(wrong) or 'nothing'} is no level; "
            f"levels: {', '.join(known)}{did_you_mean(wrong[0], known) if wrong else ''}"
        )
    return names


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _compare(
    settings: Settings,
    model_name: str | None,
    stream_name: str | None,
    baseline: str | None,
    out: Path,
    overwrite: bool,
) -> None:
    factory = prepare(None, model_name)
    data = own_stream(stream_name, settings)
    plain = prepare(None, baseline, "--baseline-model")

    from hamdist.study.interface.compare import Comparison, make_runs
    from hamdist.study.run.comparison import run_key

    files = [name for name in settings.compare.rules if ":" in name]
    code = code_of(model_name, stream_name, baseline, *files)
    comparison = Comparison(settings=settings)
    try:
        with Display(settings) as display:
            make_runs(
                comparison,
                display,
                factory=factory,
                data=data,
                plain=plain,
                key=run_key(settings, code),
                made_of=code,
                out=out,
                overwrite=overwrite,
                command=command_line(),
                say=display.say,
            )
    finally:
        if comparison.folder is not None:
            _conclude(comparison, comparison.folder)
    if comparison.interrupted:
        raise KeyboardInterrupt


def _conclude(comparison: Comparison, out: Path) -> None:
    """Print the table of the runs that finished, and where the report is."""
    from hamdist.study.report.files import comparison_summary

    rows, interrupted = comparison.rows, comparison.interrupted
    if rows:
        report(**comparison_summary(rows, interrupted=interrupted), out=str(out))
        _print_comparison(comparison.table, comparison.settings.name)
    if interrupted:
        complain(
            f"Ended early: only the runs that finished are kept, in {out}; the same command goes "
            "on from there."
            if rows
            else "No run finished."
        )
    if comparison.runs:
        console().print(Text(f"Report: {out / 'report.html'}"))


def _table(cells: StudyTable, title: str, columns: Sequence[int]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        show_lines=any("\n" in row[i] for row in cells.rows for i in columns),
    )
    for i in columns:
        side: JustifyMethod = "left" if i < LABELS else "right"
        table.add_column(cells.titles[i], justify=side, overflow="fold")
    for row in cells.rows:
        table.add_row(*(Text(row[i]) for i in columns))
    return table


def _print_comparison(cells: StudyTable, title: str) -> None:
    """Print a comparison; qualities and costs in two tables where one is wider than the screen."""
    screen = console()
    columns = range(len(cells.titles))
    tables = [_table(cells, title, columns)]
    unlimited = screen.options.update_width(10 * screen.width)
    if screen.measure(tables[0], options=unlimited).maximum > screen.width:
        cost = cells.titles.index(FIRST_COST)
        parts = columns[:cost], [0, *columns[cost:]]
        tables = [_table(cells, title, part) for part in parts]
    for table in tables:
        screen.print(table)
    for note in cells.notes:
        screen.print(Text(f"• {note}"), soft_wrap=True)
