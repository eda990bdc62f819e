"""The files of a study: Markdown, HTML, CSV, JSON, and the settings that made them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hamdist.display.figure import PageFigure
from hamdist.display.table import Table, csv_text, html_notes, html_table, latex, markdown
from hamdist.runtime.results.events import RunEvent, WindowFull
from hamdist.study.grid.points import label_of
from hamdist.study.grid.run import StudyOutcome
from hamdist.study.grid.settings import Axis, StudySettings, study_yaml
from hamdist.study.grid.summary import SummaryLine, summary
from hamdist.study.grid.tables import curve_name, study_figures, study_tables
from hamdist.study.report.blocks import block_table
from hamdist.study.report.files import flat_tests, to_json
from hamdist.study.report.html import facts
from hamdist.study.report.save import save_blocks
from hamdist.study.shared.result_folder import write_file
from hamdist.study.view.page import FIGURES, baked, page, sections


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
    write_file(folder / "study.md", _markdown(study, tables, command))
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


def _markdown(study: StudySettings, tables: Mapping[str, Table], command: str) -> str:
    parts = [f"# {study.name}\n\n`{command}`\n"]
    parts += [f"\n## {title}\n\n{markdown(table)}" for title, table in tables.items()]
    parts.append(f"\n## Settings\n\n```yaml\n{study_yaml(study)}```\n")
    return "".join(parts)


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
    return page(title, [*parts[:2], sections("rows"), *parts[2:]], [baked(events, figures)])


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
