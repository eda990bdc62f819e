"""The tables of a study, all cells, and one along each axis with several values; its figures and
files: Markdown, HTML, CSV, JSON, and the settings that made them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hamdist.config import Source
from hamdist.display.figure import FigureCurve, PageFigure
from hamdist.display.table import (
    MISSING,
    Table,
    csv_text,
    html_notes,
    html_table,
    latex,
    markdown_page,
    number,
    percent,
)
from hamdist.runtime.results.events import RunEvent, WindowFull
from hamdist.study.grid.points import GridCell, Point, label_of
from hamdist.study.grid.run import PROBES, StudyOutcome
from hamdist.study.grid.settings import Axis, StudySettings, Trains, study_yaml
from hamdist.study.grid.summary import SummaryLine, summary
from hamdist.study.report.blocks import block_table
from hamdist.study.report.files import facts, flat_tests, to_json
from hamdist.study.report.paired_test import in_words
from hamdist.study.report.save import save_blocks
from hamdist.study.report.table import interval, points
from hamdist.study.shared.result_folder import write_file
from hamdist.study.view.page import FIGURES, data_script, page, sections

BLOCKS = "Blocks"
MOST_BLOCKS = 12  # of a side
BLOCK_NOTE = (
    f"{MOST_BLOCKS} blocks of a side at most (all: blocks.csv); alignment: the cosine of an update "
    "with backpropagation's gradient at the weights of the tick in which the sample entered (its "
    f"{PROBES} probes are part of the seconds of a level's run); own "
    "memory: weights, what else lies in the block, what it keeps of samples under way at the most"
)
LOGARITHMIC = (Axis.BATCH, Axis.SMOOTHNESS)
WORDS = {Axis.DEPTH: "L", Axis.SPEED: "c", Axis.SMOOTHNESS: "S", Axis.BATCH: "batch"}
TITLES = {
    Axis.DEPTH: "against depth L (layers with weights)",
    Axis.SPEED: "against speed c (hops a sample)",
    Axis.SMOOTHNESS: "against smoothness S (samples that a sample takes)",
    Axis.BATCH: "against the batch (rows)",
}


def study_tables(
    study: StudySettings, lines: Sequence[SummaryLine], first: Axis | None = None
) -> dict[str, Table]:
    """Return the tables by title; `first` is the axis that comes first."""
    real_valued = all(line.accuracy is None for line in lines)
    axes = varied(study)
    axes.sort(key=lambda axis: axis is not first)
    along = {}
    for axis in axes:
        score = "Loss" if real_valued else "Held-out accuracy, %,"
        along[f"{score} {TITLES[axis]}"] = _along(axis, axes, lines, real_valued)
    whole = {"All sides": _all(axes, study, lines, real_valued)}
    table = block_table({label_of(line.side, line.point): line.blocks for line in lines})
    blocks = {} if table is None else {BLOCKS: _thinned(table)}
    return {**whole, **along, **blocks} if first is None else {**along, **whole, **blocks}


def _thinned(table: Table) -> Table:
    """Return a table of blocks with MOST_BLOCKS rows of each side at most, first and last kept."""
    rows = []
    for side in dict.fromkeys(row[0] for row in table.rows):
        rows_of_side = [row for row in table.rows if row[0] == side]
        last, shown = len(rows_of_side) - 1, min(len(rows_of_side), MOST_BLOCKS)
        rows += [rows_of_side[round(i * last / max(1, shown - 1))] for i in range(shown)]
    return Table(table.titles, rows, [BLOCK_NOTE])


def varied(study: StudySettings) -> list[Axis]:
    """Return the axes with several values."""
    return [axis for axis in Axis if len(study.axes.of(axis)) > 1]


def _all(
    axes: Sequence[Axis], study: StudySettings, lines: Sequence[SummaryLine], real_valued: bool
) -> Table:
    sides = study.sides.items()
    published = {name: f"{s.published.accuracy:g}" for name, s in sides if s.published}
    goal = f"{100 * (study.goal or 0):g} %"
    columns: dict[str, Callable[[SummaryLine], str]] = {
        "side": lambda line: line.side,
        **{WORDS[axis]: lambda line, axis=axis: str(dict(line.point)[axis]) for axis in axes},  # type: ignore[misc]
        "loss" if real_valued else "held-out, %": lambda line: held_out(line, real_valued),
        "published, %": lambda line: published.get(line.side, MISSING),
        "loss gap" if real_valued else "gap, points": lambda line: gap(line, real_valued),
        "95 %": lambda line: _test(line, real_valued)[0],
        "p": lambda line: _test(line, real_valued)[1],
        "prequential, %": lambda line: percent(line.prequential),
        f"rows to {goal}": lambda line: _until(line.rows_to_goal),
        f"s to {goal}": lambda line: _until(line.seconds_to_goal, 1),
        "s a run": lambda line: MISSING if line.seconds is None else f"{line.seconds:.1f}",
        "CPU s": lambda line: number(line.cpu_seconds),
        "J, whole machine": lambda line: number(line.joules),
        "chosen on validation": lambda line: values_text(line.chosen),
    }
    there = {
        **dict.fromkeys(["95 %", "p"], any(line.gap_test is not None for line in lines)),
        **dict.fromkeys([f"rows to {goal}", f"s to {goal}"], study.goal is not None),
        "published, %": bool(published),
        "prequential, %": not real_valued,
        "CPU s": any(line.cpu_seconds is not None for line in lines),
        "J, whole machine": any(line.joules is not None for line in lines),
    }
    titles = [title for title in columns if there.get(title, True)]
    rows = [[columns[title](line) for title in titles] for line in lines]
    return Table(titles, rows, _notes(study, lines, real_valued))


def _along(
    axis: Axis, axes: Sequence[Axis], lines: Sequence[SummaryLine], real_valued: bool
) -> Table:
    """Return a row for each side at each point of the other axes, a column for each value."""
    others = [other for other in axes if other is not axis]
    values = list(dict.fromkeys(dict(line.point)[axis] for line in lines))
    rows: dict[tuple[str, Point], dict[Any, SummaryLine]] = {}
    for line in lines:
        at = dict(line.point)
        rest = tuple((other, at[other]) for other in others)
        rows.setdefault((line.side, rest), {})[at[axis]] = line
    cells = [
        [
            side,
            *(str(value) for _, value in rest),
            *(held_out(by_value[value], real_valued) for value in values),
        ]
        for (side, rest), by_value in rows.items()
    ]
    titles = [
        "side",
        *(WORDS[other] for other in others),
        *(f"{WORDS[axis]} = {value}" for value in values),
    ]
    return Table(titles, cells, [])


def held_out(line: SummaryLine, real_valued: bool) -> str:
    """Return a line's loss, or its held-out accuracy in %; `diverged` if all its runs did."""
    if line.diverged:
        return "diverged"
    if real_valued:
        return number(line.loss, line.loss_spread)
    return percent(line.accuracy, line.spread, digits=2)


