"""The loop that steps the nodes of one process, whichever engine the process belongs to."""

from __future__ import annotations

import heapq
import traceback
from collections.abc import Callable, Sequence

from hamdist.errors import BlockError, HamdistError
from hamdist.runtime.nodes import Node


class Aborted(Exception):
    """The run was called off while this process waited."""


def run_loop(nodes: Sequence[Node], between: Callable[[], None] | None = None) -> None:
    """Steps `nodes` in the order of their ticks until all have finished; at one tick in the order
    given. between: called after every event.

    Raises BlockError naming the block, with the traceback, for whatever a block raises.
    """
    for node in nodes:
        _guarded(node, node.start)
    heap = [(node.tick, i) for i, node in enumerate(nodes) if node.tick is not None]
    heapq.heapify(heap)
    while heap:
        _, i = heap[0]
        node = nodes[i]
        _guarded(node, node.step)
        if node.tick is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (node.tick, i))
        if between is not None:
            between()


def _guarded(node: Node, act: Callable[[], None]) -> None:
    try:
        act()
    except (HamdistError, Aborted):
        raise
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        message = f"{type(error).__name__}: {first}" if first else type(error).__name__
        raise BlockError(node.name, node.tick or 0, message, traceback.format_exc()) from error
