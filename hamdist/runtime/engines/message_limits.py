"""The largest message of each channel, by the plan; a larger one is no signal of this run."""

from __future__ import annotations

import math

from hamdist.dynamics.schedule.events import Kind
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.plan.signal_bytes import exact_bytes
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
    one = TIMES * exact_bytes(plan, channel)
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
    shape, state_dtype = plan.shapes[channel.receiver]
    brings = 2 if channel.receiver in plan.reversible else 1
    return math.prod(shape) * max(state_dtype.itemsize, dtype.itemsize) * brings