def gap(line: SummaryLine, real_valued: bool) -> str:
    """Return a line's gap in points, or of its loss; none of the baseline."""
    if line.trains is Trains.CENTRALISED:
        return MISSING
    if real_valued:
        return number(line.gap, line.gap_spread)
    return points(line.gap, line.gap_spread)


def _test(line: SummaryLine, real_valued: bool) -> list[str]:
    """Return the 95 % interval of the gap, and p."""
    if line.trains is Trains.CENTRALISED or line.gap_test is None:
        return [MISSING, MISSING]
    p = line.gap_test.p
    shown = "< 0.001" if p < 0.001 else f"{p:.2g}"
    return [interval(line.gap_test, 1.0 if real_valued else 100.0), shown]


def _until(reached: float | None, digits: int = 0) -> str:
    return "not reached" if reached is None else f"{reached:,.{digits}f}"


def values_text(values: dict[str, Any]) -> str:
    """Return the values as `lr 0.3, delay_power 0.25`."""
    return (
        ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in values.items()) or MISSING
    )


def _notes(study: StudySettings, lines: Sequence[SummaryLine], real_valued: bool) -> list[str]:
    score = "loss" if real_valued else "accuracy"
    signal = study.run.get("stream", {}).get("source") == Source.SIGNAL.value
    part, tuned = "on the test part", "on a sixth of the training part"
    if signal:
        part, tuned = "over the whole run, as nothing of a signal is held out", "on another one"
    notes = [
        f"mean ± standard deviation over {study.seeds} seeds {part}; {study.rows:,} "
        f"rows learned from by each run; gap: {score} minus that of centralised backpropagation, "
        "by seed"
    ]
    candidates = len(next(iter(study.sides.values())).candidates)
    if candidates > 1 and any(line.tuned is not None for line in lines):
        rows = study.tune.rows or study.rows
        seeds = "one seed" if study.tune.seeds == 1 else f"{study.tune.seeds} seeds"
        notes.append(
            f"each side chose from {candidates} candidates by its {score} {tuned} ({seeds}, "
            f"{rows:,} rows), which no tuning run learned from"
        )
    if any(line.memoryless for line in lines):
        notes.append(
            "frozen: the last block alone is trained, on hidden blocks as they were drawn; a level "
            "without memory that is not above it has learned nothing in them"
        )
    notes += [
        f"published, {name}: {side.published.source}"
        for name, side in study.sides.items()
        if side.published
    ]
    notes += [
        f"{label_of(line.side, line.point)}: {in_words(line.gap_test, line.seeds)}"
        for line in lines
        if line.gap_test is not None and line.trains is not Trains.CENTRALISED
    ]
    return [*notes, *(note for line in lines for note in line.notes)]


