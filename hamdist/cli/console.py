"""Output of the commands: results on standard output, all else on standard error.

Lines of standard error go through the logger `hamdist`: errors, warnings, notes and progress
(INFO), phases (DEBUG). With --json standard output has one JSON document and nothing else.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hamdist.errors import INTERRUPTED, BlockError, HamdistError, exit_code

if TYPE_CHECKING:
    from hamdist.display.table import Table as StudyTable

PLAIN_WIDTH = 132  # where there is no terminal
LABELS = 2  # columns of a table that name its rows
LOGGER = logging.getLogger("hamdist")


@dataclass
class CommandOutput:
    """The results of the running command; `as_json` prints them as one JSON document."""

    as_json: bool = False
    document: Any = field(default_factory=dict)


OUTPUT = CommandOutput()


class LineHandler(logging.Handler):
    """Prints log records on standard error, above a live display while there is one (`console`)."""

    console: Console | None = None

    def emit(self, record: logging.LogRecord) -> None:
        (self.console or console(stderr=True)).print(Text(record.getMessage()), soft_wrap=True)


LINES = LineHandler()


@contextmanager
def output(*, as_json: bool, level: int) -> Iterator[None]:
    """Hold the output of one command: lines from `level` on, and with `as_json` its document."""
    OUTPUT.as_json, OUTPUT.document = as_json, {}
    LOGGER.handlers[:], LOGGER.propagate = [LINES], False
    LOGGER.setLevel(level)
    try:
        yield
    finally:
        if OUTPUT.as_json:
            from hamdist.study.report.files import to_json

            sys.stdout.write(to_json(OUTPUT.document, indent=2) + "\n")
            sys.stdout.flush()


def report(**parts: Any) -> None:
    """Add parts to the document of --json."""
    OUTPUT.document |= parts


def console(*, stderr: bool = False) -> Console:
    """Make a console, when needed, so that it writes to the current stream."""
    made = Console(stderr=stderr, highlight=False, quiet=OUTPUT.as_json and not stderr)
    if not made.is_terminal:
        made.width = PLAIN_WIDTH
    return made


def complain(text: str) -> None:
    """Print an error."""
    LOGGER.error("%s", text)


def warn(text: str) -> None:
    """Print a warning."""
    LOGGER.warning("Warning: %s", text)


def note(text: str) -> None:
    """Print a note or progress, which -q leaves out."""
    LOGGER.info("%s", text)


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print the facts of a run, by name."""
    table = Table(box=None, pad_edge=False, show_header=False, title_justify="left")
    table.title = title
    for name, value in facts.items():
        table.add_row(name, Text(value))
    console().print(table)


def print_rows(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a table of text; the first row has the columns' names."""
    _report_table(title, rows[0], rows[1:])
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows[1:]:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def print_table(cells: StudyTable, title: str) -> None:
    """Print a study's rows, with its notes below; all but the first columns are numbers."""
    _report_table(title, cells.titles, cells.rows, cells.notes)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(cells.titles):
        table.add_column(name, justify="left" if i < LABELS else "right", overflow="fold")
    for row in cells.rows:
        table.add_row(*(Text(cell) for cell in row))
    out = console()
    out.print(table)
    for note in cells.notes:
        out.print(Text(f"• {note}"), soft_wrap=True)


def _report_table(
    title: str, titles: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> None:
    table = {"titles": list(titles), "rows": [list(row) for row in rows], "notes": list(notes)}
    OUTPUT.document.setdefault("tables", {})[title] = table


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn errors of hamdist, and Ctrl-C, into one message and an exit code."""
    try:
        yield
    except HamdistError as error:
        if isinstance(error, BlockError) and error.details:
            complain(error.details.rstrip())
        complain(f"Error: {error}")
        report(error=str(error))
        raise typer.Exit(exit_code(error)) from None
    except KeyboardInterrupt:
        complain("Interrupted.")
        OUTPUT.document.setdefault("error", "interrupted")
        raise typer.Exit(INTERRUPTED) from None
