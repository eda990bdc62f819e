"""Signals and the channels they cross (their form on the wire: packing.py).

The node that sends a signal stamps it (nodes/hold.py, pulse.py, sequence.py, source.py).

A channel is one direction of an edge (or the path of the targets from the stream to a readout): it
has one sender and one receiver, and its signals arrive in the order in which they were sent. A
signal is paired with its use by its stamp, which the receiver checks; never by the order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hamdist.dynamics.graph.graph import INPUT, Edge, Graph
from hamdist.dynamics.saved_state.stateful import registered
from hamdist.dynamics.schedule.events import ALONE, Bundle, Kind, Schedule, Stamp
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.runtime.signals.cast import to_host
from hamdist.runtime.signals.codec import Codec

ALIGNMENT = 64


class Channel(NamedTuple):
    """A direction between two nodes.

    Attributes:
        edge: name of the edge.
        capacity: signals that may wait on it.
        slack: how many of them are more than the schedule itself keeps in flight.
        bundle: signals that one message may hold.
        span: ticks from the first to the last signal of a full bundle.
        codec: of the payloads, if they are compressed.
    """

    number: int
    kind: Kind
    sender: str
    receiver: str
    edge: str
    capacity: int
    slack: int = 1
    bundle: int = 1
    span: int = 0
    codec: Codec | None = None

    @property
    def key(self) -> str:
        """Return the channel's name in a snapshot, which no number of the partition is in."""
        return f"{self.kind.name.lower()} {self.edge}"

    def __str__(self) -> str:
        return (
            f"{self.kind.name.lower()} on edge {self.edge} (from {self.sender} to {self.receiver})"
        )


class Channels(NamedTuple):
    """The channels of a graph.

    Attributes:
        states, messages: by edge index.
        targets: by readout; clocks: by block.
        labels: where labels travel with the signal, by the block that takes them; each passes them
            on along the first of its edges that leads to a child.
        gradients, weights: by tie.
        errors: of the first readout, by the block whose rule asks for them.
        squares, norms: of gradients to the block that adds them up, and back, by the other block
            (nodes/weight_ports.py).
    """

    states: dict[int, Channel]
    messages: dict[int, Channel]
    targets: dict[str, Channel]
    clocks: dict[str, Channel]
    labels: dict[str, Channel]
    gradients: dict[int, Channel]
    weights: dict[int, Channel]
    errors: dict[str, Channel]
    squares: dict[str, Channel]
    norms: dict[str, Channel]

    def all(self) -> list[Channel]:
        """Return the channels of all kinds."""
        return [channel for kind in self for channel in kind.values()]


