"""Tables of text, as HTML (in a notebook, too), Markdown and LaTeX; the texts of their cells."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import Any

MISSING = "–"


@dataclass(frozen=True, slots=True)
class Table:
    """A table: column titles, one list of cells per row, and notes below."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def _repr_html_(self) -> str:
        return html_table(self) + html_notes(self.notes)


def frame(columns: dict[str, list[Any]]) -> Any:
    """Return columns by name: a pandas DataFrame, or without pandas the dict of lists itself."""
    if find_spec("pandas") is None:
        return columns
    import pandas

    return pandas.DataFrame(columns)


def markdown(table: Table) -> str:
    """Return the table as Markdown."""
    lines = [table.titles, ["---"] * len(table.titles), *table.rows]
    escaped = ([cell.replace("|", r"\|") for cell in cells] for cells in lines)
    body = "".join(f"| {' | '.join(cells)} |\n" for cells in escaped)
    return body + "".join(f"\n{note[0].upper()}{note[1:]}.\n" for note in table.notes)


def markdown_page(title: str, command: str, tables: Mapping[str, Table]) -> str:
    """Return tables by title as Markdown, below the command that made them."""
    parts = (f"\n## {name}\n\n{markdown(table)}" for name, table in tables.items())
    return f"# {title}\n\n`{command}`\n" + "".join(parts)


def latex(table: Table) -> str:
    """Return the table as LaTeX (booktabs), its notes as comments."""
    titles, *rows = (
        " & ".join(_in_latex(cell) for cell in cells) + r" \\"
        for cells in (table.titles, *table.rows)
    )
    columns = "l" + "r" * (len(table.titles) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", titles, r"\midrule", *rows]
    return "\n".join(
        [*lines, r"\bottomrule", r"\end{tabular}"]
        + [f"% {line}" for note in table.notes for line in note.splitlines()]
        + [""]
    )


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Return rows as CSV, with these columns, or those of the first row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


_LATEX = {"\\": r"\textbackslash{}", "–": "--", "±": r"$\pm$", "→": r"$\to$", "\n": ", "}
_LATEX |= {c: f"${c}$" for c in "<>|"}  # (which are other signs in the usual fonts of text)


def _in_latex(cell: str) -> str:
    return "".join(_LATEX.get(c, rf"\{c}" if c in "#$%&_{}" else c) for c in cell)


def html_table(table: Table) -> str:
    """Return the table, without its notes."""
    head = "".join(f"<th>{escape(title)}</th>" for title in table.titles)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def html_notes(notes: Sequence[str]) -> str:
    """Return a box of notes; empty if there are none."""
    if not notes:
        return ""
    entries = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<div class="notes"><b>Notes and warnings</b><ul>{entries}</ul></div>'


def percent(value: float | None, spread: float | None = None, *, digits: int = 1) -> str:
    """Return a share as percent, `–` if there is none: 0.8774, 0.0012 as '87.7 ± 0.1'."""
    return _with_spread(value, spread, lambda v: f"{100 * v:.{digits}f}")


def number(value: float | None, spread: float | None = None) -> str:
    """Return a number of four digits, `–` if there is none, with its spread behind a ±."""
    return _with_spread(value, spread, lambda v: f"{v:.4g}")


def _with_spread(value: float | None, spread: float | None, text: Callable[[float], str]) -> str:
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "not finite"
    # Adding 0.0 after rounding would keep '-0.0': a gap of nothing has no sign.
    shown = text(value)
    if not shown.strip("-0."):
        shown = shown.removeprefix("-")
    if spread is None or not math.isfinite(spread):
        return shown
    return f"{shown} ± {text(spread)}"
