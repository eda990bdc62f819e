"""The bytes of a signal, and of the largest message of each channel, by the plan."""

from __future__ import annotations

import math

from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.schedule.events import Kind
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.packing import MAX_HEADER, TIMES
from hamdist.runtime.signals.signal import Channel

DOUBLE = 8  # bytes of a float64


def exact_bytes(plan: Plan, channel: Channel) -> int:
    """Return the most bytes of a signal on `channel` before it is compressed."""
    if channel.kind is Kind.CLOCK:
        return 0
    if channel.kind is Kind.NORM:
        return DOUBLE
    if channel.kind in (Kind.GRADIENT, Kind.WEIGHT):
        return DOUBLE * max(tie.numel for tie in plan.graph.ties if tie.name == channel.edge)
    if channel.kind is Kind.TARGET:
        target = plan.spec.target(channel.receiver)
        return 0 if target is None else math.prod(target.shape) * target.dtype.itemsize
    if channel.sender == INPUT:
        parts = list(plan.spec.parents.values())
    else:
        parts = [plan.shapes[_parent(channel)]]
    return max(math.prod(shape) * dtype.itemsize for shape, dtype in parts)


def sent_bytes(plan: Plan, channel: Channel) -> int:
    """Return the bytes of a signal's payload on its way; a micro-batch has its part of them."""
    if channel.codec is None:
        whole = exact_bytes(plan, channel)
    else:
        shape = next(iter(plan.spec.parents.values()))[0]
        if channel.sender != INPUT:
            shape = plan.shapes[_parent(channel)][0]
        whole = channel.codec.nbytes(shape[0])
    parts = plan.knobs.microbatches
    if channel.kind in (Kind.STATE, Kind.MESSAGE) and isinstance(parts, int):
        return -(-whole // parts)
    return whole


def _parent(channel: Channel) -> str:
    return channel.sender if channel.kind is Kind.STATE else channel.receiver


RAGGED = 2**28
REST = 4096  # what else a packet may hold; encryption adds 33 bytes


def message_bytes(plan: Plan, channel: Channel) -> int:
    """Return the most bytes of one message on `channel`.

    That is B signals in a bundle, each a header and TIMES the bytes that the plan states; or
    RAGGED, where samples have lengths of their own.
    """
    payload = TIMES * exact_bytes(plan, channel)
    if plan.one_length is None:
        payload = max(payload, RAGGED)
    return channel.bundle * (MAX_HEADER + payload) + REST


def slot_bytes(plan: Plan, channel: Channel) -> int:
    """Return the bytes of a signal between two blocks, by the plan.

    A message has the wider type of the two blocks, and includes the state that it brings along
    (memory 'reversible').
    """
    shape, dtype = plan.shapes[channel.sender]
    if channel.kind is Kind.STATE:
        return math.prod(shape) * dtype.itemsize
    shape, state_dtype = plan.shapes[channel.receiver]
    brings = 2 if channel.receiver in plan.reversible else 1
    return math.prod(shape) * max(state_dtype.itemsize, dtype.itemsize) * brings