def make_channels(
    graph: Graph,
    schedule: Schedule,
    queue: int,
    *,
    clocked: bool,
    bundle: int | Literal["auto", "off"] = "auto",
    labels: bool = False,
    messages: bool = True,
    silent: Collection[str] = (),
) -> Channels:
    """Make the channels of a graph, with room for the schedule's signals and `queue` more.

    A block whose rule asks for no messages (`BlockSpec.back`) neither gets nor sends any.

    Args:
        schedule: says how many signals are in flight.
        queue: signals that may wait beyond those.
        clocked: the stream sends every block the step of integration, and the end of a sequence; in
            a live run, what each of its emissions is.
        bundle: the most signals in one message; auto: half as many as the schedule allows, so that
            the other half of an edge's delay is left to hide the link.
        labels: labels travel with the signal to all blocks that are no readouts.
        messages: messages come back, but to `silent` blocks.
        silent: blocks that receive no messages.
    """
    channels = Channels(*({} for _ in Channels._fields))
    apart = {b.name for b in graph.blocks.values() if b.back != "message"}
    mute = apart - {*graph.readouts}
    numbers = count()

    def channel(
        kind: Kind, sender: str, receiver: str, edge: str, in_flight: int, most: Bundle = ALONE
    ) -> Channel:
        most_by_word = {"auto": (most.size + 1) // 2, "off": 1}
        size = min(most.size, most_by_word[bundle] if isinstance(bundle, str) else bundle)
        return Channel(
            number=next(numbers),
            kind=kind,
            sender=sender,
            receiver=receiver,
            edge=edge,
            capacity=in_flight + queue,
            slack=queue,
            bundle=size,
            span=(size - 1) * most.spacing,
        )

    def along(edge: Edge, kind: Kind, sender: str, receiver: str) -> Channel:
        room = schedule.in_flight(edge, kind), schedule.bundle(edge, kind)
        return channel(kind, sender, receiver, edge.name, *room)

    for edge in graph.edges:
        sender = INPUT if edge.from_input else edge.parent
        channels.states[edge.index] = along(edge, Kind.STATE, sender, edge.child)
        unread = edge.from_input or edge.parent in silent or edge.parent in apart
        if messages and not unread and edge.child not in mute:
            channels.messages[edge.index] = along(edge, Kind.MESSAGE, edge.child, edge.parent)
    for readout in graph.readouts:
        waiting = schedule.target_in_flight(readout)
        name = f"{INPUT}=>{readout}"
        channels.targets[readout] = channel(Kind.TARGET, INPUT, readout, name, waiting)
    for block in graph.blocks if labels else ():
        if block in graph.readouts:  # which have the stream's own
            continue
        way = graph.into[block][0]
        channels.labels[block] = channel(
            Kind.TARGET,
            INPUT if way.from_input else way.parent,
            block,
            way.name.replace("->", "=>"),
            schedule.in_flight(way, Kind.STATE),
            schedule.bundle(way, Kind.STATE),
        )
    for block in graph.blocks if clocked else ():
        held = isinstance(schedule, HoldSchedule)
        waiting = 1 // schedule.c + 1 if held else schedule.target_in_flight(block)
        channels.clocks[block] = channel(Kind.CLOCK, INPUT, block, f"{INPUT}~>{block}", waiting)
    if isinstance(schedule, PulseSchedule):
        for spec in graph.blocks.values():
            if spec.back == "error" and spec.loss is None:
                sender, waiting = graph.readouts[0], schedule.errors_in_flight(spec.name)
                name = f"{sender}=>{spec.name}"
                channels.errors[spec.name] = channel(Kind.MESSAGE, sender, spec.name, name, waiting)
        for tie in graph.ties:
            up, down = (schedule.tie_in_flight(tie, k) for k in (Kind.GRADIENT, Kind.WEIGHT))
            sides = tie.user, tie.owner
            channels.gradients[tie.index] = channel(Kind.GRADIENT, *sides, tie.name, up)
            channels.weights[tie.index] = channel(Kind.WEIGHT, *sides[::-1], tie.name, down)
        for name in schedule.stepping[1:]:
            first = schedule.stepping[0]
            there, back = f"{name}=>{first}", f"{first}=>{name}"
            channels.squares[name] = channel(Kind.NORM, name, first, there, 1)
            channels.norms[name] = channel(Kind.NORM, first, name, back, 1)
    return channels


@registered("Signal")
@dataclass(slots=True)
class Signal:
    """A value that crosses a channel.

    Attributes:
        stamp: tick, sample and version of the value.
        payload: (B, ...); None for a message of zeros, or a missing target.
        end: the stream has ended; this is no signal of a sample.
        sequence_end: the sample is the last of its sequence.
    """

    stamp: Stamp
    payload: Tensor | None = None
    end: bool = False
    sequence_end: bool = False


def ready(tensor: Tensor) -> Tensor:
    """Return `tensor` as every engine hands it on: detached, contiguous and aligned.

    Its strides are those of its shape, so that it is the same to every kernel whether or not it
    crossed a socket.
    """
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    if tensor.data_ptr() % ALIGNMENT:
        return tensor.clone()
    shape = tensor.shape
    if 1 in shape and tensor.stride() != _strides(shape):
        return tensor.view(-1).view(shape)
    return tensor


def on_host(
    signals: Sequence[Signal], stays: Callable[[Tensor], bool] | None = None
) -> Sequence[Signal]:
    """Return `signals` with payloads in host memory, but those that `stays` accepts.

    They own the copies made here, which live as long as they do.
    """
    if all(s.payload is None or s.payload.is_cpu for s in signals):
        return signals
    return [
        s
        if s.payload is None or (stays is not None and stays(s.payload))
        else replace(s, payload=to_host(s.payload))
        for s in signals
    ]


@lru_cache(maxsize=256)
def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Return the strides that torch gives a contiguous tensor of this shape."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * max(n, 1))
    return tuple(reversed(strides))


class Aborted(Exception):
    """Raised when the run is called off while this process waits."""


class Interrupted(Exception):
    """Raised to leave a blocked call because another thread has a request (`ThreadCalls.serve`)."""
