"""The early end of a run: by Ctrl-C, SIGTERM, a terminal that closes, or its `on_progress`.

Python calls signal handlers in the main thread alone: in other threads signals are not handled.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any, TypeVar

from hamdist.errors import HamdistError, Stop, TakeSnapshot
from hamdist.runtime.results.result import Outcome, Progress

Handler = Callable[[int, FrameType | None], object]
OnProgress = Callable[[Progress], object]
T = TypeVar("T")


@contextmanager
def handled(handler: Handler | signal.Handlers, *numbers: int) -> Iterator[None]:
    """Set the handler of signals (those that end a run), and set the old ones again at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = numbers or (signal.SIGINT, *terminating())
    before = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            # (None: a handler that was not set from Python, which cannot be set again from here)
            signal.signal(number, signal.SIG_DFL if old is None else old)


def terminating() -> tuple[int, ...]:
    """Return SIGTERM unless this process ignores it, and SIGHUP if a terminal that closes ends it.

    It does not under `nohup`, nor where a program has a handler of its own.
    """
    handler = signal.getsignal(signal.SIGHUP)
    ours = (signal.SIG_DFL, signal.default_int_handler, _interrupt)
    ends = handler in ours or hasattr(handler, "came")
    ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    return (() if ignored else (signal.SIGTERM,)) + ((signal.SIGHUP,) if ends else ())


def interrupts_ignored() -> AbstractContextManager[None]:
    """Ignore Ctrl-C, SIGTERM and SIGHUP inside, so that cleaning up is not interrupted."""
    return handled(signal.SIG_IGN)


@contextmanager
def interrupts_delayed() -> Iterator[None]:
    """Delay Ctrl-C, SIGTERM and SIGHUP to the end, so that what is written is written whole."""
    numbers: list[int] = []
    try:
        with handled(lambda number, _: numbers.append(number)):
            yield
    finally:
        for number in numbers[:1]:
            signal.raise_signal(number)


def terminated_as_interrupted() -> AbstractContextManager[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP inside, so that all ends in order.

    It bears the signal's name. It is raised at once for a signal that has come to the command
    (cli/process.py), but was lost: where modules are imported, errors are passed over.
    """
    if getattr(signal.getsignal(signal.SIGTERM), "came", False):
        raise KeyboardInterrupt
    numbers = terminating()
    return handled(_interrupt, *numbers) if numbers else nullcontext()


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


class ProgramSignals:
    """Hands signals that have ended a run on to its program, behind the run's orderly end.

    A handler of the program's own is called. Without one SIGTERM and SIGHUP end the program, as
    they would have without a run, by SystemExit(128 + number); the first Ctrl-C is done with the
    run, a second one raises KeyboardInterrupt. What is raised has the run's `result`.

    As a context it does so for a signal that came before the first tick.
    """

    def __init__(self) -> None:
        self._handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, *terminating())}

    def passed(self, result: T, numbers: Sequence[int]) -> T:
        """Return the result of a run that `numbers` have ended, if they leave the program on."""
        once = numbers.count(signal.SIGINT) == 1
        for number in dict.fromkeys(numbers):
            handler: Any = self._handlers.get(number)
            if once and number == signal.SIGINT and handler is signal.default_int_handler:
                continue
            try:
                if handler is signal.SIG_DFL:
                    raise SystemExit(128 + number)
                if callable(handler):
                    handler(number, None)
            except BaseException as error:
                error.result = result  # type: ignore[attr-defined]
                raise
        return result

    def __enter__(self) -> ProgramSignals:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        # (a KeyboardInterrupt of the user's own code has another text, or none)
        if isinstance(error, KeyboardInterrupt) and str(error) in signal.Signals.__members__:
            self.passed(getattr(error, "result", None), [signal.Signals[str(error)]])


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Set the handlers of SIGINT and SIGTERM again at the end, whoever changed them inside.

    Ray sets its own while it starts, in Python and in C++. The SystemExit that the former raises on
    SIGTERM becomes KeyboardInterrupt; the latter, which would abort this process, is not set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _none_in_native_code():
            yield
    except SystemExit as exit_:
        raise KeyboardInterrupt(signal.Signals.SIGTERM.name) from exit_
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


NATIVE_HANDLERS_SET = "_ZN3ray6RayLog36is_failure_signal_handler_installed_E"  # (a static bool)


@contextmanager
def _none_in_native_code() -> Iterator[None]:
    """Have Ray's C++ believe inside that its handlers are set, if this version has the flag."""
    library = getattr(sys.modules.get("ray._raylet"), "__file__", None)
    try:
        flag = ctypes.c_bool.in_dll(ctypes.PyDLL(library), NATIVE_HANDLERS_SET)
    except ValueError:
        flag = ctypes.c_bool()
    before, flag.value = flag.value, True
    try:
        yield
    finally:
        flag.value = before


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
        interrupted: a signal came, or KeyboardInterrupt of the user's own code.
        signals: those that came, in order.
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
        self.signals: list[int] = []
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
        outcome.signals = self.signals
        outcome.error = failure or self.error or outcome.error
        return outcome

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.signals.append(number)
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self._stop()

    def __enter__(self) -> RunInterrupts:
        self._signals.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._signals.__exit__(None, None, None)
