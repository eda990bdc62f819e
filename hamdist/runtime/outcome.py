"""What an engine hands back, before it becomes a `RunResult`; and how a run is called off."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from hamdist.dynamics.energy import Records
from hamdist.dynamics.metrics import Window
from hamdist.runtime.compression import CompressionMap
from hamdist.runtime.digests import DigestMap
from hamdist.runtime.result import BlockState, Replaced


@dataclass(slots=True)
class Outcome:
    """blocks: final states by name (without those that were lost, after an interruption).
    startup: seconds by phase, as far as the engine knows them. placement: the blocks of each
    process. own_memory, time_use, compression, digests: see RunResult. delays: those that were
    chosen, where that was asked for. snapshots: the complete ones that are left."""

    blocks: dict[str, BlockState]
    windows: dict[str, list[Window]]
    samples: int
    ticks: int
    seconds: float
    startup: dict[str, float]
    payload_bytes: dict[str, int]
    peak_memory: dict[str, int]
    own_memory: dict[str, int]
    smoothness: float | None
    placement: list[list[str]]
    stream: dict[str, int] = field(default_factory=dict)
    records: dict[str, Records] = field(default_factory=dict)
    time_use: dict[str, dict[str, float]] = field(default_factory=dict)
    compression: CompressionMap = field(default_factory=dict)
    digests: Mapping[str, DigestMap] = field(default_factory=dict)
    delays: dict[str, int] = field(default_factory=dict)
    snapshots: list[str] = field(default_factory=list)
    replaced: list[Replaced] = field(default_factory=list)
    interrupted: bool = False
    warnings: list[str] = field(default_factory=list)


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
