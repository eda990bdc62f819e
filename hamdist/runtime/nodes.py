"""Nodes: a block (or the stream) together with its schedule and its channels.

A node does one event at a time: it takes the signals that the schedule names, has the block do the
phase, and posts what comes out. The nodes of a process are stepped in the order of their ticks
(loop.py); what a node needs at tick k was sent at an earlier tick, so this order never waits in a
circle.

The end of a stream travels as a signal, too. A pulse block then finishes the messages of the
samples that it has passed. A held block stops when the end has come along all its ways from the
input, and is shown the last states of parents that stopped before it; in a graph with cycles it
stops when the end comes first along any edge, in either direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event as Flag
from typing import Protocol

import torch
from torch import Tensor

from hamdist.config import Memory, Order
from hamdist.dynamics.block import HoldBlock, HoldReadout, PulseBlock, PulseReadout, Reading, Tick
from hamdist.dynamics.cell import Cell, block_seed
from hamdist.dynamics.graph import INPUT, OUTPUT_KEY, BlockSpec, Edge
from hamdist.dynamics.metrics import Prequential
from hamdist.dynamics.schedule import (
    Event,
    HoldSchedule,
    Phase,
    PulseSchedule,
    Stamp,
    emitted,
    source_events,
)
from hamdist.dynamics.weights import Weights
from hamdist.errors import StreamError
from hamdist.runtime.mail import Mailroom
from hamdist.runtime.plan import Plan
from hamdist.runtime.result import BlockState
from hamdist.runtime.signal import Channel, Signal, ready
from hamdist.streams.check import Checker
from hamdist.streams.sample import Sample, Stream
from hamdist.streams.smoothness import Smoothness


class Node(Protocol):
    """What loop.py steps. `tick`: of the next event, None when the node has finished."""

    name: str
    tick: int | None

    def start(self) -> None: ...

    def step(self) -> None: ...


class SourceNode:
    """The stream: draws, checks and sends one sample every c ticks."""

    name = INPUT

    def __init__(self, plan: Plan, stream: Stream, mail: Mailroom) -> None:
        self._plan = plan
        self._stream = stream
        self._mail = mail
        self._events = source_events(plan.schedule.c)
        self.event = next(self._events)
        self._inputs = [plan.channels.states[e.index] for e in plan.graph.out_of[INPUT]]
        self._targets = list(plan.channels.targets.values())
        self._check = Checker(plan.spec, equal_batches=not plan.knobs.pulse)
        self.smoothness = Smoothness()
        self.samples = 0
        self.stop = Flag()
        self.tick: int | None = self.event.tick
        self._drawn: Iterator[Sample] | None = None

    def start(self) -> None:
        self._drawn = iter(self._stream.samples())

    def step(self) -> None:
        stamp = emitted(self.event.sample, self._plan.schedule.c)
        sample = self._draw()
        if sample is None:
            for channel in (*self._inputs, *self._targets):
                self._mail.post(channel, Signal(stamp, end=True))
            self.tick = None
            return
        for channel in self._inputs:
            self._mail.post(channel, Signal(stamp, sample.u, sequence_end=sample.end))
        for channel in self._targets:
            self._mail.post(channel, Signal(stamp, sample.y, sequence_end=sample.end))
        self.samples += 1
        self.event = next(self._events)
        self.tick = self.event.tick

    def _draw(self) -> Sample | None:
        """The next sample, checked; None at the end of the stream, or when the run is stopped."""
        n, steps = self.event.sample, self._plan.steps
        if self._drawn is None or self.stop.is_set() or (steps is not None and n >= steps):
            return None
        try:
            sample = next(self._drawn, None)
        except StreamError:
            raise
        except Exception as error:
            raise StreamError(
                f"sample {n}: the stream raised {type(error).__name__}: {error}"
            ) from error
        if sample is None:
            return None
        sample = self._check.check(n, sample)
        self.smoothness.observe(sample.u)
        return sample


class _Ports:
    """The channels of one block, in the graph's edge order, and its stamps."""

    def __init__(self, plan: Plan, name: str, mail: Mailroom) -> None:
        self.into = plan.graph.into[name]
        self.out_of = plan.graph.out_of[name]
        self._channels = plan.channels
        self._schedule = plan.schedule
        self._name = name
        self._mail = mail
        self._children = [plan.channels.states[e.index] for e in self.out_of]
        self._parents = [plan.channels.messages.get(e.index) for e in self.into]

    def state(self, edge: Edge, event: Event) -> Signal | None:
        stamp = self._schedule.state(edge, event)
        return (
            None if stamp is None else self._take(self._channels.states[edge.index], stamp, event)
        )

    def message(self, edge: Edge, event: Event) -> Signal | None:
        stamp = self._schedule.message(edge, event)
        return (
            None if stamp is None else self._take(self._channels.messages[edge.index], stamp, event)
        )

    def target(self, event: Event) -> Signal | None:
        stamp = self._schedule.target(self._name, event)
        return (
            None if stamp is None else self._take(self._channels.targets[self._name], stamp, event)
        )

    def _take(self, channel: Channel, stamp: Stamp, event: Event) -> Signal:
        return self._mail.take(channel, stamp, event.tick)

    def to_children(self, stamp: Stamp, h: Tensor | None, *, end: bool = False) -> None:
        for channel in self._children:
            self._mail.post(channel, Signal(stamp, h, end))

    def before_start(self, h: Tensor | None, c: int) -> None:
        """What the neighbours read in their first ticks: h_0, and messages of zeros."""
        for edge, channel in zip(self.out_of, self._children, strict=True):
            for tick in range(-edge.delay, 0):
                self._mail.post(channel, Signal(Stamp(tick, tick // c, 0), h))
        for edge, parent in zip(self.into, self._parents, strict=True):
            for tick in range(-edge.delay, 0):
                if parent is not None:
                    self._mail.post(parent, Signal(Stamp(tick, tick // c, 0)))

    def to_parents(
        self,
        stamp: Stamp,
        messages: Sequence[Tensor | None],
        *,
        end: bool = False,
        leaving_out: Sequence[Edge] = (),
    ) -> None:
        """leaving_out: edges whose parent reads no more."""
        for edge, channel, message in zip(self.into, self._parents, messages, strict=True):
            if channel is not None and edge not in leaving_out:
                payload = None if message is None else ready(message)
                self._mail.post(channel, Signal(stamp, payload, end))


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
        self._ports = _Ports(plan, spec.name, mail)
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
        _record(self.metrics, event.sample, reading)

    def state(self) -> BlockState:
        held = (self.block.h, self.block.z) if isinstance(self.block, PulseBlock) else (None, None)
        return _block_state([("", self.block.cell, self.block.weights)], *held)


class HoldNode:
    """A block that steps in every tick."""

    def __init__(
        self, plan: Plan, spec: BlockSpec, mail: Mailroom, block: HoldBlock | HoldReadout
    ) -> None:
        if not isinstance(plan.schedule, HoldSchedule):
            raise TypeError("a HoldNode needs a HoldSchedule")
        self.name = spec.name
        self.block = block
        self.metrics = Prequential(plan.window) if spec.loss is not None else None
        self._schedule = plan.schedule
        self._ports = _Ports(plan, spec.name, mail)
        self._acyclic = plan.graph.acyclic
        self._ended: list[Edge] = []
        # What an edge shows until the first signal has come along it.
        shapes = {INPUT: (plan.spec.u_shape, plan.spec.u_dtype), **plan.shapes}
        self._shown = {
            e.index: torch.zeros(shapes[e.parent][0], dtype=shapes[e.parent][1])
            for e in self._ports.into
        }
        self._target: Tensor | None = None
        self._no_more_targets = False
        self._events = plan.schedule.events(spec.name)
        self.event = next(self._events)
        self.tick: int | None = self.event.tick

    def start(self) -> None:
        h = ready(self.block.h) if isinstance(self.block, HoldBlock) else None
        self._ports.before_start(h, self._schedule.c)

    def _stamp(self, tick: int, version: int) -> Stamp:
        return Stamp(tick, tick // self._schedule.c, version)

    def step(self) -> None:
        event = self.event
        inputs = [self._input(edge, event) for edge in self._ports.into]
        messages = [self._message(edge, event) for edge in self._ports.out_of]
        if self._has_ended():
            self._end(event, messages)
            return
        if self.metrics is not None and not self._no_more_targets:
            signal = self._ports.target(event)
            if signal is not None:
                self._target = signal.payload
                self._no_more_targets = signal.end
        self._do(event, inputs, messages)
        self.event = next(self._events)
        self.tick = self.event.tick

    def _input(self, edge: Edge, event: Event) -> Tensor:
        """What the edge shows: the state that came in this tick; the latest one where the input
        shows a sample for several ticks, or where the end has come."""
        signal = None if edge in self._ended else self._ports.state(edge, event)
        if signal is not None and signal.end:
            self._ended.append(edge)
        elif signal is not None and signal.payload is not None:
            self._shown[edge.index] = signal.payload
        return self._shown[edge.index]

    def _message(self, edge: Edge, event: Event) -> Tensor | None:
        signal = self._ports.message(edge, event)
        if signal is None:
            return None
        if signal.end:
            self._ended.append(edge)
        return signal.payload

    def _has_ended(self) -> bool:
        """In an acyclic graph the end has to come along every way, so that the last samples reach
        the readouts; around a cycle nobody would be the first, so there the first one counts."""
        if not self._acyclic:
            return bool(self._ended)
        return all(edge in self._ended for edge in self._ports.into)

    def _end(self, event: Event, messages: list[Tensor | None]) -> None:
        if isinstance(self.block, HoldBlock):
            self.block.complete(messages)
        stamp = self._stamp(event.tick, self._schedule.updates_before(event.tick))
        self._ports.to_children(stamp, None, end=True)
        if not self._acyclic:
            self._ports.to_parents(stamp, [None] * len(self._ports.into), end=True)
        self.tick = None

    def _do(self, event: Event, inputs: list[Tensor], messages: list[Tensor | None]) -> None:
        k, block = event.tick, self.block
        compares = self.metrics is not None and self._schedule.compares(self.name, k)
        tick = Tick(
            sample=event.sample,
            moves=self._schedule.moves(self.name, k),
            updates=self._schedule.updates(k),
            target=self._target if compares else None,
        )
        if isinstance(block, HoldBlock):
            block.complete(messages)
        stamp = self._stamp(k, block.weights.updates)
        to_parents, reading = block.tick(inputs, tick)
        if isinstance(block, HoldBlock):
            block.h = ready(block.h)
            self._ports.to_children(stamp, block.h)
        self._ports.to_parents(stamp, to_parents, leaving_out=self._ended)
        if self.metrics is not None:
            sample = self._schedule.records(self.name, k)
            if sample is not None:
                _record(self.metrics, sample, reading)

    def state(self) -> BlockState:
        block = self.block
        if isinstance(block, HoldReadout):
            return _block_state([("", block.cell, block.weights)], None, None)
        parts: list[tuple[str, Cell, Weights | None]] = [("", block.cell, block.weights)]
        if block.output is not None:
            parts.append((OUTPUT_KEY, block.output, block.output_weights))
        return _block_state(parts, block.h, block.z)


def _record(metrics: Prequential, sample: int, reading: Reading | None) -> None:
    if reading is not None:
        metrics.record(sample, reading.prediction, reading.target, reading.loss)


def _block_state(
    parts: Sequence[tuple[str, Cell, Weights | None]], h: Tensor | None, z: Tensor | None
) -> BlockState:
    theta: dict[str, Tensor] = {}
    omega: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for prefix, cell, weights in parts:
        moving = [] if weights is None else weights.omega
        for name, costate in zip(cell.names, moving, strict=False):
            omega[prefix + name] = costate.detach().clone()
        parameters = dict(cell.module.named_parameters())
        for name, tensor in cell.module.state_dict().items():
            (theta if name in parameters else buffers)[prefix + name] = tensor.detach().clone()
    first = parts[0][2]
    return BlockState(
        theta=theta,
        omega=omega,
        buffers=buffers,
        h=None if h is None else h.detach().clone(),
        z=None if z is None else z.detach().clone(),
        updates=0 if first is None else first.updates,
    )


def make_node(plan: Plan, name: str, mail: Mailroom) -> PulseNode | HoldNode:
    """The node of block `name`, with its own random generator."""
    spec = plan.graph.blocks[name]
    stash = plan.knobs.memory is Memory.TRACE_WEIGHTS
    cell = Cell(spec.module, spec.combine, block_seed(plan.seed, name), stash=stash)
    order: Order = plan.knobs.order
    weights = Weights(cell.theta, plan.dynamics, order)
    wanted = [not e.from_input for e in plan.graph.into[name]]

    def scale(sample: int) -> float:
        return plan.scale(name, sample)

    if plan.knobs.pulse:
        if spec.loss is not None:
            read = PulseReadout(cell, weights, wanted, plan.dynamics, scale, spec.loss)
            return PulseNode(plan, spec, mail, read)
        return PulseNode(plan, spec, mail, PulseBlock(cell, weights, wanted, plan.dynamics, scale))
    if spec.loss is not None and not spec.state:
        output_net = HoldReadout(cell, weights, wanted, plan.dynamics, scale, spec.loss)
        return HoldNode(plan, spec, mail, output_net)
    output = output_weights = None
    if spec.output is not None:
        output = Cell(spec.output, spec.combine, block_seed(plan.seed, f"{name}/{OUTPUT_KEY}"))
        output_weights = Weights(output.theta, plan.dynamics, order)
    shape, dtype = plan.shapes[name]
    h = torch.zeros(shape, dtype=dtype)
    return HoldNode(
        plan,
        spec,
        mail,
        HoldBlock(
            cell,
            weights,
            wanted,
            plan.dynamics,
            order,
            scale,
            h,
            loss=spec.loss,
            output=output,
            output_weights=output_weights,
        ),
    )
