"""The watchdog: detects a run that has stopped moving, and the edge that causes it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from hamdist.dynamics.graph.graph import INPUT
from hamdist.runtime.engines.worker_report import BlockedChannel


class Watchdog:
    """Measures the seconds without progress: warns after `warning`, gives up after `limit`."""

    def __init__(self, warning: float, limit: float) -> None:
        self._warning = warning
        self._limit = limit
        self._last: Mapping[str, object] = {}
        self._since = time.monotonic()
        self._spoken = False

    def poll(self, position: Mapping[str, object], now: float) -> tuple[float, bool]:
        """Note the position of all blocks.

        Returns the seconds without progress, and True if a warning is due (once per standstill).
        """
        if position != self._last:
            self._last = dict(position)
            self._since = now
            self._spoken = False
        still = now - self._since
        speak = still >= self._warning and not self._spoken
        self._spoken = self._spoken or speak
        return still, speak

    def over(self, still: float) -> bool:
        """Return True if nothing has moved for the whole limit."""
        return still >= self._limit


def explain(
    waits: Sequence[BlockedChannel], ticks: Mapping[str, int], silent: Sequence[str], seconds: float
) -> str:
    """Return why nothing moves: the edge that all others wait for, since when, for which signal.

    ticks: of the blocks; silent: processes that do not answer, with their blocks.
    """
    head = f"no block has moved for {seconds:.0f} s"
    waiting = {w.waiter for w in waits}
    roots = [w for w in waits if w.awaited not in waiting] or list(waits)
    parts = [
        f"the stream has not yielded the next sample for {w.seconds:.0f} s (block {w.waiter!r} "
        f"waits for {w.waits_for}); a stream that pauses longer needs a larger engine.stall_limit"
        if w.awaited == INPUT
        else f"block {w.waiter!r} has waited {w.seconds:.0f} s for {w.waits_for}; {w.awaited!r} "
        f"is at tick {ticks.get(w.awaited, 'unknown')}"
        for w in roots
    ]
    parts += [f"{name} does not answer" for name in silent]
    if not parts:
        parts = [
            "every block is computing: " + ", ".join(f"{b} tick {k}" for b, k in ticks.items())
        ]
    return f"{head}: " + "; ".join(parts)
