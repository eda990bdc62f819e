"""When: which block does what in which tick, and which signal it expects (semantics.md,
"Schedules, exactly"). Pure: no tensors, no sockets, no state.

A block's events come in order of their ticks; at one tick, FORWARD before BACKWARD:

    pulse, chain of 3, c = 1      block 0   block 1   block 2 (readout)
    tick 0                        F0
    tick 1                        F1        F0
    tick 2                        F2        F1        F0 B0
    tick 3                        F3        F2 B0     F1 B1
    tick 4                        F4 B0     F3 B1     F2 B2

The stream is a source at depth -1: it sends sample n at tick n c - 1, to the blocks that read it
and to the readouts that compare with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Protocol

from hamdist.config import Credit, Moves, Order, TargetOf, Update
from hamdist.dynamics.graph.graph import Edge, Graph, Tie
from hamdist.dynamics.schedule.events import ALONE as ALONE
from hamdist.dynamics.schedule.events import Bundle as Bundle
from hamdist.dynamics.schedule.events import Event as Event
from hamdist.dynamics.schedule.events import Kind as Kind
from hamdist.dynamics.schedule.events import Phase as Phase
from hamdist.dynamics.schedule.events import Span as Span
from hamdist.dynamics.schedule.events import Stamp as Stamp
from hamdist.dynamics.schedule.events import emitted as emitted
from hamdist.dynamics.schedule.events import source_events as source_events
from hamdist.dynamics.schedule.levels import Locality
from hamdist.dynamics.schedule.microbatches import SPACING, Pulses
from hamdist.errors import LevelError


class Schedule(Protocol):
    """The common face of all presentations. `c`: ticks between two samples.

    A block and its edges are given by name and `Edge`; a method that names the signal of an edge
    for an event answers None where that event reads nothing from the edge.
    """

    c: int

    def state(self, edge: Edge, event: Event) -> Stamp | None:
        """The parent's state that the child reads in `event`."""

    def message(self, edge: Edge, event: Event) -> Stamp | None:
        """The child's message that the parent reads in `event`."""

    def target(self, readout: str, event: Event) -> Stamp | None:
        """The target that the readout takes from the stream in `event`."""

    def delay(self, block: str) -> int:
        """Updates or ticks by which a block's messages lag behind (for delay-scaled steps)."""

    def in_flight(self, edge: Edge, kind: Kind) -> int:
        """The most signals of `kind` that the schedule itself keeps waiting on an edge."""

    def target_in_flight(self, readout: str) -> int: ...

    def bundle(self, edge: Edge, kind: Kind) -> Bundle:
        """The most signals of `kind` that may leave together on an edge."""

    @property
    def staleness(self) -> int:
        """The most samples by which a message lags behind what it meets."""


def make_schedule(graph: Graph, knobs: Locality, silent: frozenset[str] = frozenset()) -> Schedule:
    """The schedule of `knobs` on `graph`. silent: blocks that get no messages (`Graph.silent`).

    Raises LevelError where the graph does not allow it: a pulse through a cycle, or past a block
    that the input does not reach; a speed that is measured in depths on a graph with cycles.
    """
    cycle = graph.cycle()
    if knobs.pulse:
        if cycle:
            raise LevelError(
                f"presentation 'pulse' needs an acyclic graph, but {', '.join(cycle)} lie on or "
                "behind a cycle; use the levels 'local' or 'group' (presentation 'hold'), or for "
                "sequences 'bptt'"
            )
        unreached = graph.unreached()
        if unreached:
            raise LevelError(
                f"presentation 'pulse': no path leads from the input to {', '.join(unreached)}"
            )
        with_state = [r for r in graph.readouts if graph.blocks[r].state]
        if with_state:
            raise LevelError(
                f"presentation 'pulse': the readout {with_state[0]!r} has a state; a pulse needs "
                "an output net (state=False)"
            )
        return PulseSchedule(graph, knobs, silent)
    if cycle and not isinstance(knobs.speed, int):
        raise LevelError(
            f"speed {knobs.speed!r} counts the depth of the graph, but {', '.join(cycle)} lie on "
            "or behind a cycle; give the number of ticks a sample is held"
        )
    return HoldSchedule(graph, knobs)


