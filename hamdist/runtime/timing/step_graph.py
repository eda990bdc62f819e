"""The steps of one period of a schedule, and the signals between them.

The schedule that the nodes follow is unrolled for one period (c ticks: one sample; in presentation
'sequence' one sequence), late enough that every signal has a sender. A signal that a step takes in
period p left its sender in period p - `periods`. This is a marked graph (Commoner et al. 1971): the
periods are the tokens that lie on an arc at the start.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.schedule.events import Event, Kind, Phase, Stamp, emitted
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.dynamics.schedule.sequence import SequenceSchedule
from hamdist.errors import SettingsError
from hamdist.runtime.plan.microbatches import lie_apart
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.signal import Channel

TOKENS = 4  # of a sequence, where the stream does not tell
MOST_STEPS = 1_000_000
_BACK = (Kind.MESSAGE, Kind.GRADIENT, Kind.WEIGHT, Kind.NORM)  # sent by backward passes and steps


@dataclass(frozen=True, slots=True)
class Step:
    """An event of a node within the period; `tick` counts from the period's start."""

    node: str
    phase: Phase
    tick: int


@dataclass(frozen=True, slots=True)
class SignalArc:
    """A signal from a step to another.

    Attributes:
        source, target: places of the steps in `StepGraph.steps`.
        periods: from sending to taking.
        channel: that it crosses.
    """

    source: int
    target: int
    periods: int
    channel: Channel


@dataclass(frozen=True)
class StepGraph:
    """The steps of one period, in the order in which one process would do them.

    Attributes:
        steps: of all nodes.
        arcs: signals between the steps.
        ticks: of a period.
        samples: that enter the network in a period.
    """

    steps: tuple[Step, ...]
    arcs: tuple[SignalArc, ...]
    ticks: int
    samples: int


def step_graph(plan: Plan, tokens: int = TOKENS) -> StepGraph:
    """Unroll one period of the plan's schedule; `tokens`: of a sequence.

    Raises SettingsError if a period has more than MOST_STEPS steps.
    """
    return _Unrolled(plan, tokens).graph()


