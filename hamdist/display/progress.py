"""A display of progress: live on a terminal, as a bar in a notebook, a line now and then elsewhere.

torch is imported with the first run that is watched.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from hamdist.config import Settings
    from hamdist.display.run_view import RunView, TimeLeft
    from hamdist.runtime.process.interrupts import OnProgress
    from hamdist.runtime.results.result import Progress

LOGGER = logging.getLogger("hamdist")
PLAIN_SECONDS = 5.0  # between two plain lines


def in_notebook() -> bool:
    """Return True in a notebook's kernel."""
    shell = "IPython" in sys.modules and import_module("IPython").get_ipython()
    return bool(shell) and hasattr(shell, "kernel")


def is_screen(console: Console) -> bool:
    """Return True if lines can be drawn anew, as not in a log that has colours (FORCE_COLOR)."""
    return console.is_interactive and console.file.isatty()


class RunDisplay:
    """Shows the progress of runs, until it is closed.

    Args:
        console: the terminal, if it is one.
        live: False: no bar, not even on a terminal or in a notebook.
        plain: prints a line where there is neither; None: such a display is silent.
    """

    def __init__(
        self, console: Console, *, live: bool = True, plain: Callable[[str], object] | None = None
    ) -> None:
        self._plain = plain
        self._live: Live | None = None
        self._cell: Any = None  # of the notebook
        self._view: RunView | None = None
        if live and in_notebook():
            self._cell = import_module("IPython.display").display(Text(""), display_id=True)
        elif live and is_screen(console):
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> RunDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._view is not None and kind is None:
            self._view.over = True
            self._show(self._view)
        self.close()

    def close(self) -> None:
        """Stop the live display: lines printed from now on stay."""
        if self._live is not None:
            self._live.stop()

    @property
    def silent(self) -> bool:
        """Return True if it shows nothing."""
        return self._live is None and self._cell is None and self._plain is None

    def note(self, text: str) -> None:
        """Show the current activity, before a run can be watched."""
        self._show(Text(text, style="bold"))

    def _show(self, renderable: Any) -> None:
        if self._live is not None:
            self._live.update(renderable, refresh=True)
        elif self._cell is not None:
            self._cell.update(renderable)

    def watch(
        self,
        title: str,
        batch: int | None,
        others: TimeLeft | None = None,
        then: OnProgress | None = None,
    ) -> OnProgress:
        """Return the function to call with a run's progress (see `RunView`), which calls `then`."""
        from hamdist.display.run_view import RunView

        view = self._view = RunView(title, batch, others)
        self._show(view)
        printed = time.monotonic()

        def show(progress: Progress) -> object:
            nonlocal printed
            view.update(progress)
            if progress.phase is not None:
                LOGGER.debug("%s", view.line)
            self._show(view)
            drawn = self._live is not None or self._cell is not None
            if self._plain and not drawn and time.monotonic() - printed >= PLAIN_SECONDS:
                printed = time.monotonic()
                self._plain(view.line)
            return None if then is None else then(progress)

        return show


def display_of(settings: Settings) -> RunDisplay:
    """Return the display of a call from Python, as `metrics.progress` says."""
    progress, console = settings.metrics.progress, Console(stderr=True, highlight=False)
    plain = (lambda text: console.print(text, soft_wrap=True)) if progress else None
    return RunDisplay(console, live=progress is not False, plain=plain)


@contextmanager
def shown(settings: Settings, batch: int | None, then: OnProgress | None) -> Iterator[Any]:
    """Yield an `on_progress` that shows a run's progress and calls `then`; None if it need not."""
    with display_of(settings) as display:
        title = f"{settings.name}, {settings.level_name}"
        yield then if display.silent else display.watch(title, batch, then=then)
