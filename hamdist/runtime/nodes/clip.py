"""The norm of the gradient of all blocks together, by which each of them clips its own.

    g_v <- g_v min( 1, limit / (|g| + 1e-6) ),      |g|^2 = sum_v |g_v|^2

as torch.nn.utils.clip_grad_norm_ has it. Every block with weights sends |g_v|^2 behind its last
message about a sample to the first of them (`PulseSchedule.stepping`), which adds them up in order
and sends |g| to all: of what crosses here, nothing is local.
"""

from __future__ import annotations

import math

import torch

from hamdist.dynamics.schedule.events import Event, Stamp
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.signals.signal import Channel, Signal, ready

TORCHS = 1e-6  # in the denominator of clip_grad_norm_


class NormPorts:
    """The channels of norms of one block.

    Attributes:
        clips: the block steps by the norm of all.
    """

    def __init__(self, plan: Plan, name: str, mailbox: Mailbox) -> None:
        if not isinstance(plan.schedule, PulseSchedule):
            raise TypeError("the norm of all gradients needs a PulseSchedule")
        self._schedule = plan.schedule
        self._mailbox = mailbox
        self._limit = plan.knobs.clip
        self._square = plan.channels.squares.get(name)
        self._norm = plan.channels.norms.get(name)
        self._squares, self._norms = plan.channels.squares, plan.channels.norms
        self.clips = name in self._schedule.stepping

    def send(self, stamp: Stamp, square: float) -> None:
        """Send the square of the norm of a gradient that is complete; stamp: of the last pass."""
        if self._square is not None:
            self._post(self._square, stamp, square)

    def share(self, event: Event, square: float) -> float:
        """Return the part of the gradient by which the block steps; square: of its own norm."""
        stamp = self._schedule.norm(event)
        if self._norm is not None:
            norm = self._take(self._norm, stamp, event)
        else:
            sent = (self._schedule.square(other, event) for other in self._squares)
            squares = zip(self._squares.values(), sent, strict=True)
            norm = math.sqrt(sum((self._take(*pair, event) for pair in squares), square))
            for channel in self._norms.values():
                self._post(channel, stamp, norm)
        # (Without a finite norm no number of the network is right: every block says so.)
        return min(1.0, self._limit / (norm + TORCHS)) if math.isfinite(norm) else math.nan

    def _post(self, channel: Channel, stamp: Stamp, value: float) -> None:
        self._mailbox.post(
            channel, Signal(stamp, ready(torch.tensor([value], dtype=torch.float64)))
        )

    def _take(self, channel: Channel, stamp: Stamp, event: Event) -> float:
        payload = self._mailbox.take(channel, stamp, event.tick).payload
        return 0.0 if payload is None else float(payload)
