"""The files of a study: Markdown, HTML, CSV, JSON, plots, and the settings that made them."""

from __future__ import annotations

import csv
import dataclasses
import io
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hamdist.study.report.files import flat_tests, to_json
from hamdist.study.report.html import facts, html_figure, html_notes, html_table
from hamdist.study.report.table import Table, latex, markdown
from hamdist.study.shared.result_folder import write_file
from hamdist.study.sweep.plots import study_plots
from hamdist.study.sweep.run import StudyOutcome
from hamdist.study.sweep.settings import Axis, StudySettings, study_yaml
from hamdist.study.sweep.summary import SummaryLine, summary
from hamdist.study.sweep.tables import study_tables
from hamdist.study.view.page import page


def save_study(
    folder: Path,
    study: StudySettings,
    outcomes: Sequence[StudyOutcome],
    *,
    command: str,
    first: Axis | None = None,
) -> dict[str, Table]:
    """Write study.yaml, study.json, study.csv, study.md, study.tex, study.html and the plots;
    return the tables.

    Raises SettingsError if a file cannot be written.
    """
    lines = summary(outcomes)
    tables = study_tables(study, lines, first)
    plots = study_plots(study, outcomes)
    for name, png in plots.items():
        write_file(folder / name, png)
    write_file(folder / "study.yaml", study_yaml(study))
    rows = [record(line) for line in lines]
    write_file(folder / "study.json", to_json({"command": command, "rows": rows}, indent=2) + "\n")
    write_file(folder / "study.csv", _csv(rows))
    write_file(folder / "study.md", _markdown(study, tables, plots, command))
    write_file(folder / "study.tex", "\n".join(map(latex, tables.values())))
    write_file(folder / "study.html", _html(study, tables, plots, command))
    return tables


def record(line: SummaryLine) -> dict[str, Any]:
    """Return a line as plain values, with a name for each part of the point and of the choice."""
    raw = dataclasses.asdict(line)
    point = {axis.value: value for axis, value in line.point}
    return {**raw, "trains": line.trains.value, "point": point, "notes": list(line.notes)}


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(flat_tests(rows[0])), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {name: row[name] for name in row}
        for name in ("point", "chosen"):
            flat[name] = "; ".join(f"{key}={value}" for key, value in row[name].items())
        flat["notes"] = "; ".join(row["notes"])
        writer.writerow(flat_tests(flat))
    return out.getvalue()


def _markdown(
    study: StudySettings, tables: Mapping[str, Table], plots: Mapping[str, bytes], command: str
) -> str:
    parts = [f"# {study.name}\n\n`{command}`\n"]
    parts += [f"\n## {title}\n\n{markdown(table)}" for title, table in tables.items()]
    parts += [f"\n![{_words(name)}]({name})\n" for name in plots if name.endswith(".png")]
    parts.append(f"\n## Settings\n\n```yaml\n{study_yaml(study)}```\n")
    return "".join(parts)


def _html(
    study: StudySettings, tables: Mapping[str, Table], plots: Mapping[str, bytes], command: str
) -> str:
    title = escape(f"hamdist study: {study.name}")
    parts = [f"<h1>{title}</h1>", facts(command, time.strftime("%Y-%m-%d %H:%M %z"))]
    for name, table in tables.items():
        parts.append(f'<h2>{escape(name)}</h2><div class="scroll">{html_table(table)}</div>')
        parts.append(html_notes(table.notes))
    parts += [
        "<h2>Plots</h2>",
        *(html_figure(name, plots[name]) for name in plots if name.endswith(".svg")),
    ]
    parts.append(f"<h2>Settings</h2><pre>{escape(study_yaml(study))}</pre>")
    return page(title, parts)


def _words(name: str) -> str:
    return name.removesuffix(".png").replace("-", " against ")
