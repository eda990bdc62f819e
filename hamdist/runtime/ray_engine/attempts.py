"""How often an actor was lost without getting any further.

The tick in which a block fails is known where it raises. A process that dies (out of memory, a
crash in native code) was last heard of up to a second before, or never: its tick differs from one
loss to the next although the cause is the same. So losses are counted as long as neither the actor
nor a snapshot of the run has come further than before.
"""

from __future__ import annotations


class Attempts:
    """Of all actors of one run."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}  # by actor: how far it came, losses since

    def lost(self, actor: str, tick: int | None, saved: int) -> int:
        """How many times in a row `actor` was lost without getting further, this one included.
        tick: where it was, as far as that is known; saved: the tick of the latest snapshot."""
        furthest, times = self._known.get(actor, (-1, 0))
        came = max(saved, -1 if tick is None else tick)
        times = 1 if came > furthest else times + 1
        self._known[actor] = max(came, furthest), times
        return times
