"""Presentation pulse: when a block takes a travelling sample, and when its message."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from hamdist.config import Credit
from hamdist.dynamics.graph.graph import Edge, Graph, Tie
from hamdist.dynamics.schedule.events import Bundle, Event, Kind, Phase, Stamp, emitted
from hamdist.dynamics.schedule.levels import Locality


class PulseSchedule:
    """A sample enters once and travels; its message comes back the same way.

    forward of sample n at depth l: tick n c + l. backward: n c + 2D - l; an output net takes the
    loss in the tick of its forward. Signals that arrive early wait at the receiver, so those of
    one sample meet, over skips as well. With credit 'heads' nothing comes back: a block learns from
    sample n in the tick of its forward. Nor does anything come back to `silent` blocks (whose
    weights are frozen, as are those of all blocks before them): with d the least depth of the
    others, the speed `inf` is then 2 (D - d) + 1 ticks a sample.
    """

    def __init__(self, graph: Graph, knobs: Locality, silent: frozenset[str] = frozenset()) -> None:
        self._depths = graph.depths
        self._readouts = set(graph.readouts)
        self._D = graph.depth
        self._silent = silent
        self.one_way = knobs.credit is Credit.HEADS
        self.c = knobs.speed if isinstance(knobs.speed, int) else self._ticks(knobs.speed)

    def _ticks(self, speed: str) -> int:
        if speed == "depth":
            return self._D + 1
        return 2 * self._D + 1 if self.one_way else 1 + max(map(self.lag, self._depths))

    @property
    def trip(self) -> int:
        """Return the ticks that a sample is in the network, there and back."""
        return max(self._backward_tick(b, 0) for b in self._depths) + 1

    def lag(self, block: str) -> int:
        """Return d_l = 2 (D - l), the ticks from a block's forward to its backward, if any."""
        if self.one_way or block in self._readouts or block in self._silent:
            return 0
        return 2 * (self._D - self._depths[block])

    def _forward_tick(self, block: str, sample: int) -> int:
        return sample * self.c + self._depths[block]

    def _backward_tick(self, block: str, sample: int) -> int:
        return self._forward_tick(block, sample) + self.lag(block)

    def events(self, block: str, since: int = 0) -> Iterator[Event]:
        first = max(0, -((self._forward_tick(block, 0) - since) // self.c))
        if block in self._readouts:
            for n in count(first):
                yield Event(self._forward_tick(block, n), Phase.READ, n)
        if self.one_way or block in self._silent:
            for n in count(first):
                yield Event(self._forward_tick(block, n), Phase.FORWARD, n)
        behind = max(0, -((self._backward_tick(block, 0) - since) // self.c))
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
            return emitted(event.sample, self.c)
        if edge.parent in self._silent:
            return Stamp(self._forward_tick(edge.parent, event.sample), event.sample, 0)
        # Updates m with m c + 2D - l < n c + l have come before the forward of n.
        version = max(0, event.sample - self.lag(edge.parent) // self.c)
        return Stamp(self._forward_tick(edge.parent, event.sample), event.sample, version)

    def message(self, edge: Edge, event: Event) -> Stamp | None:
        if event.phase is not Phase.BACKWARD:
            return None
        return Stamp(self._backward_tick(edge.child, event.sample), event.sample, event.sample)

    def target(self, readout: str, event: Event) -> Stamp | None:  # noqa: ARG002
        return emitted(event.sample, self.c)

    def gradient(self, tie: Tie, event: Event) -> Stamp:
        """What the user sends the owner, for the owner's backward pass. Where both have it in the
        same tick, the owner comes last."""
        sent = self._backward_tick(tie.user, event.sample)
        return Stamp(sent, event.sample, event.sample)

    def weight(self, tie: Tie, event: Event) -> Stamp | None:
        """The owner's weights that the user takes before its forward pass: the latest that were
        sent in an earlier tick."""
        m = event.sample - self.weight_lag(tie)
        return None if m < 0 else Stamp(self._backward_tick(tie.owner, m), m, m + 1)

    def weight_lag(self, tie: Tie) -> int:
        """Return n - m: sample n meets the user's weights after the updates by samples 0 ... m."""
        early = self._backward_tick(tie.owner, 0) + 1 - self._depths[tie.user]
        return -(-early // self.c)

    def tie_in_flight(self, tie: Tie, kind: Kind) -> int:
        """The most gradients or weights that wait. When a stream ends, an owner of depth a sends
        until it hears of that, c + a - l ticks after the last forward pass of a user of depth l."""
        if kind is Kind.GRADIENT:
            first = self._backward_tick(tie.owner, 0) - self._backward_tick(tie.user, 0)
            return first // self.c + 1
        return 2 + max(0, -(-(self._depths[tie.owner] - self._depths[tie.user]) // self.c))

    def delay(self, block: str) -> int:
        return self.lag(block) // self.c

    def in_flight(self, edge: Edge, kind: Kind) -> int:
        if kind is Kind.STATE:
            before = -1 if edge.from_input else self._depths[edge.parent]
            wait = self._depths[edge.child] - before
        else:
            wait = self._backward_tick(edge.parent, 0) - self._backward_tick(edge.child, 0)
        return wait // self.c + 1

    def target_in_flight(self, readout: str) -> int:
        return (self._depths[readout] + 1) // self.c + 1

    def bundle(self, edge: Edge, kind: Kind) -> Bundle:  # noqa: ARG002
        return Bundle(max(1, edge.delay // self.c), self.c)

    @property
    def staleness(self) -> int:
        return max(self.delay(b) for b in self._depths)

    def stored(self, block: str) -> int:
        """Samples whose activations a block keeps at a time: floor(d_l / c) + 1; with credit
        'heads', and where no messages come, none beyond the tick in which they pass."""
        return 0 if self.one_way or block in self._silent else self.lag(block) // self.c + 1
