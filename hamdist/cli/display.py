"""What is shown while a command works."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.live import Live
from rich.text import Text

from hamdist.cli.console import console
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
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Show nothing more in place: what is printed from now on stays."""
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """What is going on, where there is no run to watch yet."""
        if self._live is not None:
            self._live.update(Text(text, style="bold"), refresh=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text), soft_wrap=True)

    def watch(self, title: str, batch: int | None) -> OnProgress:
        """What to call with the progress of the run `title`."""
        from hamdist.study.report.live import RunView

        view = RunView(title, batch)
        if self._live is not None:
            self._live.update(view, refresh=True)
        printed = time.monotonic()

        def show(progress: Progress) -> None:
            nonlocal printed
            view.update(progress)
            if self._live is not None:
                self._live.update(view, refresh=True)
            elif time.monotonic() - printed >= PLAIN_SECONDS:
                printed = time.monotonic()
                self.say(view.line)

        return show


@contextmanager
def warning_at_once(say: Callable[[str], None]) -> Iterator[list[str]]:
    """Inside, what Python is warned of is shown as our own warnings are. Yields what was shown."""
    said: list[str] = []

    def show(message: Warning | str, *_: object, **__: object) -> None:
        said.append(str(message))
        say(f"{'Note' if isinstance(message, ChoiceWarning) else 'Warning'}: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield said
