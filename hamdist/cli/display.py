"""Display of progress while a command works."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.live import Live
from rich.text import Text

from hamdist.cli.console import LINES, LOGGER, console, note
from hamdist.errors import ChoiceWarning

if TYPE_CHECKING:
    from hamdist.runtime.process.interrupts import OnProgress
    from hamdist.runtime.results.result import Progress

PLAIN_SECONDS = 5.0  # between two plain lines


class Display:
    """Shows progress on standard error: live on a terminal, a plain line now and then elsewhere."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._live: Live | None = None
        if self._console.is_terminal and LOGGER.isEnabledFor(logging.INFO):
            self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Display:
        LINES.console = self._console
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the live display: lines printed from now on stay."""
        if self._live is not None:
            self._live.stop()
        LINES.console = None

    def note(self, text: str) -> None:
        """Show the current activity, before a run can be watched."""
        if self._live is not None:
            self._live.update(Text(text, style="bold"), refresh=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        note(text)

    def watch(self, title: str, batch: int | None) -> OnProgress:
        """Return the function to call with the progress of the run `title`."""
        from hamdist.study.report.live import RunView

        view = RunView(title, batch)
        if self._live is not None:
            self._live.update(view, refresh=True)
        printed = time.monotonic()

        def show(progress: Progress) -> None:
            nonlocal printed
            view.update(progress)
            if progress.phase is not None:
                LOGGER.debug("%s", view.line)
            if self._live is not None:
                self._live.update(view, refresh=True)
            elif time.monotonic() - printed >= PLAIN_SECONDS:
                printed = time.monotonic()
                self.say(view.line)

        return show


@contextmanager
def warning_at_once() -> Iterator[list[str]]:
    """Show Python's warnings as our own inside. Yields those that were shown."""
    said: list[str] = []

    def show(message: Warning | str, *_: object, **__: object) -> None:
        said.append(str(message))
        chosen = isinstance(message, ChoiceWarning)
        level, word = (logging.INFO, "Note") if chosen else (logging.WARNING, "Warning")
        LOGGER.log(level, "%s: %s", word, message)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield said
