"""The loop that steps the nodes of one process, whichever engine the process belongs to."""

from __future__ import annotations

import heapq
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

from hamdist.dynamics.state.finite import OutOfRange
from hamdist.errors import BlockError, DivergedError, HamdistError
from hamdist.runtime.nodes.factory import Node
from hamdist.runtime.signals.interrupts import Aborted


class Cut(Protocol):
    """What is done when all nodes of a process have come to a tick. due: that tick."""

    due: float

    def reach(self, tick: int) -> None:
        """All nodes stand before their first event of a tick >= due; `tick` is the least of
        those. Sets the next `due`."""


def run_loop(
    nodes: Sequence[Node],
    between: Callable[[], None] | None = None,
    cut: Cut | None = None,
    *,
    started: bool = False,
    after_step: Callable[[Node, int], None] | None = None,
) -> None:
    """Steps `nodes` in the order of their ticks until all have finished; at one tick in the order
    given, late ones last. between: called after every event, after_step before that with the node
    and the tick of the event. started: they go on.

    Raises DivergedError where a state, a costate or a loss leaves the finite range, and BlockError
    naming the block, with the traceback, for whatever else a block raises.
    """
    for node in () if started else nodes:
        _guarded(node, node.start)
    heap = [(node.tick, node.late, i) for i, node in enumerate(nodes) if node.tick is not None]
    heapq.heapify(heap)
    while heap:
        tick, late, i = heap[0]
        if cut is not None and tick >= cut.due:
            cut.reach(tick)
        node = nodes[i]
        _guarded(node, node.step)
        if after_step is not None:
            after_step(node, tick)
        if node.tick is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (node.tick, late, i))
        if between is not None:
            between()


def _guarded(node: Node, act: Callable[[], None]) -> None:
    try:
        act()
    except (HamdistError, Aborted):
        raise
    except OutOfRange as error:
        tick, found = node.tick or 0, (error.quantity, error.norm, error.cause)
        raise DivergedError(node.name, tick, *found) from None
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        message = f"{type(error).__name__}: {first}" if first else type(error).__name__
        raise BlockError(node.name, node.tick or 0, message, traceback.format_exc()) from error
