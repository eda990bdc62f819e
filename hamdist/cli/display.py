"""Display of progress while a command works."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hamdist.cli.console import LINES, LOGGER, console, note
from hamdist.display.progress import RunDisplay
from hamdist.errors import ChoiceWarning

if TYPE_CHECKING:
    from hamdist.config import Settings
    from hamdist.runtime.process.interrupts import OnProgress
    from hamdist.runtime.results.events import RunEvent
    from hamdist.study.view.follow import FollowedRun


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
        from hamdist.study.view.follow import FollowedRun

        if isinstance(event, RunBegun):
            self._run = FollowedRun(event), self.watch(event.title, event.batch)
        if self._run is not None:
            run, show = self._run
            progress = run.take(event)
            if progress is not None:
                show(progress)

    def close(self) -> None:
        """Stop the live display: lines printed from now on stay."""
        super().close()
        LINES.console = None

    def say(self, text: str) -> None:
        """Print a line that stays."""
        note(text)


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
