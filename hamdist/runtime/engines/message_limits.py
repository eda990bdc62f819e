"""The largest message of each channel, by the plan; a larger one is no signal of this run."""

from __future__ import annotations

import math

import torch

from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.schedule.events import Kind
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.packing import MAX_HEADER
from hamdist.runtime.signals.signal import Channel

# Batches may be larger than the first one was; a message may be wider than the state that it
# answers (float64 for float32), and bring that state along (memory 'reversible').
TIMES = 16
RAGGED = 2**28
REST = 4096  # what else a packet may hold; encryption adds 33 bytes


def message_bytes(plan: Plan, channel: Channel) -> int:
    """Return the most bytes of one message on `channel`.

    That is B signals in a bundle, each a header and TIMES the bytes that the plan states; or
    RAGGED, where samples have lengths of their own.
    """
    one = TIMES * _signal_bytes(plan, channel)
    if plan.one_length is None:
        one = max(one, RAGGED)
    return channel.bundle * (MAX_HEADER + one) + REST


def slot_bytes(plan: Plan, channel: Channel) -> int:
    """Return the bytes of a signal between two blocks, by the plan.

    A message has the wider type of the two blocks, and includes the state that it brings along
    (memory 'reversible').
    """
    shape, dtype = plan.shapes[channel.sender]
    if channel.kind is Kind.STATE:
        return math.prod(shape) * dtype.itemsize
    shape, own = plan.shapes[channel.receiver]
    brings = 2 if channel.receiver in plan.reversible else 1
    return math.prod(shape) * max(own.itemsize, dtype.itemsize) * brings


def _signal_bytes(plan: Plan, channel: Channel) -> int:
    if channel.kind is Kind.CLOCK:
        return 0
    if channel.kind in (Kind.GRADIENT, Kind.WEIGHT):
        most = max(tie.numel for tie in plan.graph.ties if tie.name == channel.edge)
        return most * torch.float64.itemsize
    if channel.kind is Kind.TARGET:
        target = plan.spec.target(channel.receiver)
        return 0 if target is None else math.prod(target.shape) * target.dtype.itemsize
    if channel.sender == INPUT:
        known = list(plan.spec.parents.values())
    else:
        parent = channel.sender if channel.kind is Kind.STATE else channel.receiver
        known = [plan.shapes[parent]]
    return max(math.prod(shape) * dtype.itemsize for shape, dtype in known)
