"""Output of the commands: results on standard output, all else on standard error.

Lines of standard error go through the logger `hamdist`: errors, warnings, notes and progress
(INFO), phases (DEBUG). With --json standard output has one JSON document and nothing else.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hamdist.display.progress import RunDisplay
from hamdist.errors import FAILED, INTERRUPTED, ChoiceWarning, HamdistError, exit_code

if TYPE_CHECKING:
    from hamdist.config import Settings
    from hamdist.display.table import Table as StudyTable
    from hamdist.runtime.process.interrupts import OnProgress
    from hamdist.runtime.results.events import RunEvent
    from hamdist.study.view.page import FollowedRun

PLAIN_WIDTH = 132  # where there is no terminal
LABELS = 2  # columns of a table that name its rows
LOGGER = logging.getLogger("hamdist")


@dataclass
class CommandOutput:
    """The results of the running command; `as_json` prints them as one JSON document.

    alone: the command makes nothing else.
    """

    as_json: bool = False
    alone: bool = False
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
    OUTPUT.as_json, OUTPUT.alone, OUTPUT.document = as_json, False, {}
    before = [*LOGGER.handlers], LOGGER.propagate, LOGGER.level
    LOGGER.handlers[:], LOGGER.propagate = [LINES], False
    LOGGER.setLevel(level)
    try:
        yield
    finally:
        if OUTPUT.as_json:
            from hamdist.study.report.files import to_json

            sys.stdout.write(to_json(OUTPUT.document, indent=2))
            sys.stdout.flush()
        if OUTPUT.alone:
            _check_printed()
        LOGGER.handlers[:], LOGGER.propagate, LOGGER.level = before


def report(**parts: Any) -> None:
    """Add parts to the document of --json."""
    OUTPUT.document |= parts


def console(*, stderr: bool = False) -> Console:
    """Make a console, when needed, so that it writes to the current stream."""
    new = Console(stderr=stderr, highlight=False, quiet=OUTPUT.as_json and not stderr)
    if not new.file.isatty():
        new.width = PLAIN_WIDTH
    return new


def say(text: str) -> None:
    """Print a line of the result, which the screen may break but not we."""
    console().print(Text(text), soft_wrap=True)


def _check_printed() -> None:
    """End the command as failed if what it said went to a disk that is full."""
    sys.stdout.flush()
    full = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "full", None)
    if full is not None:
        complain(f"Error: standard output cannot be written: {full.strerror}")
        raise typer.Exit(FAILED)


def say_written(out: Path) -> None:
    """Print and report where the files of a result are."""
    report(out=str(out))
    say(f"Written to {out}")


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
    console().print(study_table(cells, title))
    print_notes(cells.notes)


def study_table(cells: StudyTable, title: str, columns: Sequence[int] | None = None) -> Table:
    """Return the rows as the screen shows them: `columns`, or all."""
    columns = range(len(cells.titles)) if columns is None else columns
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        show_lines=any("\n" in row[i] for row in cells.rows for i in columns),
    )
    for i in columns:
        table.add_column(
            cells.titles[i], justify="left" if i < LABELS else "right", overflow="fold"
        )
    for row in cells.rows:
        table.add_row(*(Text(row[i]) for i in columns))
    return table


def print_notes(notes: Iterable[str]) -> None:
    """Print notes below a table."""
    for note in notes:
        say(f"• {note}")


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
        if error.details:
            complain(error.details.rstrip())
        complain(f"Error: {error}")
        report(error=str(error))
        raise typer.Exit(exit_code(error)) from None
    except KeyboardInterrupt:
        complain("Interrupted.")
        OUTPUT.document.setdefault("error", "interrupted")
        raise typer.Exit(INTERRUPTED) from None


# -- live display ----------------------------------------------------------------------------------


class Display(RunDisplay):
    """Shows progress on standard error; `settings` may leave the live display out."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._console = console(stderr=True)
        self._run: tuple[FollowedRun, OnProgress] | None = None
        live = settings is None or settings.metrics.progress is not False
        super().__init__(
            self._console, live=live and LOGGER.isEnabledFor(logging.INFO), plain=self.say
        )

    def __enter__(self) -> Display:
        LINES.console = self._console
        super().__enter__()
        return self

    @property
    def follows(self) -> bool:
        """Return True if the events of a run have begun to come (`take`)."""
        return self._run is not None

    def take(self, event: RunEvent) -> None:
        """Show the progress of the run that events tell of."""
        from hamdist.runtime.results.events import RunBegun
        from hamdist.study.view.page import FollowedRun

        if isinstance(event, RunBegun):
            self._run = FollowedRun(event), self.watch(event.title, event.batch)
        if self._run is not None:
            run, show = self._run
            progress = run.take(event)
            if progress is not None:
                show(progress)

    def close(self) -> None:
        super().close()
        LINES.console = None

    def say(self, text: str) -> None:
        """Print a line that stays."""
        note(text)


@contextmanager
def warning_at_once() -> Iterator[list[str]]:
    """Show Python's warnings as our own inside. Yields those that were shown."""
    texts: list[str] = []

    def show(message: Warning | str, *_: object, **__: object) -> None:
        texts.append(str(message))
        chosen = isinstance(message, ChoiceWarning)
        level, word = (logging.INFO, "Note") if chosen else (logging.WARNING, "Warning")
        LOGGER.log(level, "%s: %s", word, message)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield texts
