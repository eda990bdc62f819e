"""Blocks that learn from a readout of their own: level `heads`, and heads beside messages.

    y = head(h),    s = phi dL(y, label)/dh
    g = c tau (df/dtheta)^T s,    g_head = phi dL/dtheta_head

head is LN(h) W + b, a mean over positions in front of W where the label has none. s stays in the
block: nothing of it goes to a parent, and the head is no part of the exported model. The label
travels with the signal. Everything happens in the tick in which the sample passes, so nothing is
stale and nothing is kept. Beside messages (level `trace`) a head's step comes on top of theirs,
with momentum or adaptive rates of its own:

    theta <- theta - lambda tau beta omega_own,         lambda: `learning.heads.weight`

B: batch, n: features of h, O: outputs, P: positions (of an image, or of a text).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hamdist.dynamics.blocks.block import Block, BlockParts
from hamdist.dynamics.blocks.readout_loss import ReadoutLoss, plain, scaled
from hamdist.dynamics.finite import StepFactor
from hamdist.dynamics.modules.prenorm import layer_norm, linear_of
from hamdist.dynamics.saved_state.stateful import Stateful
from hamdist.dynamics.updates.constants import Dynamics, constant_tau
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.local_function import ForwardRecord, LocalFunction
from hamdist.errors import LevelError

IMAGE = 4  # dimensions of (B, n, height, width)


class Pooled(nn.Module):
    """Mean over all positions: (B, n, ...) -> (B, n), or with `last` (B, ..., n) -> (B, n)."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.last = last

    def forward(self, h: Tensor) -> Tensor:
        """Return the mean over positions."""
        return (h if self.last else h.movedim(1, -1)).flatten(1, -2).mean(1)


def make_head(
    block: str,
    h: tuple[tuple[int, ...], torch.dtype],
    prediction: tuple[int, ...],
    *,
    norm: bool,
    seed: int,
) -> nn.Module:
    """Return the head of `block`, drawn by `seed` alone: W ~ N(0, 1/n), b = 0.

    h: shape and dtype of the block's state; prediction: shape of the readout's prediction, which is
    that of the head's, too: (B, O), or (B, P, O) for states (B, P, n). Raises LevelError where a
    linear head cannot map one to the other.
    """
    shape, dtype = h
    if not dtype.is_floating_point or len(shape) < 2:
        raise LevelError(
            f"learning.heads: block {block!r} has a state of shape {shape} and type {dtype}, which "
            f"no linear readout takes; switch it off there (learning.blocks.{block}.heads: off)"
        )
    pools = len(prediction) == 2
    if not pools and shape[:-1] != prediction[:-1]:
        raise LevelError(
            f"learning.heads: block {block!r} has states {shape}, from which a linear readout at "
            f"every position does not predict {prediction}; switch it off there "
            f"(learning.blocks.{block}.heads: off)"
        )
    channels = pools and len(shape) == IMAGE
    n, outputs = shape[1 if channels else -1], prediction[-1]
    parts: list[nn.Module] = []
    if norm:
        over = shape[1:] if channels else shape[-1:]
        parts.append(layer_norm(over))
    if pools and len(shape) > 2:
        parts.append(Pooled(last=not channels))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(outputs, n, generator=generator, dtype=torch.float64) / math.sqrt(n)
    return nn.Sequential(*parts, linear_of(drawn, dtype))


class Head(Stateful):
    """A readout of one block. weight: of the block's step by it; factor: of beta, by sample."""

    def __init__(
        self,
        cell: LocalFunction,
        weights: Weights,
        loss: ReadoutLoss,
        weight: float,
        factor: StepFactor,
        tau: float,
    ) -> None:
        self.cell = cell
        self.weights = weights
        self.weight = weight
        self._loss = loss
        self._factor = factor
        self._tau = tau

    STATE = ("cell", "weights", "_loss")

    def teach(self, sample: int, h: Tensor, label: Tensor) -> Tensor:
        """Return s = phi dL/dh of the head before its step, then let the head learn."""
        record = self.cell.forward([h], [True])
        factor = self._factor(sample)
        at_once = self.weights.at_once(factor, self._tau)
        (s,), g, _ = self._loss.take(self.cell, record, label, sample, at_once=at_once)
        self.weights.move(g, factor, self._tau)
        if s is None:  # (it was asked for)
            raise TypeError("a head says nothing about its block's state")
        return s


class HeadUpdate(Stateful):
    """Steps of a block's weights by its head, with a separate omega beside that of messages."""

    def __init__(
        self,
        head: Head,
        cell: LocalFunction,
        weights: Weights,
        dynamics: Dynamics,
        factor: StepFactor,
    ) -> None:
        self.head = head
        self.weights = weights
        self._cell = cell
        self._tau = constant_tau(dynamics)
        self._c = dynamics.c
        self._factor = factor

    STATE = ("head", "weights")

    def learn(self, sample: int, record: ForwardRecord, label: Tensor, *, keep: bool) -> Tensor:
        """Make one step by the label of `sample`; return z = tau s. keep: keep the record."""
        z = scaled(self.head.teach(sample, plain(record.output), label), self._tau)
        factor = self._factor(sample) * self.head.weight
        at_once = self.weights.at_once(factor, self._tau)
        _, g = self._cell.pull(record, scaled(z, self._c), inputs=False, keep=keep, at_once=at_once)
        self.weights.move(g, factor, self._tau)
        return z


class HeadBlock(Block):
    """A block of level `heads`: forward, then its own step. taught: None where it has no weights.

    h, z: of the latest sample; z = tau s.
    """

    def __init__(self, parts: BlockParts, taught: HeadUpdate | None) -> None:
        super().__init__(parts)
        self.h: Tensor | None = None
        self.z: Tensor | None = None
        self.taught = taught
        self._wanted = [False] * len(parts.wanted)
        self._record: ForwardRecord | None = None

    STATE = ("cell", "weights", "taught", "h", "z")

    def forward(self, sample: int, inputs: Sequence[Tensor]) -> Tensor:  # noqa: ARG002
        """Return h of `sample`, and keep its record for `learn`."""
        self._record = self.cell.forward(inputs, self._wanted)
        self.h = plain(self._record.output)
        self._guard("h", self.h, inputs)
        return self.h

    def learn(self, sample: int, label: Tensor | None) -> None:
        """Make the step of `sample`, after its `forward`. Without a label nothing moves."""
        record, self._record = self._record, None
        if self.taught is None or label is None or record is None:
            self.weights.rest()
            return
        self.z = self.taught.learn(sample, record, label, keep=False)
        self._guard("z", self.z)


class FrozenBlock(HeadBlock):
    """A block where nothing learns, nor before it: it passes samples on and keeps nothing."""

    def forward(self, sample: int, inputs: Sequence[Tensor]) -> Tensor:
        h = super().forward(sample, inputs)
        self._record = None
        return h

    def learn(self, sample: int, label: Tensor | None) -> None:
        """Do nothing, whatever the label."""