class _Unrolled:
    """The events of one period that begins at tick `start`."""

    def __init__(self, plan: Plan, tokens: int) -> None:
        self._plan = plan
        self._schedule = plan.schedule
        placed = plan.engine.placement or ()
        self._apart = plan.engine.interleave > 1 or any(
            lie_apart(plan.graph, plan.knobs, group) for group in placed
        )
        self._nodes = [INPUT, *plan.graph.blocks]
        if isinstance(self._schedule, SequenceSchedule):
            opening = self._schedule.opening()
            for _ in range(2):  # (what a sequence reads of the one before exists)
                opening = self._schedule.following(opening._replace(length=tokens))
            self._span = opening._replace(length=tokens)
            self.start = opening.start - 1
            self.ticks = self._schedule.following(self._span).start - opening.start
            self.samples = tokens
        else:
            self.ticks, self.samples = self._schedule.round
            if self.ticks * len(self._nodes) > MOST_STEPS and plan.knobs.hold:
                raise SettingsError(
                    f"locality.speed: a sample makes {self.ticks:,} ticks of {len(self._nodes):,} "
                    "blocks, too many steps to simulate; use a lower speed, or fewer blocks"
                )
            reach = 4 * plan.graph.depth + max(e.delay for e in plan.graph.edges) + 4
            self.start = self.ticks * (4 + 4 * reach // self.ticks)
        events = [
            (event.tick, node != INPUT and self._late(node), self._lag(node, event), i, event)
            for i, node in enumerate(self._nodes)
            for event in self._events(node)
        ]
        events.sort(key=lambda entry: entry[:4])
        self._rows = [(self._nodes[i], event) for *_, i, event in events]
        self._ticks: dict[tuple[str, bool], list[int]] = {}
        self._places: dict[tuple[str, bool], list[int]] = {}
        for place, (node, event) in enumerate(self._rows):
            for back in self._sends(event.phase):
                self._ticks.setdefault((node, back), []).append(event.tick - self.start)
                self._places.setdefault((node, back), []).append(place)

    def _lag(self, node: str, event: Event) -> int:
        """Return what comes before the order of the blocks at a tick (nodes/loop.py)."""
        back = self._apart and event.phase is Phase.BACKWARD
        return self._schedule.lag(node) if back else 0  # type: ignore[union-attr]

    def _late(self, block: str) -> bool:
        late = getattr(self._schedule, "late", None)
        return late is not None and late(block)

    @staticmethod
    def _sends(phase: Phase) -> tuple[bool, ...]:
        """Return which signals a phase sends: states and the like (False), messages (True)."""
        if phase in (Phase.EMIT, Phase.FORWARD):
            return (False,)
        return (True,) if phase in (Phase.BACKWARD, Phase.STEP) else (False, True)

    def _events(self, node: str) -> Iterator[Event]:
        schedule, end = self._schedule, self.start + self.ticks
        if isinstance(schedule, SequenceSchedule):
            span, tokens = self._span, range(self.samples)
            if node == INPUT:
                return (schedule.emission(span, m) for m in tokens)
            forward = [schedule.forward(node, span, m) for m in tokens]
            return iter(
                [
                    *forward,
                    *(schedule.backward(node, span, j) for j in range(schedule.reversed(span))),
                ]
            )
        if node == INPUT:
            first = self.start // self.ticks * self.samples
            parts = schedule.parts if isinstance(schedule, PulseSchedule) else 1
            source: Iterator[Event] = schedule.emissions(first * parts)
        else:
            source = schedule.events(node, self.start)
        inside = takewhile(lambda event: event.tick < end + self.ticks, source)
        return (event for event in inside if self.start <= event.tick < end)

    def graph(self) -> StepGraph:
        steps = tuple(
            Step(node, event.phase, event.tick - self.start) for node, event in self._rows
        )
        arcs = tuple(
            self._arc(place, channel, stamp)
            for place, (node, event) in enumerate(self._rows)
            if node != INPUT
            for channel, stamp in self._takes(node, event)
        )
        return StepGraph(steps, arcs, self.ticks, self.samples)

    def _takes(self, block: str, event: Event) -> Iterator[tuple[Channel, Stamp]]:
        """Yield the signals that `event` takes, as the nodes do (node.py, weight_ports.py)."""
        plan, schedule = self._plan, self._schedule
        channels, graph = plan.channels, plan.graph
        for i, edge in enumerate(graph.into[block]):
            stamp = schedule.state(edge, event)
            if stamp is not None:
                yield channels.states[edge.index], stamp
                if i == 0 and block in channels.labels:
                    yield channels.labels[block], stamp
        for edge in graph.out_of[block]:
            stamp = schedule.message(edge, event) if edge.index in channels.messages else None
            if stamp is not None:
                yield channels.messages[edge.index], stamp
        if block in channels.targets and event.phase is not Phase.BACKWARD:
            stamp = schedule.target(block, event)
            if stamp is not None:
                yield channels.targets[block], stamp
        if block in channels.clocks and isinstance(schedule, HoldSchedule):
            if event.tick % schedule.c == 0:
                yield channels.clocks[block], emitted(event.sample, schedule.c)
        elif block in channels.clocks and event.phase is not Phase.BACKWARD:
            stamp = schedule.target(block, event)  # (of a live run, with a sample's first pulse)
            if stamp is not None:
                yield channels.clocks[block], stamp
        if isinstance(schedule, PulseSchedule):
            if event.phase is Phase.STEP and block in channels.norms:
                yield channels.norms[block], schedule.norm(event)
            elif event.phase is Phase.STEP:
                for other, channel in channels.squares.items():
                    yield channel, schedule.square(other, event)
            for tie in graph.ties:
                if tie.owner == block and event.phase in (Phase.BACKWARD, Phase.READ):
                    yield channels.gradients[tie.index], schedule.gradient(tie, event)
                weights = schedule.weight(tie, event) if tie.user == block else None
                if weights is not None and event.phase in (Phase.FORWARD, Phase.READ):
                    yield channels.weights[tie.index], weights

    def _arc(self, target: int, channel: Channel, stamp: Stamp) -> SignalArc:
        """Return the arc of a signal. It leaves with the last one of its bundle.

        Bundles of micro-batches end with their sample (the next one waits for them): they are taken
        for none.
        """
        back = channel.kind in _BACK
        in_parts = isinstance(self._schedule, PulseSchedule) and self._schedule.parts > 1
        span = 0 if in_parts else channel.span
        ticks = self._ticks[channel.sender, back]
        ago, tick = divmod(stamp.tick + span - self.start, self.ticks)
        at = bisect_left(ticks, tick)
        if at == len(ticks):  # (a bundle that is not full leaves in the sender's next tick)
            ago, at = ago + 1, 0
        return SignalArc(self._places[channel.sender, back][at], target, -ago, channel)
