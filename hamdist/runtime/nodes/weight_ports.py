"""Signals about weights, beside those of the graph's edges: of weights that several blocks share
(dynamics/graph/ties.py), and the norm of the gradient of all blocks together.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hamdist.config import Compensation, Credit, LearningSettings, Memory
from hamdist.dynamics.schedule.events import Event, Stamp
from hamdist.dynamics.schedule.levels import Locality
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.dynamics.vjp.local_function import LocalFunction
from hamdist.dynamics.vjp.wrapping import flat
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.results.result import WeightLag
from hamdist.runtime.signals.signal import Channel, Signal, ready


def against_ties(level: str, knobs: Locality, learning: LearningSettings) -> str | None:
    """Return why the users of a weight must lie in one block; None if several blocks may use it."""
    if not knobs.pulse or knobs.credit is Credit.HEADS or knobs.memory is Memory.REVERSIBLE:
        return f"level {level!r}"
    if Compensation.WEIGHT_PREDICTION in knobs.compensation:
        return "compensation 'weight-prediction'"
    if learning.any_heads:
        return "learning.heads"
    if learning.any_inputs:
        return "learning.inputs"
    return None


def weight_lags(plan: Plan) -> dict[str, WeightLag]:
    """Return how old the weights are that each user reads, by owner and user."""
    if not isinstance(plan.schedule, PulseSchedule):
        return {}
    lags = {tie.name: plan.schedule.weight_lag(tie) - 1 for tie in plan.graph.ties}
    return {name: WeightLag(lag, lag * plan.schedule.c) for name, lag in lags.items()}


class TiePorts:
    """The channels of one block's shared weights, in the order of the graph's ties.

    A block without any (whose local function is no `TiedFunction`) has no channel.
    """

    def __init__(self, plan: Plan, name: str, mailbox: Mailbox, cell: LocalFunction) -> None:
        if not isinstance(plan.schedule, PulseSchedule):
            raise TypeError("shared weights need a PulseSchedule")
        self._schedule = plan.schedule
        self._channels = plan.channels
        self._mailbox = mailbox
        self._cell: Any = cell
        self._owned = [tie for tie in plan.graph.ties if tie.owner == name]
        self._used = [tie for tie in plan.graph.ties if tie.user == name]

    def before_forward(self, event: Event) -> None:
        """Take the weights that have arrived since the sample before."""
        for tie in self._used:
            stamp = self._schedule.weight(tie, event)
            if stamp is None:
                continue
            weights = self._mailbox.take(self._channels.weights[tie.index], stamp, event.tick)
            if weights.payload is not None:
                self._cell.overwrite(tie.theirs, weights.payload)

    def before_backward(self, event: Event) -> None:
        """Take the users' gradients about the sample."""
        for tie in self._owned:
            stamp = self._schedule.gradient(tie, event)
            signal = self._mailbox.take(self._channels.gradients[tie.index], stamp, event.tick)
            if signal.payload is not None:
                self._cell.add(tie.owners, signal.payload)

    def after_backward(self, stamp: Stamp) -> None:
        """Send gradients to the owners; stamp: of the pass."""
        gradients = self._cell.take() if self._used else None
        for tie in self._used:
            g = None if gradients is None else ready(flat([gradients[key] for key in tie.theirs]))
            self._mailbox.post(self._channels.gradients[tie.index], Signal(stamp, g))

    def after_step(self, stamp: Stamp, updates: int, end: int | None) -> None:
        """Send weights that have moved to the users.

        Args:
            stamp: of the pass, or the step, in which they have.
            updates: number of weight updates after it.
            end: the number of samples, once it is known.
        """
        parts = self._schedule.parts
        sample, part = divmod(stamp.sample, parts)
        if part < parts - 1:
            return  # no weight has moved
        for tie in self._owned:
            reader = (sample + self._schedule.weight_lag(tie)) * parts
            if end is None or reader < end:
                weights = ready(flat(self._cell.weights(tie.owners)))
                moved = stamp._replace(version=updates)
                self._mailbox.post(self._channels.weights[tie.index], Signal(moved, weights))


# -- the norm of the whole gradient ----------------------------------------------------------------


TORCHS = 1e-6  # in the denominator of clip_grad_norm_


class NormPorts:
    """The channels of norms of one block.

        g_v <- g_v min( 1, limit / (|g| + 1e-6) ),      |g|^2 = sum_v |g_v|^2

    as torch.nn.utils.clip_grad_norm_ has it. Every block with weights sends |g_v|^2 behind its last
    message about a sample to the first of them (`PulseSchedule.stepping`), which adds them up in
    order and sends |g| to all: of what crosses here, nothing is local.

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
