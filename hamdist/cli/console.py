"""What the commands print with: results on standard output, all else on standard error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hamdist.errors import INTERRUPTED, BlockError, HamdistError, exit_code

if TYPE_CHECKING:
    from hamdist.study.report.table import Table as StudyTable

PLAIN_WIDTH = 132  # where there is no terminal
LABELS = 2  # columns of a table that name its rows


def console(*, stderr: bool = False) -> Console:
    """Made when needed, so that it writes to the stream of the moment."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made.width = PLAIN_WIDTH
    return made


def complain(text: str) -> None:
    """Progress, a warning or an error: a line of standard error."""
    console(stderr=True).print(Text(text), soft_wrap=True)


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """What a run reached, name by name."""
    table = Table(box=None, pad_edge=False, show_header=False, title_justify="left")
    table.title = title
    for name, value in facts.items():
        table.add_row(name, Text(value))
    console().print(table)


def print_rows(title: str, rows: Sequence[Sequence[str]]) -> None:
    """A table of text; the first row has the columns' names."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows[1:]:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def print_table(cells: StudyTable, title: str) -> None:
    """A study's rows, with its notes below. The first columns are names, all others numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(cells.titles):
        table.add_column(name, justify="left" if i < LABELS else "right", overflow="fold")
    for row in cells.rows:
        table.add_row(*(Text(cell) for cell in row))
    out = console()
    out.print(table)
    for note in cells.notes:
        out.print(Text(f"• {note}"), soft_wrap=True)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns what hamdist raises on purpose, and Ctrl-C, into one message and an exit code."""
    try:
        yield
    except HamdistError as error:
        if isinstance(error, BlockError) and error.details:
            complain(error.details.rstrip())
        complain(f"Error: {error}")
        raise typer.Exit(exit_code(error)) from None
    except KeyboardInterrupt:
        complain("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
