"""The node of a block that pulses pass."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from time import perf_counter
from typing import Any

from torch import Tensor

from hamdist.dynamics.blocks.block import SavesPasses
from hamdist.dynamics.blocks.heads import HeadBlock
from hamdist.dynamics.blocks.pulse import KeepingReadout, PulseBlock, PulseReadout, ReversibleBlock
from hamdist.dynamics.blocks.readout_loss import Reading
from hamdist.dynamics.blocks.rule_block import RuleBlock
from hamdist.dynamics.graph.graph import BlockSpec
from hamdist.dynamics.schedule.events import Event, Phase, Stamp
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.dynamics.vjp.wrapping import TiedFunction
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.node import BlockContents, BlockNode, events_from, record
from hamdist.runtime.nodes.weight_ports import NormPorts, TiePorts
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.signal import ready
from hamdist.streams.sample import Emission, Emits


class PulseNode(BlockNode):
    """A block that pulses pass."""

    def __init__(
        self,
        plan: Plan,
        spec: BlockSpec,
        mailbox: Mailbox,
        block: PulseBlock | ReversibleBlock | HeadBlock | RuleBlock | PulseReadout,
    ) -> None:
        if not isinstance(plan.schedule, PulseSchedule):
            raise TypeError("a PulseNode needs a PulseSchedule")
        super().__init__(plan, spec, mailbox)
        self.block = block
        self.staleness: dict[int, int] = {}  # samples that came back after so many updates
        self._versions: dict[int, int] = {}  # of the weights, by sample under way
        self._ties = TiePorts(plan, spec.name, mailbox, block.cell)
        self._norms = NormPorts(plan, spec.name, mailbox)
        self._schedule = plan.schedule
        self._events = plan.schedule.events(spec.name)
        self._keeps, self._answers = plan.spec.kept, plan.spec.live
        # Messages leave first, then weights move (loop.py). Shared weights are sent themselves.
        block.defers = not isinstance(block.cell, TiedFunction)
        self._end: int | None = None
        self._sequence_end = False  # of the latest sample
        self.event = next(self._events)
        self.tick: int | None = self.event.tick

    STATE = ("block", "metrics", "seconds", "_end", "event", "tick", "live")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(
            {name: v for name, v in state.items() if name != "_asked"}
        )  # (of 0.1)
        self._events = events_from(self._schedule, self.name, self.event)

    def start(self) -> None:
        """Do nothing: no signal is under way before the first sample."""

    def step(self) -> None:
        """Do the phase of the present event, and move to the next one."""
        self.take_step()
        phase = self.event.phase
        if phase is Phase.READ:
            self._read(self.event)
        elif phase is Phase.FORWARD:
            self._forward(self.event)
        elif phase is Phase.STEP:
            self._step(self.event)
        else:
            self._backward(self.event)
        self._advance()

    @property
    def lag(self) -> int:
        """Return the ticks since the forward pass if the next event is a backward one, else 0."""
        return self._schedule.lag(self.name) if self.event.phase is Phase.BACKWARD else 0

    @property
    def deferred(self) -> bool:
        """Return True if the weights have still to move by messages that were read."""
        return self.block.deferred

    def take_step(self) -> None:
        """Make the step of the weights that waits, if there is one."""
        if self.block.deferred:
            begin = perf_counter()
            self.block.take_step()
            self.seconds += perf_counter() - begin

    def _step(self, event: Event) -> None:
        """Make the step that waits, by the norm of the gradient of all blocks."""
        stamp = Stamp(event.tick, event.sample, self.block.weights.updates)
        share = self._norms.share(event, self.block.square())
        begin = perf_counter()
        self.block.step(share)
        self.seconds += perf_counter() - begin
        self._ties.after_step(stamp, self.block.weights.updates, self._end)

    def _after_pass(self, stamp: Stamp) -> None:
        """Send what else follows from a message that has come."""
        self._ties.after_backward(stamp)
        if not self._norms.clips:
            self._ties.after_step(stamp, self.block.weights.updates, self._end)
        elif self.block.moves(stamp.sample):
            self._norms.send(stamp, self.block.square())

    def _advance(self) -> None:
        if self._end is None:
            event: Event | None = next(self._events)
        else:
            event = self._schedule.after_end(self.name, self.event, self._end)
        self.event, self.tick = event or self.event, event and event.tick

    def _inputs(self, event: Event) -> list[Tensor] | None:
        """Return the parents' states about the event's sample; None if the stream has ended."""
        inputs = []
        for edge in self._ports.into:
            signal = self._ports.state(edge, event)
            if signal is None or signal.end:
                self._end = event.sample
                continue
            self._sequence_end = signal.sequence_end
            if signal.payload is not None:
                inputs.append(signal.payload)
        return inputs if self._end is None else None  # (none: an empty micro-batch)

    def _forward(self, event: Event) -> None:
        buffers, version = self.block.buffers, self.block.weights.updates
        if buffers is not None:
            version = buffers.version(event.sample)
        stamp = Stamp(event.tick, event.sample, version)
        inputs = self._inputs(event)
        label = self._ports.label(event)
        if inputs is None:
            self._ports.to_children(stamp, None, end=True)
            self._ports.labels_to_children(stamp, None, end=True)
        elif not isinstance(self.block, PulseReadout):
            self.live.receive(event.sample, partial(self._ports.clock, event), self.state)
            number = self.live.number(event.sample)
            self._ties.before_forward(event)
            begin = perf_counter()
            h = self.block.forward(number, inputs) if inputs else None
            self.seconds += perf_counter() - begin
            state = None if h is None else ready(h)
            self._ports.to_children(stamp, state, sequence_end=self._sequence_end)
            if label is not None:
                self._ports.labels_to_children(stamp, label.payload)
            if h is not None:
                self._learn(number, None if label is None else label.payload)
            if self._sequence_end and isinstance(self.block, RuleBlock):
                self.block.end_sequence()
            if not self._schedule.lag(self.name):
                self._rests(event)
                self.live.forget(event.sample - self._schedule.parts)
            else:
                self._versions[event.sample] = version

    def _learn(self, sample: int, label: Tensor | None) -> None:
        """Let the block's local readout or its rule learn, if it has one."""
        if isinstance(self.block, (HeadBlock, PulseBlock, RuleBlock)):
            begin = perf_counter()
            self.block.learn(sample, None if label is None else self._ports.border.target(label))
            self.seconds += perf_counter() - begin

    def _backward(self, event: Event) -> None:
        if isinstance(self.block, (PulseReadout, HeadBlock)):
            return
        stamp = Stamp(event.tick, event.sample, self.block.weights.updates)
        messages = self._ports.messages(event)
        self._ties.before_backward(event)
        begin = perf_counter()
        to_parents: list[Tensor | None] = [None] * len(self._ports.into)
        if not self._rests(event):
            number = self.live.number(event.sample)
            self._recall(event, number)
            to_parents = self.block.backward(number, messages)
        self.seconds += perf_counter() - begin
        version = self._versions.pop(event.sample, None)
        if version is not None and not (event.sample + 1) % self._schedule.parts:
            late = stamp.version - version
            self.staleness[late] = self.staleness.get(late, 0) + 1
        self._ports.to_parents(stamp, to_parents)
        self._after_pass(stamp)
        self.live.forget(event.sample)

    def _recall(self, event: Event, number: int) -> None:
        """Keep the record of a sample whose label is to come, or recall it when that has come."""
        emission = self.live.of(event.sample) if self._keeps else None
        if emission is None or not isinstance(self.block, SavesPasses):
            return
        if emission.kind is Emits.AGAIN:
            self.block.recall(number, emission.number)
            if not isinstance(self.block, KeepingReadout):
                self.live.earlier_prediction(emission)
        elif emission.waits and not isinstance(self.block, KeepingReadout):
            self.block.keep(number, emission.number, self.live.ask(emission, None))

    def _rests(self, event: Event) -> bool:
        """Return True, with the update counted, if the event is of an idle emission."""
        idle = self.live.idle(event.sample)
        if idle and event.sample % self._schedule.parts == self._schedule.parts - 1:
            self.block.weights.rest()
        return idle

    def _read(self, event: Event) -> None:
        if not isinstance(self.block, PulseReadout) or self.metrics is None:
            return
        n = event.sample
        stamp = Stamp(event.tick, n, self.block.weights.updates)
        inputs = self._inputs(event)
        if inputs is None:
            return
        target = self._ports.target(event)
        label = None if target is None else target.payload
        emission = self.live.receive(event.sample, partial(self._ports.clock, event), self.state)
        self._ties.before_forward(event)
        self._ties.before_backward(event)
        begin = perf_counter()
        messages: list[Tensor | None] = [None] * len(self._ports.into)
        reading: Reading | None = None
        if not self._rests(event):
            number = self.live.number(event.sample)
            self._recall(event, number)
            messages, reading = self.block.read(number, inputs, label)
        self.seconds += perf_counter() - begin
        self._ports.to_parents(stamp, messages)
        self._ports.error_to_blocks(stamp, self.block.take_error())
        self._after_pass(stamp)
        sample, part = divmod(n, self._schedule.parts)
        if part < self._schedule.parts - 1:
            return
        if emission is not None:
            sample = emission.number
            reading = self._answer(self.block, emission, reading, stamp.version, event)
        record(self.metrics, sample, reading)

    def _answer(
        self,
        block: PulseReadout,
        emission: Emission,
        reading: Reading | None,
        version: int,
        event: Event,
    ) -> Reading | None:
        """Answer a sample that has come; score its answer of then when its label has come."""
        y, let_go = block.prediction, None
        waits = emission.waits and emission.kind is Emits.SAMPLE
        if emission.kind is Emits.SAMPLE and y is not None:
            if self._answers:
                self.live.answer(emission, y, version, event)
            let_go = self.live.ask(emission, y) if waits else None
        if isinstance(block, KeepingReadout):
            sample = emission.number if waits else None
            block.keep(self.live.number(event.sample), sample, let_go)
        earlier = self.live.earlier_prediction(emission) if emission.kind is Emits.AGAIN else None
        self.live.forget(event.sample)
        if emission.kind is not Emits.AGAIN:
            return reading
        return None if earlier is None or reading is None else block.scored(earlier, reading)

    def contents(self) -> BlockContents:
        block = self.block
        h, z = (None, None) if isinstance(block, PulseReadout) else (block.h, block.z)
        return BlockContents([("", block.cell, block.weights)], h, z)
