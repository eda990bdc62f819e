"""Signals, the channels they cross, and their form on the wire.

A channel is one direction of an edge (or the way of the targets from the stream to a readout): it
has one sender and one receiver, and its signals arrive in the order in which they were sent. What
pairs a signal with its use is its stamp, which the receiver checks; never the order.

On the wire a signal is two frames, a header and the payload's bytes (empty without one). Header,
little-endian: magic 'HD', format, kind, flags, type, number of dimensions (1 byte each), a byte of
padding, run (8), channel (4), tick, sample, version (8 each), then 8 bytes per dimension.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hamdist.dynamics.graph import INPUT, Graph
from hamdist.dynamics.schedule import Kind, Schedule, Stamp
from hamdist.errors import WireError

ALIGNMENT = 64
FORMAT = 1
HEADER = struct.Struct("<2sBBBBBxQIqqq")
MAGIC = b"HD"
MAX_DIMS = 16
END = 1
EMPTY = 2
SEQUENCE_END = 4

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


class Channel(NamedTuple):
    """One direction between two nodes. capacity: signals that may wait on it."""

    number: int
    kind: Kind
    sender: str
    receiver: str
    edge: str
    capacity: int

    def __str__(self) -> str:
        return (
            f"{self.kind.name.lower()} on edge {self.edge} (from {self.sender} to {self.receiver})"
        )


class Channels(NamedTuple):
    """All channels of a graph: by edge index, the targets' by readout, and the clock's by block."""

    states: dict[int, Channel]
    messages: dict[int, Channel]
    targets: dict[str, Channel]
    clocks: dict[str, Channel]

    def all(self) -> list[Channel]:
        edges = [*self.states.values(), *self.messages.values()]
        return [*edges, *self.targets.values(), *self.clocks.values()]


def make_channels(graph: Graph, schedule: Schedule, queue: int, *, clocked: bool) -> Channels:
    """The channels, with room for what the schedule keeps in flight and `queue` signals more.

    clocked: the stream tells every block the step of integration, and the end of a sequence.
    """
    made = Channels({}, {}, {}, {})
    number = 0
    for edge in graph.edges:
        room = schedule.in_flight(edge, Kind.STATE) + queue
        made.states[edge.index] = Channel(
            number, Kind.STATE, edge.parent, edge.child, edge.name, room
        )
        number += 1
        if not edge.from_input:
            room = schedule.in_flight(edge, Kind.MESSAGE) + queue
            made.messages[edge.index] = Channel(
                number, Kind.MESSAGE, edge.child, edge.parent, edge.name, room
            )
            number += 1
    for readout in graph.readouts:
        room = schedule.target_in_flight(readout) + queue
        name = f"{INPUT}=>{readout}"
        made.targets[readout] = Channel(number, Kind.TARGET, INPUT, readout, name, room)
        number += 1
    for block in graph.blocks if clocked else ():
        room = 1 // schedule.c + 1 + queue
        made.clocks[block] = Channel(number, Kind.CLOCK, INPUT, block, f"{INPUT}~>{block}", room)
        number += 1
    return made


@dataclass(slots=True)
class Signal:
    """What crosses a channel. payload: None for a message of zeros, or a missing target.
    end: the stream has ended, this is no signal of a sample. sequence_end: the sample is the last
    of its sequence."""

    stamp: Stamp
    payload: Tensor | None = None
    end: bool = False
    sequence_end: bool = False


def ready(tensor: Tensor) -> Tensor:
    """`tensor` as every engine hands it on: detached, contiguous with the strides of its shape, and
    aligned, so that it is the same to every kernel whether or not it crossed a socket."""
    tensor = tensor.detach().contiguous()
    if tensor.data_ptr() % ALIGNMENT:
        return tensor.clone()
    if 1 in tensor.shape:
        return tensor.view(-1).view(tensor.shape)
    return tensor


def encode(signal: Signal, run: int, channel: Channel) -> tuple[bytes, memoryview | bytes]:
    """Header and payload frame. The payload's memory is the tensor's own: do not write to it."""
    payload, stamp = signal.payload, signal.stamp
    flags = (END if signal.end else 0) | (SEQUENCE_END if signal.sequence_end else 0)
    if payload is None:
        header = HEADER.pack(
            MAGIC, FORMAT, channel.kind, flags | EMPTY, 0, 0, run, channel.number, *stamp
        )
        return header, b""
    try:
        code = _CODES[payload.dtype]
    except KeyError:
        raise WireError(f"{channel}: type {payload.dtype} cannot be sent") from None
    dims = payload.shape
    header = HEADER.pack(
        MAGIC, FORMAT, channel.kind, flags, code, len(dims), run, channel.number, *stamp
    )
    header += struct.pack(f"<{len(dims)}q", *dims)
    return header, payload.view(-1).view(torch.uint8).numpy().data


def decode(header: bytes, payload: memoryview | bytes, run: int, channel: Channel) -> Signal:
    """The signal, its payload copied into aligned memory of its own.

    Raises WireError for anything that is not a signal of this run and channel.
    """
    if len(header) < HEADER.size:
        raise WireError(f"{channel}: a header of {len(header)} bytes")
    magic, form, kind, flags, code, dims, sent_run, number, *stamp = HEADER.unpack_from(header)
    if magic != MAGIC or form != FORMAT:
        raise WireError(f"{channel}: not a signal of format {FORMAT}")
    if sent_run != run:
        raise WireError(f"{channel}: a signal of run {sent_run:x}, this is run {run:x}")
    if kind != channel.kind or number != channel.number:
        raise WireError(f"{channel}: a signal of kind {kind} for channel {number} arrived")
    if dims > MAX_DIMS or len(header) != HEADER.size + 8 * dims or code >= len(_DTYPES):
        raise WireError(f"{channel}: a header with {dims} dimensions, type {code}")
    end, sequence_end = bool(flags & END), bool(flags & SEQUENCE_END)
    if flags & EMPTY:
        if len(payload):
            raise WireError(f"{channel}: {len(payload)} bytes in an empty signal")
        return Signal(Stamp(*stamp), None, end, sequence_end)
    shape = struct.unpack_from(f"<{dims}q", header, HEADER.size)
    dtype = _DTYPES[code]
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(payload):
        raise WireError(f"{channel}: {len(payload)} bytes do not make shape {shape} of {dtype}")
    tensor = torch.empty(shape, dtype=dtype)
    if len(payload):
        flat = tensor.view(-1).view(torch.uint8)
        flat.numpy()[:] = memoryview(payload).cast("B")
    return Signal(Stamp(*stamp), tensor, end, sequence_end)