class PulseSchedule:
    """A sample enters once and travels; its message comes back the same way.

    forward of sample n at depth l: tick n c + l. backward: n c + 2D - l; an output net takes the
    loss in the tick of its forward. Signals that arrive early wait at the receiver, so those of
    one sample meet, over skips as well. With credit 'heads' nothing comes back: a block learns from
    sample n in the tick of its forward. Nor does anything come back to `silent` blocks (whose
    weights are frozen, as are those of all blocks before them): with d the least depth of the
    others, the speed `inf` is then 2 (D - d) + 1 ticks a sample.

    With M micro-batches an item makes M pulses (microbatches.py), after the last of which weights
    move; `sample` is the number of the pulse then, and `item` tells whose part it is.
    """

    def __init__(self, graph: Graph, knobs: Locality, silent: frozenset[str] = frozenset()) -> None:
        self._depths = graph.depths
        self._readouts = set(graph.readouts)
        self._D = graph.depth
        self._silent = silent
        self.one_way = knobs.credit is Credit.HEADS
        self.parts = knobs.microbatches if isinstance(knobs.microbatches, int) else 1
        self.c = knobs.speed if isinstance(knobs.speed, int) else self._ticks(knobs.speed)
        self._pulses = Pulses(self.c, self.parts)

    def _ticks(self, speed: str) -> int:
        if speed == "depth":
            return self._D + 1
        trip = 2 * self._D + 1 if self.one_way else 1 + max(map(self.lag, self._depths))
        return trip + SPACING * (self.parts - 1)

    def item(self, sample: int) -> int:
        """The item that a pulse belongs to."""
        return sample // self.parts

    @property
    def spacing(self) -> int:
        """Ticks between two pulses."""
        return self._pulses.spacing

    @property
    def trip(self) -> int:
        """Ticks that a sample is in the network, there and back."""
        return max(self._backward_tick(b, 0) for b in self._depths) + 1

    def lag(self, block: str) -> int:
        """d_l = 2 (D - l): ticks from a block's forward to its backward, where it has one."""
        if self.one_way or block in self._readouts or block in self._silent:
            return 0
        return 2 * (self._D - self._depths[block])

    def _forward_tick(self, block: str, sample: int) -> int:
        return self._pulses.tick(sample) + self._depths[block]

    def _backward_tick(self, block: str, sample: int) -> int:
        return self._forward_tick(block, sample) + self.lag(block)

    def events(self, block: str, since: int = 0) -> Iterator[Event]:
        first = self._pulses.first(since - self._forward_tick(block, 0))
        if block in self._readouts:
            for n in count(first):
                yield Event(self._forward_tick(block, n), Phase.READ, n)
        if self.one_way or block in self._silent:
            for n in count(first):
                yield Event(self._forward_tick(block, n), Phase.FORWARD, n)
        behind = self._pulses.first(since - self._backward_tick(block, 0))
        for n in count(first):
            forward = Event(self._forward_tick(block, n), Phase.FORWARD, n)
            while self._backward_tick(block, behind) < forward.tick:
                yield Event(self._backward_tick(block, behind), Phase.BACKWARD, behind)
                behind += 1
            yield forward

    def state(self, edge: Edge, event: Event) -> Stamp | None:
        if event.phase is Phase.BACKWARD:
            return None
        if edge.from_input:
            return emitted(event.sample, self.c, self.parts)
        if edge.parent in self._silent:
            return Stamp(self._forward_tick(edge.parent, event.sample), event.sample, 0)
        # Updates m with m c + 2D - l < n c + l have come before the forward of n.
        version = max(0, self.item(event.sample) - self.lag(edge.parent) // self.c)
        return Stamp(self._forward_tick(edge.parent, event.sample), event.sample, version)

    def message(self, edge: Edge, event: Event) -> Stamp | None:
        if event.phase is not Phase.BACKWARD:
            return None
        tick = self._backward_tick(edge.child, event.sample)
        return Stamp(tick, event.sample, self.item(event.sample))

    def target(self, readout: str, event: Event) -> Stamp | None:  # noqa: ARG002
        """The item's whole target comes with its first pulse."""
        if event.sample % self.parts:
            return None
        return emitted(event.sample, self.c, self.parts)

    def gradient(self, tie: Tie, event: Event) -> Stamp:
        """What the user sends the owner, for the owner's backward pass. Where both have it in the
        same tick, the owner comes last."""
        sent = self._backward_tick(tie.user, event.sample)
        return Stamp(sent, event.sample, self.item(event.sample))

    def weight(self, tie: Tie, event: Event) -> Stamp | None:
        """The owner's weights that the user takes before its forward pass of an item's first pulse:
        the latest that were sent in an earlier tick."""
        item = self.item(event.sample) - self.weight_lag(tie)
        if item < 0 or event.sample % self.parts:
            return None
        last = (item + 1) * self.parts - 1
        return Stamp(self._backward_tick(tie.owner, last), last, item + 1)

    def weight_lag(self, tie: Tie) -> int:
        """n - m: item n passes the user with weights that have moved by items 0 ... m."""
        early = self._backward_tick(tie.owner, self.parts - 1) + 1 - self._depths[tie.user]
        return -(-early // self.c)

    def tie_in_flight(self, tie: Tie, kind: Kind) -> int:
        """The most gradients or weights that wait. When a stream ends, an owner of depth a sends
        until it hears of that, c + a - l ticks after the last forward pass of a user of depth l."""
        if kind is Kind.GRADIENT:
            first = self._backward_tick(tie.owner, 0) - self._backward_tick(tie.user, 0)
            return self._pulses.most(first)
        return 2 + max(0, -(-(self._depths[tie.owner] - self._depths[tie.user]) // self.c))

    def delay(self, block: str) -> int:
        return self.lag(block) // self.c

    def in_flight(self, edge: Edge, kind: Kind) -> int:
        if kind is Kind.STATE:
            before = -1 if edge.from_input else self._depths[edge.parent]
            wait = self._depths[edge.child] - before
        else:
            wait = self._backward_tick(edge.parent, 0) - self._backward_tick(edge.child, 0)
        return self._pulses.most(wait)

    def target_in_flight(self, readout: str) -> int:
        return (self._depths[readout] + 1) // self.c + 1

    def bundle(self, edge: Edge, kind: Kind) -> Bundle:  # noqa: ARG002
        return Bundle(max(1, edge.delay // self.spacing), self.spacing)

    @property
    def staleness(self) -> int:
        return max(self.delay(b) for b in self._depths)

    def stored(self, block: str) -> int:
        """Samples (micro-batches, where there are) whose activations a block keeps at a time:
        floor(d_l / c) + 1; with credit 'heads', and where no messages come, none beyond the tick in
        which they pass."""
        if self.one_way or block in self._silent:
            return 0
        return self._pulses.most(self.lag(block))


class HoldSchedule:
    """The sample stays at the input for c ticks; every block steps in every tick.

    At tick k the input shows sample floor(k / c). With `layer-by-layer` only the blocks of depth
    k mod c move (HL Eq. 10). The sequential order compares the new states with the target inside
    one tick (HL Appendix D), so there an output net takes its tick last: it reads the h_{k+1} that
    its parents have sent in their tick k, and they read its message at the start of the next.
    """

    def __init__(self, graph: Graph, knobs: Locality) -> None:
        self._depths = graph.depths
        self._knobs = knobs
        sequential = knobs.order is Order.SEQUENTIAL
        state = {r: graph.blocks[r].has_state for r in graph.readouts}
        self._late = {r for r in graph.readouts if sequential and not state[r]}
        # The tick after its presentation in which a sample's prediction stands at a readout: a
        # state is one tick later than an output net, and the sequential order looks one ahead.
        self._lags = {r: max(0, graph.depths[r] + state[r] - sequential) for r in graph.readouts}
        self._reach = max(self._lags.values())
        depth = max(1, max(graph.depths[r] + (r not in self._late) for r in graph.readouts))
        speeds = {"inf": 2 * self._reach + 1, "depth": depth}
        self.c = knobs.speed if isinstance(knobs.speed, int) else speeds[knobs.speed]

    def late(self, block: str) -> bool:
        """Whether a tick of `block` comes after those of all other blocks with the same number."""
        return block in self._late

    def events(self, block: str, since: int = 0) -> Iterator[Event]:  # noqa: ARG002
        for k in count(since):
            yield Event(k, Phase.TICK, k // self.c)

    def before_start(self, edge: Edge) -> range:
        """The ticks before the first whose states the child of `edge` reads."""
        return range(self.late(edge.child) - edge.delay, 0)

    def state(self, edge: Edge, event: Event) -> Stamp | None:
        if not edge.from_input:
            return self._sent(event.tick - edge.delay + self.late(edge.child))
        shown = event.tick - edge.delay + 1
        return emitted(shown // self.c, self.c) if shown >= 0 and shown % self.c == 0 else None

    def message(self, edge: Edge, event: Event) -> Stamp | None:
        return self._sent(event.tick - edge.delay)

    def _sent(self, tick: int) -> Stamp:
        """The stamp of what a block sends in `tick` (below 0: before the start)."""
        return Stamp(tick, tick // self.c, max(0, self.updates_before(tick)))

    def updates_before(self, tick: int) -> int:
        return tick if self._knobs.update is Update.TICK else tick // self.c

    def updates(self, tick: int) -> bool:
        """Whether the weights move in `tick`."""
        return self._knobs.update is Update.TICK or tick % self.c == self.c - 1

    def moves(self, block: str, tick: int) -> bool:
        """Whether the state of `block` moves in `tick`."""
        return self._knobs.moves is Moves.ALL or tick % self.c == self._depths[block]

    def target_lag(self, readout: str) -> int:
        """Ticks by which the target that `readout` compares with lies back."""
        return 0 if self._knobs.target is TargetOf.CURRENT else self._lags[readout]

    def compares(self, readout: str, tick: int) -> bool:
        """Whether `readout` takes its loss in `tick`."""
        since = tick - self.target_lag(readout)
        if self._knobs.moves is Moves.ALL or self._knobs.target is TargetOf.CURRENT:
            return since >= 0
        return since >= 0 and since % self.c == 0

    def records(self, readout: str, tick: int) -> int | None:
        """The sample whose prequential loss is taken in `tick`: in the first tick in which its
        prediction stands at the readout, before the readout has learned from it; with target
        'current' (literal Algorithm 1) in the sample's last tick."""
        since = tick - self.target_lag(readout)
        last = self.c - 1 if self._knobs.target is TargetOf.CURRENT else 0
        return since // self.c if since >= 0 and since % self.c == last else None

    def target(self, readout: str, event: Event) -> Stamp | None:
        since = event.tick - self.target_lag(readout)
        return emitted(since // self.c, self.c) if since >= 0 and since % self.c == 0 else None

    def delay(self, block: str) -> int:
        back = max(0, self._lags.get(block, self._reach) - self._depths[block])
        if self._knobs.moves is Moves.LAYER_BY_LAYER:
            return back
        return 2 * back if self._knobs.update is Update.TICK else 2 * back // self.c

    def wait(self, block: str) -> int:
        """Ticks from a sample's arrival at `block` to that of the message about it."""
        return 2 * max(0, self._lags.get(block, self._reach) - self._depths[block])

    def in_flight(self, edge: Edge, kind: Kind) -> int:  # noqa: ARG002
        """d in every tick. In the end d more: a block that stops in tick k has read what was sent
        until k - d, and its neighbour, which hears of it in tick k + d, has sent on until then."""
        return 2 * edge.delay

    def target_in_flight(self, readout: str) -> int:
        return (self._lags[readout] + 1) // self.c + 1

    def bundle(self, edge: Edge, kind: Kind) -> Bundle:
        if kind is Kind.STATE and self.late(edge.child):
            return ALONE  # read in the tick in which it is sent
        spacing = self.c if edge.from_input else 1
        return Bundle(max(1, edge.delay // spacing), spacing)

    @property
    def staleness(self) -> int:
        if self._knobs.moves is Moves.LAYER_BY_LAYER:
            return self._reach
        return 2 * self._reach // self.c
