"""The loop that steps the nodes of one process, whichever engine the process belongs to."""

from __future__ import annotations

import heapq
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

from hamdist.dynamics.finite import OutOfRange
from hamdist.errors import BlockError, DivergedError, HamdistError
from hamdist.runtime.nodes.factory import Node
from hamdist.runtime.signals.interrupts import Aborted


class Cut(Protocol):
    """An action at a tick that all nodes of a process have reached.

    Attributes:
        due: the tick.
    """

    due: float

    def reach(self, tick: int) -> None:
        """Act at the cut, and set the next `due`.

        Args:
            tick: the least tick >= due before whose events all nodes stand.
        """


def run_loop(
    nodes: Sequence[Node],
    between: Callable[[], None] | None = None,
    cut: Cut | None = None,
    *,
    started: bool = False,
    after_step: Callable[[Node, int], None] | None = None,
    ahead: Callable[[int], int | None] | None = None,
) -> None:
    """Step `nodes` in the order of their ticks until all have finished.

    At one tick the nodes run in the given order, late ones last.

    Args:
        nodes: the nodes of one process.
        between: called after every event.
        cut: acts whenever all nodes have reached its tick.
        started: True if the nodes continue from a snapshot and must not be started.
        after_step: called before `between`, with the node and the tick of the event.
        ahead: called with the number of the node whose turn it is; returns that of one to be
            stepped first, which needs nothing of it.

    Raises:
        DivergedError: a state, a costate or a loss left the finite range.
        BlockError: a block raised anything else; names the block and carries the traceback.
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
        other = None if ahead is None else ahead(i)
        if other is not None:
            node = nodes[other]
            (turn,) = (one for one in heap if one[2] == other)
            heap.remove(turn)
            heap.insert(0, (-1, *turn[1:]))  # so that it is the first of all
            heapq.heapify(heap)
            tick, late, i = turn
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
