"""Presentation pulse: when a block takes a travelling sample, and when its message."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import count, takewhile

from hamdist.config import Credit
from hamdist.dynamics.graph.graph import Edge, Graph, Tie
from hamdist.dynamics.schedule.events import ALONE, Bundle, Event, Kind, Phase, Stamp
from hamdist.dynamics.schedule.levels import Locality
from hamdist.dynamics.schedule.microbatches import SPACING
from hamdist.dynamics.schedule.rounds import BACKWARD, FORWARD, OwnLevel, Times, make_round
from hamdist.errors import LevelError


class Travelling(OwnLevel):
    """The built-in levels of pulses: one sample, in parts, every c ticks."""

    def __init__(self, c: int, parts: int) -> None:
        self._c, self._parts = c, parts

    def ticks(self, graph: Graph) -> int:  # noqa: ARG002
        return self._c

    def events(self, graph: Graph) -> Iterator[tuple[int, str, str, int]]:
        answer = graph.depths[graph.readouts[0]] + 1
        for block, depth in graph.depths.items():
            back = 2 * graph.depth - depth
            if graph.blocks[block].back == "error":
                back = max(depth + 1, answer)
            if block in graph.readouts:
                back = depth
            for part in range(self._parts):
                yield SPACING * part + depth, block, FORWARD, part
                yield SPACING * part + back, block, BACKWARD, part


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
        self._silent = silent
        self.one_way = knobs.credit is Credit.HEADS
        mute = {block.name for block in graph.blocks.values() if block.back == "none"}
        mute = {*graph.blocks} if self.one_way else mute | silent
        self._first_readout = graph.readouts[0]
        named = graph.parameters() if knobs.clip < math.inf else {}
        self.stepping = sorted((b for b in named if named[b]), key=self._depths.__getitem__)
        self.parts = knobs.microbatches if isinstance(knobs.microbatches, int) else 1
        self.group = knobs.accumulate  # samples per step
        self.double_buffered = knobs.double_buffered
        self._own_rounds = knobs.own is not None
        level = knobs.own or Travelling(self._ticks(graph, knobs, mute), self.parts)
        self._emits, self._forward, self._backward = times = make_round(level, graph, mute)
        self.own_round: dict[str, list[list[int]]] = {}  # by block: of its two passes, the ticks
        if self._own_rounds:
            passes = times.forward, times.backward
            self.own_round = {
                block: [[*of[block].first] for of in passes] for block in graph.blocks
            }
        self._lags = {block: times.lag(block) for block in graph.blocks}
        self.c = -(-self._emits.ticks // (len(self._emits.first) // self.parts))
        if self.double_buffered and self.staleness > self.group:
            raise LevelError(
                f"locality.accumulate is {self.group}, double_buffered: messages are "
                f"{self.staleness} samples late, so the step before the latest is not made yet "
                f"when its weights are wanted; use accumulate {self.staleness} or more"
            )

    def _ticks(self, graph: Graph, knobs: Locality, mute: set[str]) -> int:
        if isinstance(knobs.speed, int):
            return knobs.speed
        if knobs.speed == "depth":
            return graph.depth + 1
        times = make_round(Travelling(1, 1), graph, mute)
        lags = {block: times.lag(block) for block in graph.blocks}
        trip = 2 * graph.depth + 1 if self.one_way else 1 + max(lags.values())
        if self.stepping:
            trip = 3 + max(self._depths[b] + lags[b] for b in self.stepping)
        return trip + SPACING * (self.parts - 1)

    def sample_of(self, pulse: int) -> int:
        """Return the sample that a pulse belongs to."""
        return pulse // self.parts

    @property
    def round(self) -> tuple[int, int]:
        """Return the ticks after which the events repeat, and the samples that enter meanwhile."""
        return self._emits.ticks, len(self._emits.first) // self.parts

    def enters(self, sample: int) -> int:
        """Return the tick in which a sample meets depth 0."""
        return self._emits.of(sample * self.parts) + 1

    def entered(self, tick: int) -> int:
        """Return the last sample that has entered at `tick` (-1: none)."""
        return -(-self._emits.before(tick) // self.parts) - 1

    def emissions(self, first: int = 0) -> Iterator[Event]:
        """Yield the events of the stream from a pulse on."""
        return (Event(self._emits.of(n), Phase.EMIT, n) for n in count(first))

    def emitted(self, pulse: int) -> Stamp:
        return Stamp(self._emits.of(pulse), pulse, 0)

    @property
    def trip(self) -> int:
        """Return the most ticks that a sample is in the network, there and back."""
        return max(
            back - sent
            for times in self._backward.values()
            for back, sent in zip(times.first, self._emits.first, strict=True)
        )

    def lag(self, block: str) -> int:
        """Return the most ticks from a block's forward to its backward (2 (D - l)), if any."""
        return self._lags[block]

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
            return self._backward[block].of(pulse)
        return (self.sample_of(pulse) + 1) * self.c - (2 if block == self.stepping[0] else 1)

    def square(self, block: str, event: Event) -> Stamp:
        """Return the stamp of the square that a block sends before the step of `event`."""
        tick = self._backward[block].of(event.sample)
        return Stamp(tick, event.sample, self._steps(event.sample))

    def norm(self, event: Event) -> Stamp:
        """Return the stamp of the norm by which blocks make the step of `event`."""
        tick = self.moved(self.stepping[0], event.sample)
        return Stamp(tick, event.sample, self._steps(event.sample))

    def _passes(self, block: str, since: int, end: int | None) -> Iterator[Event]:
        first = max(0, self._forward[block].before(since))
        entering = count(first) if end is None else range(first, end)
        if block in self._readouts or not self.lag(block):
            phase = Phase.READ if block in self._readouts else Phase.FORWARD
            for n in entering:
                yield Event(self._forward[block].of(n), phase, n)
            return
        behind = max(0, self._backward[block].before(since))
        for n in entering:
            forward = Event(self._forward[block].of(n), Phase.FORWARD, n)
            while self._backward[block].of(behind) < forward.tick:
                yield Event(self._backward[block].of(behind), Phase.BACKWARD, behind)
                behind += 1
            yield forward
        for n in range(behind, end or 0):
            yield Event(self._backward[block].of(n), Phase.BACKWARD, n)

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
            return self.emitted(event.sample)
        if edge.parent in self._silent:
            return Stamp(self._forward[edge.parent].of(event.sample), event.sample, 0)
        tick = self._forward[edge.parent].of(event.sample)
        # Messages m with B m < F n have come before the forward of n.
        come = max(0, self._backward[edge.parent].before(tick))
        version = self.sample_of(come) // self.group
        if self.double_buffered:
            version = self.buffered(self.sample_of(event.sample))
        return Stamp(tick, event.sample, version)

    @property
    def idle(self) -> int:
        steps, last = 2 if self.stepping else 0, self.parts - 1
        ends = [
            max(times.first[i] for times in self._backward.values()) + steps
            for i in range(last, len(self._emits.first), self.parts)
        ]
        return self._of_samples(self._emits).most(Times(ends, self._emits.ticks)) - 1

    def _of_samples(self, pulses: Times) -> Times:
        """Return the times of the first pulses of samples."""
        return Times(pulses.first[:: self.parts], pulses.ticks)

    def buffered(self, sample: int) -> int:
        """Return the steps in the weights that a sample meets with double buffering."""
        return max(0, sample // self.group - 1)

    def _steps(self, pulse: int) -> int:
        """Return the steps of a block before the message of a pulse comes to it."""
        return self.sample_of(pulse) // self.group

    def message(self, edge: Edge, event: Event) -> Stamp | None:
        if event.phase is not Phase.BACKWARD:
            return None
        tick = self._backward[edge.child].of(event.sample)
        return Stamp(tick, event.sample, self._steps(event.sample))

    def error(self, event: Event) -> Stamp | None:
        """Return the stamp of the first readout's error that a block reads in `event`."""
        if event.phase is not Phase.BACKWARD:
            return None
        tick = self._forward[self._first_readout].of(event.sample)
        return Stamp(tick, event.sample, self._steps(event.sample))

    def target(self, readout: str, event: Event) -> Stamp | None:  # noqa: ARG002
        """Return the stamp of the sample's target, which comes whole with its first pulse."""
        if event.sample % self.parts or event.phase is Phase.STEP:
            return None
        return self.emitted(event.sample)

    def gradient(self, tie: Tie, event: Event) -> Stamp:
        """Return the stamp of the user's gradient for the owner's backward pass.

        Where both have theirs in the same tick, the owner comes last.
        """
        sent = self._backward[tie.user].of(event.sample)
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
            return self._backward[tie.user].most(self._backward[tie.owner])
        return 2 + max(0, -(-(self._depths[tie.owner] - self._depths[tie.user]) // self.c))

    def _late(self, block: str) -> int:
        """Return the most samples between a block's two passes of one."""
        times = self._backward[block]
        late = (i - times.before(tick) for i, tick in enumerate(self._forward[block].first))
        return self.sample_of(max(late))

    def delay(self, block: str) -> int:
        """Return the most steps of a block between its two passes of a sample."""
        return 1 if self.double_buffered else -(-self._late(block) // self.group)

    def in_flight(self, edge: Edge, kind: Kind) -> int:
        if kind is Kind.STATE:
            sent = self._emits if edge.from_input else self._forward[edge.parent]
            return sent.most(self._forward[edge.child])
        return self._backward[edge.child].most(self._backward[edge.parent])

    def errors_in_flight(self, block: str) -> int:
        """Return the most errors of the first readout that wait for `block`."""
        return self._forward[self._first_readout].most(self._backward[block])

    def target_in_flight(self, readout: str) -> int:
        return self._of_samples(self._emits).most(self._of_samples(self._forward[readout]))

    def bundle(self, edge: Edge, kind: Kind) -> Bundle:  # noqa: ARG002
        spacing = self.c if self.parts == 1 else SPACING  # between two pulses
        return ALONE if self._own_rounds else Bundle(max(1, edge.delay // spacing), spacing)

    @property
    def staleness(self) -> int:
        """Return the most samples between the two passes of one."""
        return max(self._late(b) for b in self._depths)

    def stored(self, block: str) -> int:
        """Return the samples (or micro-batches) whose activations a block keeps at a time:
        floor(d_l / c) + 1; with credit 'heads', and where no messages come, none beyond the tick in
        which they pass."""
        if not self.lag(block) and block not in self._readouts:
            return 0
        return self._forward[block].most(self._backward[block])
