"""The early end of a run: by Ctrl-C, SIGTERM, a terminal that closes, or its `on_progress`.

Python calls signal handlers in the main thread alone: in other threads signals are not handled.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from hamdist.errors import HamdistError, Stop, TakeSnapshot
from hamdist.runtime.results.result import Outcome, Progress

Handler = Callable[[int, FrameType | None], object]
OnProgress = Callable[[Progress], object]


@contextmanager
def handled(handler: Handler | signal.Handlers, *numbers: int) -> Iterator[None]:
    """Set the handler of signals (those that end a run), and set the old ones again at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = numbers or (signal.SIGINT, signal.SIGTERM, *hangup())
    before = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            # (None: a handler that was not set from Python, which cannot be set again from here)
            signal.signal(number, signal.SIG_DFL if old is None else old)


def hangup() -> tuple[int, ...]:
    """Return SIGHUP if a terminal that closes ends this process by it.

    It does not under `nohup`, nor where a program has a handler of its own.
    """
    handler = signal.getsignal(signal.SIGHUP)
    ends = handler in (signal.SIG_DFL, signal.default_int_handler) or hasattr(handler, "came")
    return (signal.SIGHUP,) if ends else ()


def deaf_to_interrupts() -> AbstractContextManager[None]:
    """Ignore Ctrl-C, SIGTERM and SIGHUP inside, so that cleaning up is not interrupted."""
    return handled(signal.SIG_IGN)


def terminated_as_interrupted() -> AbstractContextManager[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP inside, so that all ends in order.

    It is raised at once for a signal that has come to the command (cli/process.py), but was lost:
    where modules are imported, errors are passed over.
    """
    if getattr(signal.getsignal(signal.SIGTERM), "came", False):
        raise KeyboardInterrupt
    return handled(signal.default_int_handler, signal.SIGTERM, *hangup())


@contextmanager
def handlers_of_ours() -> Iterator[None]:
    """Set the handlers of SIGINT and SIGTERM again at the end, whoever changed them inside.

    Ray sets its own while it starts, in Python and in C++. The SystemExit that the former raises on
    SIGTERM becomes KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as exit_:
        raise KeyboardInterrupt from exit_
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


class RunInterrupts:
    """Ends a run early on request: at the first Ctrl-C, SIGTERM or SIGHUP, or by `on_progress`.

    As a context it handles the signals: the first one ends the stream, and samples under way are
    finished; the second one raises KeyboardInterrupt.

    Args:
        stop: ends the stream; called once, from a signal handler or from `report`.
        on_progress: the user's. It ends the run by returning `Stop` or by raising it. Any other
            exception ends the run, too, and is kept for the caller to raise (`error`). By returning
            `TakeSnapshot` it asks for a snapshot.
        keep: takes a snapshot soon; None where the run takes none.

    Attributes:
        interrupted: a signal came.
        stopped: `on_progress` requested the end.
        error: the exception of `on_progress`.
    """

    def __init__(
        self,
        stop: Callable[[], None],
        on_progress: OnProgress | None,
        keep: Callable[[], None] | None = None,
    ) -> None:
        self._stop = stop
        self._keep = keep
        self._on_progress = on_progress
        self.interrupted = False
        self.stopped = False
        self.error: Exception | None = None
        self._signals = handled(self._handle)

    @property
    def reports(self) -> bool:
        """Return True if there is a receiver of progress."""
        return self._on_progress is not None and self.error is None

    def report(self, progress: Progress) -> None:
        """Call `on_progress`, and end the run if it requests that."""
        if self._on_progress is None or self.error is not None:
            return
        try:
            answer = self._on_progress(progress)
        except Stop as answer_:
            answer = answer_
        except KeyboardInterrupt:
            self._handle(signal.SIGINT, None)
            return
        except Exception as error:  # noqa: BLE001 (`train` raises it, with the result so far)
            self.error = error
            self._stop()
            return
        if (answer is Stop or isinstance(answer, Stop)) and not self.stopped:
            self.stopped = True
            self._stop()
        elif answer is TakeSnapshot and self._keep is not None:
            self._keep()

    def note(self, outcome: Outcome, failure: HamdistError | None = None) -> Outcome:
        """Write into `outcome` how the run ended; `failure`: what ended it before its time."""
        outcome.interrupted, outcome.stopped = self.interrupted, self.stopped
        outcome.error = failure or self.error or outcome.error
        return outcome

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self._stop()

    def __enter__(self) -> RunInterrupts:
        self._signals.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._signals.__exit__(None, None, None)