# -- figures ---------------------------------------------------------------------------------------


def study_figures(study: StudySettings, outcomes: Sequence[StudyOutcome]) -> list[PageFigure]:
    """Return a figure for each axis with several values: accuracy, or loss if there is none."""
    lines = summary(outcomes)
    real_valued = all(line.accuracy is None for line in lines)
    return [_figure(study, axis, lines, real_valued) for axis in varied(study)]


def curve_name(study: StudySettings, axis: Axis | None, line: SummaryLine | GridCell) -> str:
    """Return a curve's label: the side, and its place on the other axes."""
    others = [a for a in varied(study) if a is not axis]
    at = dict(line.point)
    return ", ".join([_side(line), *(f"{WORDS[a]} {at[a]}" for a in others)])


def _side(line: SummaryLine | GridCell) -> str:
    return line.side if isinstance(line, SummaryLine) else line.name


def _styles(curves: Mapping[str, SummaryLine | GridCell]) -> dict[str, tuple[int, int] | None]:
    """Return the style by label. Baselines have none; of the others each side has a colour, and
    its curves differ in their dashes."""
    sides: dict[str, list[str]] = {}
    for name, curve in curves.items():
        if curve.trains is not Trains.CENTRALISED:
            sides.setdefault(_side(curve), []).append(name)
    styles: dict[str, tuple[int, int] | None] = dict.fromkeys(curves)
    for i, names in enumerate(sides.values()):
        styles |= {name: (i, i + k) for k, name in enumerate(names)}
    return styles


def _figure(
    study: StudySettings, axis: Axis, lines: Sequence[SummaryLine], real_valued: bool
) -> PageFigure:
    curves: dict[str, list[SummaryLine]] = {}
    for line in lines:
        curves.setdefault(curve_name(study, axis, line), []).append(line)
    styles = _styles({name: of_curve[0] for name, of_curve in curves.items()})
    values = list(study.axes.of(axis))
    numbers = [float(v) for v in values if isinstance(v, int)]
    named = len(numbers) < len(values)
    places = [float(i) for i in range(len(values))] if named else numbers
    drawn = []
    for name, of_curve in curves.items():
        shown = [
            (line.loss, line.loss_spread) if real_valued else _percent(line) for line in of_curve
        ]
        y, spread = zip(*shown, strict=True)
        drawn.append(FigureCurve(name, places, y, spread, styles[name], points=True))
    x_label = TITLES[axis].removeprefix("against ").removeprefix("the ")
    y_label = "loss" if real_valued else "held-out accuracy, %"
    title = f"{y_label.removesuffix(', %').capitalize()} against {x_label}"
    ticks = [str(value) for value in values] if named else []
    return PageFigure(title, x_label, y_label, drawn, log_x=axis in LOGARITHMIC, ticks=ticks)


