"""The common parts of nodes: the channels of one block, functions for its start and end, and the
interface through which loop.py steps it.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from hamdist.config import MetricsSettings, RecordedState
from hamdist.dynamics.blocks.energy import Recorder, Records
from hamdist.dynamics.blocks.readout_loss import Reading
from hamdist.dynamics.graph.graph import BlockSpec, Edge
from hamdist.dynamics.objective.prequential import Prequential
from hamdist.dynamics.saved_state.stateful import Stateful
from hamdist.dynamics.schedule.events import Event, Stamp, emitted
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.autocast import AutocastFunction, Rounding
from hamdist.dynamics.vjp.gradient import norm_of
from hamdist.dynamics.vjp.local_function import LocalFunction
from hamdist.dynamics.vjp.wrapping import JoinedFunction, TiedFunction
from hamdist.errors import SnapshotError
from hamdist.runtime.nodes.emissions import LiveBlock
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.results.measured import Histogram, Norms
from hamdist.runtime.results.result import BlockState
from hamdist.runtime.signals.cast import CastBorder, host_copy
from hamdist.runtime.signals.signal import Channel, Signal, ready


class Ports:
    """The channels of one block in the graph's edge order, and the stamps the schedule names.

    Attributes:
        border: casts signals to the type and device of the block.
        into: edges from parents.
        out_of: edges to children.
    """

    def __init__(self, plan: Plan, name: str, mailbox: Mailbox) -> None:
        self.border = CastBorder(plan.cast_plans.get(name))
        self.into = plan.graph.into[name]
        self.out_of = plan.graph.out_of[name]
        self._channels = plan.channels
        self._schedule = plan.schedule
        self._name = name
        self._mailbox = mailbox
        self._children = [plan.channels.states[e.index] for e in self.out_of]
        self._parents = [plan.channels.messages.get(e.index) for e in self.into]
        self._label = plan.channels.labels.get(name)
        self._labelled = [c for c in plan.channels.labels.values() if c.sender == name]
        self._error = plan.channels.errors.get(name)
        self._to_rules = [c for c in plan.channels.errors.values() if c.sender == name]

    def state(self, edge: Edge, event: Event) -> Signal | None:
        """Take the parent's state that `event` needs along `edge`; None if it needs none."""
        signal = self._take(
            self._channels.states[edge.index], self._schedule.state(edge, event), event
        )
        if signal is not None and signal.payload is not None:
            signal.payload = self.border.state(edge.index, signal.payload)
        return signal

    def message(self, edge: Edge, event: Event) -> Signal | None:
        """Take the child's message that `event` needs along `edge`; None if it needs none."""
        channel = self._channels.messages.get(edge.index)
        if channel is None:
            return None
        signal = self._take(channel, self._schedule.message(edge, event), event)
        if signal is not None and signal.payload is not None:
            signal.payload = self.border.message(signal.payload)
        return signal

    def messages(self, event: Event) -> list[Tensor | None]:
        """Take what comes back for `event`: the children's messages, or the readout's error."""
        if self._error is None or not isinstance(self._schedule, PulseSchedule):
            signals = [self.message(edge, event) for edge in self.out_of]
            return [None if signal is None else signal.payload for signal in signals]
        error = self._take(self._error, self._schedule.error(event), event)
        if error is None or error.payload is None:
            return [None]
        return [self.border.message(error.payload)]

    def error_to_blocks(self, stamp: Stamp, error: Tensor | None) -> None:
        """Send a readout's error to the blocks whose rules ask for it."""
        for channel in self._to_rules:
            self._mailbox.post(channel, Signal(stamp, None if error is None else ready(error)))

    def target(self, event: Event) -> Signal | None:
        """Take the target that a readout needs at `event`; None if it needs none."""
        stamp = self._schedule.target(self._name, event)
        signal = self._take(self._channels.targets[self._name], stamp, event)
        if signal is not None and signal.payload is not None:
            signal.payload = self.border.target(signal.payload)
        return signal

    def label(self, event: Event) -> Signal | None:
        """Take the label that travels with the sample of `event`, if it does, to be passed on."""
        if self._label is None:
            return None
        return self._take(self._label, self._schedule.state(self.into[0], event), event)

    def labels_to_children(self, stamp: Stamp, label: Tensor | None, *, end: bool = False) -> None:
        """Pass a label on to the children that take it from this block."""
        for channel in self._labelled:
            self._mailbox.post(channel, Signal(stamp, label, end))

    def clock(self, event: Event) -> Signal | None:
        """Take the stream's clock signal about a sample, in its first tick, if the run has them."""
        channel = self._channels.clocks.get(self._name)
        if channel is None:
            return None
        if not isinstance(self._schedule, HoldSchedule):
            return self._take(channel, self._schedule.target(self._name, event), event)
        if event.tick % self._schedule.c:
            return None
        return self._take(channel, emitted(event.sample, self._schedule.c), event)

    def _take(self, channel: Channel, stamp: Stamp | None, event: Event) -> Signal | None:
        return None if stamp is None else self._mailbox.take(channel, stamp, event.tick)

    def to_children(
        self,
        stamp: Stamp,
        h: Tensor | None,
        *,
        end: bool = False,
        sequence_end: bool = False,
        leaving_out: Sequence[Edge] = (),
    ) -> None:
        """Post a state h (B, ...) to the children, but to those of the edges in `leaving_out`.

        end: the stream has ended; sequence_end: the sample is the last of its sequence.
        """
        for edge, channel in zip(self.out_of, self._children, strict=True):
            if edge not in leaving_out:
                self._mailbox.post(channel, Signal(stamp, h, end, sequence_end))

    def before_start(self, h: Tensor | None, schedule: HoldSchedule) -> None:
        """Post what the neighbours read in their first ticks: h_0, and zero messages."""
        c = schedule.c
        for edge, channel in zip(self.out_of, self._children, strict=True):
            for tick in schedule.before_start(edge):
                self._mailbox.post(channel, Signal(Stamp(tick, tick // c, 0), h))
        for edge, parent in zip(self.into, self._parents, strict=True):
            for tick in range(-edge.delay, 0):
                if parent is not None:
                    self._mailbox.post(parent, Signal(Stamp(tick, tick // c, 0)))

    def to_parents(
        self,
        stamp: Stamp,
        messages: Sequence[Tensor | None],
        *,
        end: bool = False,
        leaving_out: Sequence[Edge] = (),
    ) -> None:
        """Post a message along each edge of `into` but those whose parent reads no more.

        None is a message of zeros; end: the stream has ended.
        """
        for edge, channel, message in zip(self.into, self._parents, messages, strict=True):
            if channel is not None and edge not in leaving_out:
                payload = None if message is None else ready(message)
                self._mailbox.post(channel, Signal(stamp, payload, end))


def events_from(schedule: PulseSchedule | HoldSchedule, name: str, event: Event) -> Iterator[Event]:
    """Return the events of a block after `event`. Raises SnapshotError if it is none of them."""
    events = schedule.events(name, event.tick)
    for earlier in events:
        if earlier == event:
            break
        if earlier.tick > event.tick:
            raise SnapshotError(f"block {name!r} has no event {tuple(event[:3])} in this schedule")
    return events


def make_metrics(plan: Plan) -> Prequential:
    """Make the collector of a readout's losses."""
    settings = plan.metrics
    ignored, rolls = plan.ignore_index, plan.spec.live
    return Prequential(settings.window, settings.limit, ignore_index=ignored, rolls=rolls)


def make_recorder(settings: MetricsSettings) -> Recorder | None:
    """Make the recorder of a block's energies; None if recording is off."""
    if settings.record is None:
        return None
    trajectory = settings.record is RecordedState.TRAJECTORY
    return Recorder(settings.record_every, trajectory=trajectory)


def record(metrics: Prequential, sample: int, reading: Reading | None) -> None:
    """Record the loss of a sample, if there is one."""
    if reading is not None:
        metrics.record(sample, reading.prediction, reading.target, reading.loss)


BINS = 64  # of a histogram


class BlockContents(NamedTuple):
    """The tensors of a block, as they lie in it.

    Attributes:
        parts: name prefix, local function and weights of each part of the block.
        h: the state, if the block holds one.
        z: the adjoint state, if the block holds one.
    """

    parts: Sequence[tuple[str, LocalFunction, Weights | None]]
    h: Tensor | None
    z: Tensor | None

    def norms(self) -> Norms:
        """Return the Euclidean norms of the state, the costates and the weights; dead units."""
        h, z = (None if t is None else float(torch.linalg.vector_norm(t)) for t in self[1:])
        weights = [w for _, _, w in self.parts if w is not None]
        theta = norm_of([t.detach() for w in weights for t in w.theta])
        omega = math.hypot(*(w.omega_norm() for w in weights))
        dead = None if self.h is None else float((self.h == 0).all(0).float().mean())
        return Norms(h, z, omega, theta, dead=dead)

    def histograms(self) -> dict[str, Histogram]:
        """Return the histograms of the weights, their costates, the state and its costate."""
        # (copies: to read omega makes it dense, and what comes later would have other bits)
        weights = [copy.copy(w) for _, _, w in self.parts if w is not None]
        tensors: dict[str, list[Tensor | None]] = {
            "theta": [t for w in weights for t in w.theta],
            "omega": [t for w in weights for t in w.omega],
            "h": [self.h],
            "z": [self.z],
        }
        by_kind = {kind: [t for t in values if t is not None] for kind, values in tensors.items()}
        return {kind: histogram_of(values) for kind, values in by_kind.items() if values}


def histogram_of(tensors: Sequence[Tensor]) -> Histogram:
    """Return the histogram of all finite numbers of tensors together."""
    flat = torch.cat([t.detach().float().flatten() for t in tensors])
    flat = flat[flat.isfinite()]
    low, high = (float(flat.min()), float(flat.max())) if len(flat) else (0.0, 0.0)
    high = high if high > low else low + 1.0
    return Histogram(low, high, [int(n) for n in torch.histc(flat, BINS, low, high)])


def block_state(contents: BlockContents, stored: int = 0) -> BlockState:
    """Copy the state of a block, which stores that of `stored` earlier samples, to the host."""
    parts, h, z = contents
    theta: dict[str, Tensor] = {}
    omega: dict[str, Tensor] = {}
    average: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for prefix, cell, weights in parts:
        moving = [] if weights is None else weights.omega
        for name, costate in zip(cell.names, moving, strict=False):
            omega[prefix + name] = host_copy(costate)
        if weights is not None and weights.average is not None:
            for name, value in zip(cell.names, weights.average.values, strict=True):
                average[prefix + name] = host_copy(value)
        parameters = dict(cell.module.named_parameters())
        state = {**dict(cell.module.named_buffers()), **cell.module.state_dict()}
        for name, value in state.items():
            if name in cell.foreign:
                continue
            copied = host_copy(value) if isinstance(value, Tensor) else copy.deepcopy(value)
            (theta if name in parameters else buffers)[prefix + name] = copied
    first = parts[0][2]
    return BlockState(
        theta=theta,
        omega=omega,
        average=average,
        buffers=buffers,
        h=None if h is None else host_copy(h),
        z=None if z is None else host_copy(z),
        updates=0 if first is None else first.updates,
        stored=stored,
        rounding=next((r for _, cell, _ in parts if (r := _rounding(cell)) is not None), None),
    )


def _rounding(cell: LocalFunction) -> Rounding | None:
    inner = cell
    while isinstance(inner, (JoinedFunction, TiedFunction)):
        inner = inner.inner
    return inner.rounding if isinstance(inner, AutocastFunction) else None


# -- nodes -----------------------------------------------------------------------------------------


class Node(Protocol):
    """The interface through which loop.py steps a block or the stream.

    Attributes:
        tick: the tick of the next event; None when the node has finished.
        late: True if the node comes after the others of the same tick.
    """

    name: str
    late: bool
    tick: int | None

    def start(self) -> None:
        """Post what neighbours read before the first tick."""

    def step(self) -> None:
        """Do the next event."""


class BlockNode(Stateful, ABC):
    """The node of a block.

    Attributes:
        metrics: of a readout.
        seconds: time spent in the block's own steps.
        live: what the stream tells of its emissions.
    """

    late = False
    ADDED: ClassVar[Mapping[str, Any]] = {"live": None}

    def __init__(self, plan: Plan, spec: BlockSpec, mailbox: Mailbox) -> None:
        self.name = spec.name
        self.metrics = None if spec.loss is None else make_metrics(plan)
        self.seconds = 0.0
        self.live = LiveBlock(spec.name, plan.spec.patience)
        self._ports = Ports(plan, spec.name, mailbox)

    @property
    def device(self) -> torch.device:
        """Return the device on which the block computes."""
        return self._ports.border.device

    def records(self) -> Records | None:
        """Return the recorded energies; None if recording is off, or there are none at one time."""
        return None

    @abstractmethod
    def contents(self) -> BlockContents:
        """Return the tensors of the block, as they lie in it."""

    def state(self) -> BlockState:
        """Return a copy of the block's state in host memory."""
        return block_state(self.contents())
