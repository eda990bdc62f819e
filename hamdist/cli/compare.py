"""`hamdist compare`: levels beside centralised backpropagation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hamdist.cli.console import Display, complain, console, print_notes, report, say, study_table
from hamdist.cli.options import (
    DEFAULT_SETTINGS,
    OverwriteOption,
    RunOptions,
    SettingsArgument,
    command_line,
    level_names,
    names,
    option,
    without_none,
)
from hamdist.errors import SettingsError
from hamdist.study.shared.result_folder import results_of

if TYPE_CHECKING:
    from hamdist.display.table import Table as StudyTable
    from hamdist.study.interface.compare import Comparison

# A narrower terminal gets the comparison as two tables: how well (so many columns), at what cost.
FIRST_COST = "wall, s"  # title of the first column of costs


def compare(
    settings: SettingsArgument = DEFAULT_SETTINGS,
    *,
    levels: Annotated[str | None, option("Levels to compare.", "A,B")] = None,
    rules: Annotated[
        str | None,
        option("Levels and rules of learning to compare (hamdist rules, or FILE.py:NAME).", "A,B"),
    ] = None,
    seeds: Annotated[int | None, option("How many seeds.", min=1)] = None,
    options: Annotated[RunOptions, "engine seed steps set_ model stream stabilise"],
    baseline_model: Annotated[
        str | None,
        option(
            "Makes the module of centralised training, where it is another one; it begins "
            "with the model's weights where names and shapes fit.",
            "FILE.py:FUNCTION",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        option(
            "Folder for the result's files; a comparison that was ended goes on there.",
            shown="results/NAME",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare levels with centralised backpropagation on the same stream."""
    if levels is not None and rules is not None:
        raise SettingsError("--levels and --rules: give one; --rules names levels, too")
    compared = {
        "levels": None if levels is None else level_names(levels),
        "rules": None if rules is None else names(rules) or level_names(rules),
        "seeds": seeds,
    }
    loaded = options.load(settings, **without_none({"compare": without_none(compared) or None}))
    own = options.functions(loaded, baseline_model)

    from hamdist.study.interface.compare import Comparison, make_runs
    from hamdist.study.shared.named_code import code_of

    comparison = Comparison(settings=loaded)
    try:
        with Display(loaded) as display:
            make_runs(
                comparison,
                display,
                own=own,
                code=code_of(loaded, options.model, options.stream, baseline_model),
                out=out or results_of(loaded.name),
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
    if interrupted and rows:
        complain(
            f"Ended early: only the runs that finished are kept, in {out}; the same command goes "
            "on from there."
        )
    if (out / "report.html").exists():
        say(f"Report: {out / 'report.html'}")


def _print_comparison(cells: StudyTable, title: str) -> None:
    """Print a comparison; qualities and costs in two tables where one is wider than the screen."""
    screen = console()
    columns = range(len(cells.titles))
    tables = [study_table(cells, title)]
    unlimited = screen.options.update_width(10 * screen.width)
    if screen.measure(tables[0], options=unlimited).maximum > screen.width:
        cost = cells.titles.index(FIRST_COST)
        parts = columns[:cost], [0, *columns[cost:]]
        tables = [study_table(cells, title, part) for part in parts]
    for table in tables:
        screen.print(table)
    print_notes(cells.notes)
