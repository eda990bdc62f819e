"""A block that pulses pass, as a node."""

from __future__ import annotations

from torch import Tensor

from hamdist.dynamics.block import PulseBlock, PulseReadout
from hamdist.dynamics.graph import BlockSpec
from hamdist.dynamics.metrics import Prequential
from hamdist.dynamics.schedule import Event, Phase, PulseSchedule, Stamp
from hamdist.runtime.mail import Mailroom
from hamdist.runtime.plan import Plan
from hamdist.runtime.ports import Ports, block_state, record
from hamdist.runtime.result import BlockState
from hamdist.runtime.signal import ready


class PulseNode:
    """A block that pulses pass."""

    def __init__(
        self, plan: Plan, spec: BlockSpec, mail: Mailroom, block: PulseBlock | PulseReadout
    ) -> None:
        if not isinstance(plan.schedule, PulseSchedule):
            raise TypeError("a PulseNode needs a PulseSchedule")
        self.name = spec.name
        self.block = block
        self.metrics = Prequential(plan.window) if isinstance(block, PulseReadout) else None
        self._ports = Ports(plan, spec.name, mail)
        self._events = plan.schedule.events(spec.name)
        self._end: int | None = None
        self.event = next(self._events)
        self.tick: int | None = self.event.tick

    def start(self) -> None:
        """Nothing is under way before the first sample."""

    def step(self) -> None:
        phase = self.event.phase
        if phase is Phase.READ:
            self._read(self.event)
        elif phase is Phase.FORWARD:
            self._forward(self.event)
        else:
            self._backward(self.event)
        self._advance()

    def _advance(self) -> None:
        for event in self._events:
            if self._end is None or event.sample < self._end:
                self.event = event
                self.tick = event.tick
                return
            if event.phase is not Phase.FORWARD:
                self.tick = None
                return

    def _inputs(self, event: Event) -> list[Tensor] | None:
        """The parents' states about the event's sample; None where the stream has ended."""
        inputs = []
        for edge in self._ports.into:
            signal = self._ports.state(edge, event)
            if signal is None or signal.end:
                self._end = event.sample
                continue
            if signal.payload is not None:
                inputs.append(signal.payload)
        return inputs if self._end is None else None

    def _forward(self, event: Event) -> None:
        stamp = Stamp(event.tick, event.sample, self.block.weights.updates)
        inputs = self._inputs(event)
        if inputs is None:
            self._ports.to_children(stamp, None, end=True)
        elif isinstance(self.block, PulseBlock):
            self._ports.to_children(stamp, ready(self.block.forward(event.sample, inputs)))

    def _backward(self, event: Event) -> None:
        if not isinstance(self.block, PulseBlock):
            return
        stamp = Stamp(event.tick, event.sample, self.block.weights.updates)
        signals = [self._ports.message(edge, event) for edge in self._ports.out_of]
        messages = [None if s is None else s.payload for s in signals]
        self._ports.to_parents(stamp, self.block.backward(event.sample, messages))

    def _read(self, event: Event) -> None:
        if not isinstance(self.block, PulseReadout) or self.metrics is None:
            return
        stamp = Stamp(event.tick, event.sample, self.block.weights.updates)
        inputs = self._inputs(event)
        if inputs is None:
            return
        target = self._ports.target(event)
        given = None if target is None else target.payload
        messages, reading = self.block.read(event.sample, inputs, given)
        self._ports.to_parents(stamp, messages)
        record(self.metrics, event.sample, reading)

    def state(self) -> BlockState:
        held = (self.block.h, self.block.z) if isinstance(self.block, PulseBlock) else (None, None)
        return block_state([("", self.block.cell, self.block.weights)], *held)
