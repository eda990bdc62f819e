"""The bytes of a signal, by the plan."""

from __future__ import annotations

import math

from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.schedule.events import Kind
from hamdist.runtime.plan.plan import Plan
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
        known = list(plan.spec.parents.values())
    else:
        known = [plan.shapes[_parent(channel)]]
    return max(math.prod(shape) * dtype.itemsize for shape, dtype in known)


def sent_bytes(plan: Plan, channel: Channel) -> int:
    """Return the bytes of a signal's payload on its way; a micro-batch has its part of them."""
    if channel.codec is None:
        whole = exact_bytes(plan, channel)
    else:
        shape = next(iter(plan.spec.parents.values()))[0]
        if channel.sender != INPUT:
            shape = plan.shapes[_parent(channel)][0]
        whole = channel.codec.nbytes(shape[0])
    cut = channel.kind in (Kind.STATE, Kind.MESSAGE) and isinstance(plan.knobs.microbatches, int)
    return -(-whole // int(plan.knobs.microbatches)) if cut else whole


def _parent(channel: Channel) -> str:
    return channel.sender if channel.kind is Kind.STATE else channel.receiver
