"""The loop that steps the nodes of one process, whichever engine the process belongs to."""

from __future__ import annotations

import heapq
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeAlias

from hamdist.dynamics.finite import OutOfRange
from hamdist.dynamics.schedule.events import Event, Phase
from hamdist.errors import BlockError, DivergedError, HamdistError
from hamdist.runtime.nodes.node import Node
from hamdist.runtime.nodes.pulse import PulseNode
from hamdist.runtime.plan.microbatches import lie_apart
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.signal import Aborted

StepOrder: TypeAlias = Callable[[Node], "tuple[int, ...]"]


class TickAction(Protocol):
    """An action at a tick that all nodes of a process have reached.

    Attributes:
        due: the tick.
    """

    due: float

    def reach(self, tick: int) -> None:
        """Act before `tick`, the least one >= due that no node has passed; set the next `due`."""


def run_loop(
    nodes: Sequence[Node],
    between: Callable[[], None] | None = None,
    action: TickAction | None = None,
    *,
    started: bool = False,
    after_step: Callable[[Node, int], None] | None = None,
    order: StepOrder | None = None,
) -> None:
    """Step `nodes` in the order of their ticks until all have finished.

    At one tick the nodes run in the given order, late ones last. Where a block moves its weights
    once for several messages (micro-batches), the step by the last one, a third of a sample's
    arithmetic, is left for after the backward passes that follow in this process, so that the next
    process has its messages meanwhile. No pass of the block lies between, so no number changes.

    Args:
        nodes: the nodes of one process.
        between: called after every event.
        action: acts whenever all nodes have reached its tick.
        started: True if the nodes continue from a snapshot and must not be started.
        after_step: called before `between`, with the node and the tick of the event.
        order: of the nodes, other than by tick (`order_of`). Every event waits for events that are
            earlier in each of them, so no wait is endless.

    Raises:
        DivergedError: a state, a costate or a loss left the finite range.
        BlockError: a block raised anything else; names the block and carries the traceback.
    """
    for node in () if started else nodes:
        guarded(node, node.start)
    deferred: list[tuple[PulseNode, int]] = []

    def take_steps() -> None:
        for node, tick in deferred:
            guarded(node, node.take_step, tick)
            if after_step is not None:
                after_step(node, tick)
        deferred.clear()

    key = order or _by_tick
    heap = [(key(node), i) for i, node in enumerate(nodes) if node.tick is not None]
    heapq.heapify(heap)
    while heap:
        place, i = heap[0]
        if deferred and not _lag(nodes[i]):
            take_steps()
        if action is not None and (nodes[i].tick or 0) >= action.due:
            behind = [entry for entry in heap if (nodes[entry[1]].tick or 0) < action.due]
            if behind:  # (by tokens only) before others pass the action
                place, i = min(behind)
                heap.remove((place, i))
                heap.insert(0, ((-1, *place[1:]), i))
                heapq.heapify(heap)
            else:
                take_steps()
                action.reach(min(node.tick for node in nodes if node.tick is not None))
        node, tick = nodes[i], nodes[i].tick or 0
        guarded(node, node.step)
        if isinstance(node, PulseNode) and node.deferred:
            deferred.append((node, tick))
        elif after_step is not None:
            after_step(node, tick)
        if node.tick is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (key(node), i))
        if between is not None:
            between()
    take_steps()


def order_of(plan: Plan, blocks: Collection[str]) -> StepOrder:
    """Return the order in which the process of `blocks` steps its nodes.

    Where the next token of a sequence may be long in coming (live runs), what is left of each is
    done before it. Blocks that lie apart in a chain do the forward passes of a tick first, then the
    backward ones, those of deep blocks first: each then comes when its signals have had the time.
    """
    if plan.knobs.sequence and plan.spec.live:
        return _by_token
    return _by_lag if lie_apart(plan.graph, plan.knobs, blocks) else _by_tick


def _by_tick(node: Node) -> tuple[int, ...]:
    return (node.tick or 0, node.late)


def _by_lag(node: Node) -> tuple[int, ...]:
    return (*_by_tick(node), _lag(node))


def _lag(node: Node) -> int:
    return node.lag if isinstance(node, PulseNode) else 0


def _by_token(node: Any) -> tuple[int, ...]:
    """Return the order in which no event of a token waits for the token after it."""
    event: Event = node.event
    back = event.phase is Phase.BACKWARD
    return (event.span.number if event.span else 0, back, 0 if back else event.sample, event.tick)


def guarded(node: Node, act: Callable[[], None], tick: int | None = None) -> None:
    """Let a node act; raise DivergedError or BlockError, as of `tick` (None: the node's own)."""
    tick = node.tick or 0 if tick is None else tick
    try:
        act()
    except (HamdistError, Aborted):
        raise
    except OutOfRange as error:
        facts = (error.quantity, error.norm, error.cause)
        raise DivergedError(node.name, tick, *facts) from None
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        message = f"{type(error).__name__}: {first}" if first else type(error).__name__
        raise BlockError(node.name, tick, message, traceback.format_exc()) from error
