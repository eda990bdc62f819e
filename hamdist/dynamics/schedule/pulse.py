"""Presentation pulse: when a block takes a travelling sample, and when its message."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import count, takewhile

from hamdist.config import Credit
from hamdist.dynamics.graph.graph import Edge, Graph, Tie
from hamdist.dynamics.schedule.events import Bundle, Event, Kind, Phase, Stamp, emitted
from hamdist.dynamics.schedule.levels import Locality
from hamdist.dynamics.schedule.microbatches import SPACING, Pulses
from hamdist.errors import LevelError


class PulseSchedule:
    """A sample enters once and travels; its message comes back the same way.

    forward of sample n at depth l: tick n c + l. backward: n c + 2D - l; an output net takes the
    loss in the tick of its forward. Signals that arrive early wait at the receiver, so those of
    one sample meet, over skips as well. With credit 'heads' nothing comes back: a block learns from
    sample n in the tick of its forward. Nor does anything come back to `silent` blocks (whose
    weights are frozen, as are those of all blocks before them): with d the least depth of the
    others, the speed `inf` is then 2 (D - d) + 1 ticks a sample. A block whose rule asks for the
    error of the first readout, at depth R, gets it one tick after the loss, at n c + R + 1; one
    whose rule asks for nothing is as with credit 'heads'.

    With M micro-batches a sample makes M pulses (microbatches.py), after the last of which weights
    move; `sample` is the number of the pulse then, and `sample_of` tells whose part it is.

    With `accumulate: k` a block moves once for k samples. Double-buffered, it moves in the same
    ticks, but a sample of group g = n div k meets the weights after the first g - 1 steps in every
    block. These are there in time if k c is more than any lag less c:

        last message of group g - 2    (g - 1) k c - c + 2D  <  g k c    first forward of group g

    Where the gradient of all blocks together is clipped, a sample has two ticks more: `stepping`
    blocks send the squares of their norms with their last messages, the first of them (of least
    depth) adds them up and moves at tick (n + 1) c - 2, the others with what it says, in the tick
    after.
    """

    def __init__(self, graph: Graph, knobs: Locality, silent: frozenset[str] = frozenset()) -> None:
        self._depths = graph.depths
        self._readouts = set(graph.readouts)
        self._D = graph.depth
        self._silent = silent
        self.one_way = knobs.credit is Credit.HEADS
        self._back = {block.name: block.back for block in graph.blocks.values()}
        self._first_readout = graph.readouts[0]
        self._lags = {block: self._lag(block) for block in self._depths}
        named = graph.parameters() if knobs.clip < math.inf else {}
        self.stepping = sorted((b for b in named if named[b]), key=self._depths.__getitem__)
        self.parts = knobs.microbatches if isinstance(knobs.microbatches, int) else 1
        self.c = knobs.speed if isinstance(knobs.speed, int) else self._ticks(knobs.speed)
        self._pulses = Pulses(self.c, self.parts)
        self.group = knobs.accumulate  # samples per step
        self.double_buffered = knobs.double_buffered
        if self.double_buffered and self.staleness > self.group:
            raise LevelError(
                f"locality.accumulate is {self.group}, double_buffered: messages are "
                f"{self.staleness} samples late, so the step before the latest is not made yet "
                f"when its weights are wanted; use accumulate {self.staleness} or more"
            )

    def _ticks(self, speed: str) -> int:
        if speed == "depth":
            return self._D + 1
        trip = 2 * self._D + 1 if self.one_way else 1 + max(self._lags.values())
        if self.stepping:
            trip = 3 + max(self._depths[b] + self._lags[b] for b in self.stepping)
        return trip + SPACING * (self.parts - 1)

    def sample_of(self, pulse: int) -> int:
        """Return the sample that a pulse belongs to."""
        return pulse // self.parts

    @property
    def spacing(self) -> int:
        """Return the ticks between two pulses."""
        return self._pulses.spacing

    @property
    def trip(self) -> int:
        """Return the ticks that a sample is in the network, there and back."""
        return max(self._backward_tick(b, 0) for b in self._depths) + 1

    def lag(self, block: str) -> int:
        """Return d_l = 2 (D - l), the ticks from a block's forward to its backward, if any."""
        return self._lags[block]

    def _lag(self, block: str) -> int:
        back = self._back[block]
        if block in self._readouts or self.one_way or block in self._silent or back == "none":
            return 0
        if back == "error":
            return max(1, self._depths[self._first_readout] + 1 - self._depths[block])
        return 2 * (self._D - self._depths[block])

    def _forward_tick(self, block: str, sample: int) -> int:
        return self._pulses.tick(sample) + self._depths[block]

    def _backward_tick(self, block: str, sample: int) -> int:
        return self._forward_tick(block, sample) + self.lag(block)

    def events(self, block: str, since: int = 0, end: int | None = None) -> Iterator[Event]:
        """Yield the events of a block in tick `since` and later, in a stream of `end` pulses."""
        passes = self._passes(block, since, end)
        if block not in self.stepping:
            return passes
        steps = self._steps_of(block, since)
        if end is not None:
            steps = takewhile(lambda event: event.sample < end, steps)
        return heapq.merge(passes, steps, key=lambda event: event.tick)

    def _steps_of(self, block: str, since: int) -> Iterator[Event]:
        first = max(0, since + 1 - self.c) // (self.c * self.group)  # (or one too early)
        for g in count(first):
            last = (g + 1) * self.group * self.parts - 1
            if self.moved(block, last) >= since:
                yield Event(self.moved(block, last), Phase.STEP, last)

    def moved(self, block: str, pulse: int) -> int:
        """Return the tick in which a block moves by the messages up to that of a pulse."""
        if block not in self.stepping:
            return self._backward_tick(block, pulse)
        return (self.sample_of(pulse) + 1) * self.c - (2 if block == self.stepping[0] else 1)

    def square(self, block: str, event: Event) -> Stamp:
        """Return the stamp of the square that a block sends before the step of `event`."""
        tick = self._backward_tick(block, event.sample)
        return Stamp(tick, event.sample, self._steps(event.sample))

    def norm(self, event: Event) -> Stamp:
        """Return the stamp of the norm by which blocks make the step of `event`."""
        tick = self.moved(self.stepping[0], event.sample)
        return Stamp(tick, event.sample, self._steps(event.sample))

    def _passes(self, block: str, since: int, end: int | None) -> Iterator[Event]:
        first = self._pulses.first(since - self._forward_tick(block, 0))
        entering = count(first) if end is None else range(first, end)
        if block in self._readouts or not self.lag(block):
            phase = Phase.READ if block in self._readouts else Phase.FORWARD
            for n in entering:
                yield Event(self._forward_tick(block, n), phase, n)
            return
        behind = self._pulses.first(since - self._backward_tick(block, 0))
        for n in entering:
            forward = Event(self._forward_tick(block, n), Phase.FORWARD, n)
            while self._backward_tick(block, behind) < forward.tick:
                yield Event(self._backward_tick(block, behind), Phase.BACKWARD, behind)
                behind += 1
            yield forward
        for n in range(behind, end or 0):
            yield Event(self._backward_tick(block, n), Phase.BACKWARD, n)

    def after_end(self, block: str, event: Event, end: int) -> Event | None:
        """Return what follows `event` in a stream of `end` pulses, if anything does."""
        rest = self.events(block, event.tick, end)
        if event.sample < end:
            next(later for later in rest if later == event)
        return next(rest, None)

    def state(self, edge: Edge, event: Event) -> Stamp | None:
        if event.phase in (Phase.BACKWARD, Phase.STEP):
            return None
        if edge.from_input:
            return emitted(event.sample, self.c, self.parts)
        if edge.parent in self._silent:
            return Stamp(self._forward_tick(edge.parent, event.sample), event.sample, 0)
        sample = self.sample_of(event.sample)
        # Messages m with m c + 2D - l < n c + l have come before the forward of n.
        version = max(0, sample - self.lag(edge.parent) // self.c) // self.group
        if self.double_buffered:
            version = self.buffered(sample)
        return Stamp(self._forward_tick(edge.parent, event.sample), event.sample, version)

    @property
    def idle(self) -> int:
        steps = 2 if self.stepping else 0
        return (self.trip + SPACING * (self.parts - 1) + steps) // self.c

    def buffered(self, sample: int) -> int:
        """Return the steps in the weights that a sample meets with double buffering."""
        return max(0, sample // self.group - 1)

    def _steps(self, pulse: int) -> int:
        """Return the steps of a block before the message of a pulse comes to it."""
        return self.sample_of(pulse) // self.group

    def message(self, edge: Edge, event: Event) -> Stamp | None:
        if event.phase is not Phase.BACKWARD:
            return None
        tick = self._backward_tick(edge.child, event.sample)
        return Stamp(tick, event.sample, self._steps(event.sample))

    def error(self, event: Event) -> Stamp | None:
        """Return the stamp of the first readout's error that a block reads in `event`."""
        if event.phase is not Phase.BACKWARD:
            return None
        tick = self._forward_tick(self._first_readout, event.sample)
        return Stamp(tick, event.sample, self._steps(event.sample))

    def target(self, readout: str, event: Event) -> Stamp | None:  # noqa: ARG002
        """Return the stamp of the sample's target, which comes whole with its first pulse."""
        if event.sample % self.parts or event.phase is Phase.STEP:
            return None
        return emitted(event.sample, self.c, self.parts)

    def gradient(self, tie: Tie, event: Event) -> Stamp:
        """Return the stamp of the user's gradient for the owner's backward pass.

        Where both have theirs in the same tick, the owner comes last.
        """
        sent = self._backward_tick(tie.user, event.sample)
        return Stamp(sent, event.sample, self.sample_of(event.sample))

    def weight(self, tie: Tie, event: Event) -> Stamp | None:
        """Return the stamp of the owner's weights before the user's forward pass of a sample.

        They are taken at the sample's first pulse, the latest that were sent in an earlier tick.
        """
        reader = self.sample_of(event.sample) - self.weight_lag(tie)
        if reader < 0 or event.sample % self.parts:
            return None
        last = (reader + 1) * self.parts - 1
        return Stamp(self.moved(tie.owner, last), last, reader + 1)

    def weight_lag(self, tie: Tie) -> int:
        """Return n - m: sample n meets the user's weights after the updates by samples 0 ... m."""
        early = self.moved(tie.owner, self.parts - 1) + 1 - self._depths[tie.user]
        return -(-early // self.c)

    def tie_in_flight(self, tie: Tie, kind: Kind) -> int:
        """Return the most gradients or weights that wait.

        When a stream ends, an owner of depth a sends until the news reaches it, c + a - l ticks
        after the last forward pass of a user of depth l.
        """
        if kind is Kind.GRADIENT:
            first = self._backward_tick(tie.owner, 0) - self._backward_tick(tie.user, 0)
            return self._pulses.most(first)
        return 2 + max(0, -(-(self._depths[tie.owner] - self._depths[tie.user]) // self.c))

    def delay(self, block: str) -> int:
        """Return the most steps of a block between its two passes of a sample."""
        return 1 if self.double_buffered else -(-(self.lag(block) // self.c) // self.group)

    def in_flight(self, edge: Edge, kind: Kind) -> int:
        if kind is Kind.STATE:
            before = -1 if edge.from_input else self._depths[edge.parent]
            wait = self._depths[edge.child] - before
        else:
            wait = self._backward_tick(edge.parent, 0) - self._backward_tick(edge.child, 0)
        return self._pulses.most(wait)

    def errors_in_flight(self, block: str) -> int:
        """Return the most errors of the first readout that wait for `block`."""
        wait = self._backward_tick(block, 0) - self._forward_tick(self._first_readout, 0)
        return self._pulses.most(wait)

    def target_in_flight(self, readout: str) -> int:
        return (self._depths[readout] + 1) // self.c + 1

    def bundle(self, edge: Edge, kind: Kind) -> Bundle:  # noqa: ARG002
        return Bundle(max(1, edge.delay // self.spacing), self.spacing)

    @property
    def staleness(self) -> int:
        """Return the most samples between the two passes of one."""
        return max(self.lag(b) // self.c for b in self._depths)

    def stored(self, block: str) -> int:
        """Samples (micro-batches, where there are) whose activations a block keeps at a time:
        floor(d_l / c) + 1; with credit 'heads', and where no messages come, none beyond the tick in
        which they pass."""
        if not self.lag(block) and block not in self._readouts:
            return 0
        return self._pulses.most(self.lag(block))