def _percent(line: SummaryLine) -> tuple[float | None, float | None]:
    if line.accuracy is None:
        return None, None
    return 100 * line.accuracy, None if line.spread is None else 100 * line.spread


# -- files -----------------------------------------------------------------------------------------


def save_study(
    folder: Path,
    study: StudySettings,
    outcomes: Sequence[StudyOutcome],
    *,
    command: str,
    first: Axis | None = None,
) -> dict[str, Table]:
    """Write study.yaml, .json, .csv, .md, .tex and .html, and where blocks were measured blocks.csv
    and blocks.tex; return the tables.

    Raises SettingsError if a file cannot be written.
    """
    lines = summary(outcomes, study.goal)
    tables = study_tables(study, lines, first)
    figures = study_figures(study, outcomes)
    blocks = block_table({label_of(line.side, line.point): line.blocks for line in lines})
    if blocks is not None:
        save_blocks(folder, blocks)
    write_file(folder / "study.yaml", study_yaml(study))
    published = {name: s.published for name, s in study.sides.items() if s.published}
    rows = [record(line) for line in lines]
    for row in rows if published else ():
        entry = published.get(row["side"])
        row["published"] = None if entry is None else entry.accuracy
    write_file(folder / "study.json", to_json({"command": command, "rows": rows}, indent=2))
    write_file(folder / "study.csv", _csv(rows))
    settings = f"\n## Settings\n\n```yaml\n{study_yaml(study)}```\n"
    write_file(folder / "study.md", markdown_page(study.name, command, tables) + settings)
    write_file(folder / "study.tex", "\n".join(map(latex, tables.values())))
    write_file(folder / "study.html", _html(study, tables, figures, command, outcomes))
    return tables


def record(line: SummaryLine) -> dict[str, Any]:
    """Return a line as plain values, with a name for each part of the point and of the choice."""
    raw = dataclasses.asdict(dataclasses.replace(line, blocks=()))
    del raw["blocks"]  # (in the records of its runs)
    point = {axis.value: value for axis, value in line.point}
    return {**raw, "trains": line.trains.value, "point": point, "notes": list(line.notes)}


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    records = []
    for row in rows:
        flat = {**row, "notes": "; ".join(row["notes"])}
        for name in ("point", "chosen"):
            flat[name] = "; ".join(f"{key}={value}" for key, value in row[name].items())
        records.append(flat_tests(flat))
    return csv_text(records)


def _html(
    study: StudySettings,
    tables: Mapping[str, Table],
    figures: Sequence[PageFigure],
    command: str,
    outcomes: Sequence[StudyOutcome],
) -> str:
    title = escape(f"hamdist study: {study.name}")
    parts = [f"<h1>{title}</h1>", facts(command)]
    for name, table in tables.items():
        parts.append(f'<h2>{escape(name)}</h2><div class="scroll">{html_table(table)}</div>')
        parts.append(html_notes(table.notes))
    parts.append(FIGURES if figures else "")
    parts.append(f"<h2>Settings</h2><pre>{escape(study_yaml(study))}</pre>")
    events = [event for outcome in outcomes for event in _curve(study, outcome)]
    return page(title, [*parts[:2], sections("rows"), *parts[2:]], [data_script(events, figures)])


def _curve(study: StudySettings, outcome: StudyOutcome) -> Iterator[RunEvent]:
    """Yield the prequential windows of an outcome's first seed, counted in rows."""
    head: dict[str, Any] = {"level": curve_name(study, None, outcome.cell)}
    last = -1
    curve = outcome.records[0].curve if outcome.records else ()
    for rows, seconds, accuracy, loss in curve:
        if rows is None or seconds is None or loss is None:
            continue
        number = int(rows) - 1 - last
        head |= {"correct": 0, "rows": 0}
        if accuracy is not None:
            head |= {"correct": round(accuracy * number), "rows": number}
        head |= {"first": last + 1, "last": int(rows) - 1, "samples": number, "seconds": seconds}
        yield WindowFull(readout="", loss=loss, accuracy=accuracy, **head)
        last = int(rows) - 1
