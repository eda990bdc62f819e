"""What an engine hands back, before it becomes a `RunResult`; and how a run is called off."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from hamdist.dynamics.energy import Records
from hamdist.dynamics.metrics import Window
from hamdist.runtime.result import BlockState, RunFacts


@dataclass(slots=True, kw_only=True)
class Outcome(RunFacts):
    """blocks: final states by name (without those that were lost, after an interruption).
    startup: seconds by phase, as far as the engine knows them. delays: those that were chosen,
    where that was asked for. The rest is as in RunResult."""

    blocks: dict[str, BlockState]
    windows: dict[str, list[Window]]
    records: dict[str, Records] = field(default_factory=dict)


Handler = Callable[[int, FrameType | None], object]


@contextmanager
def _on_interrupt(handler: Handler | signal.Handlers) -> Iterator[None]:
    """Inside, Ctrl-C and a polite request to end (SIGTERM) are `handler`'s. Outside the main thread
    signals are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Inside, Ctrl-C does nothing: what cleans up is not to be left half-way."""
    with _on_interrupt(signal.SIG_IGN):
        yield


@contextmanager
def ending_on_interrupt(stop: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C (or SIGTERM) calls `stop` (the stream ends, what is under way is
    finished), the second raises KeyboardInterrupt. Yields a function that tells whether there was
    one."""
    seen = threading.Event()

    def handler(_number: int, _frame: FrameType | None) -> None:
        if seen.is_set():
            raise KeyboardInterrupt
        seen.set()
        stop()

    with _on_interrupt(handler):
        yield seen.is_set
