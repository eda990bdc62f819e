"""Rules that send messages through other matrices than the weights.

    delta = f'(a) * m,      dL/dW = delta x^T,      message to the parent = B^T delta

    feedback alignment    B fixed, drawn once                Lillicrap et al. 2016
    sign symmetry         B = sign(W) |.|                    Liao, Leibo and Poggio 2016
    Kolen-Pollack         B moves by the update of W         Kolen and Pollack 1994

B has the shape of W, and the size that W has at the start, so that messages are about as large as
those of backpropagation; layer norms, biases and activations between are passed exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hamdist.dynamics.rules.rule import MEMORY, BlockView, Messages, Rule, Signals, Updates
from hamdist.errors import SettingsError


def sizes_of(block: BlockView) -> dict[str, float]:
    """Return the root mean square of each weight matrix; 1 / sqrt(fan-in) of one that is 0.

    It has three digits: the order of the sum, which depends on threads, has no say in them.
    """
    return {
        name: float(f"{float(w.double().square().mean().sqrt()):.3g}") or w[0].numel() ** -0.5
        for name, w in block.matrices.items()
    }


def feedback_matrices(block: BlockView, sizes: Mapping[str, float]) -> dict[str, Tensor]:
    """Return a matrix for each weight matrix of the block, B ~ N(0, size^2)."""
    return {name: block.randn_like(w) * sizes[name] for name, w in block.matrices.items()}


class FeedbackAlignment(Rule):
    """Messages go through fixed random matrices (Lillicrap et al. 2016, Eq. 2)."""

    on_readout = True

    def start(self, block: BlockView) -> dict[str, Any]:
        return feedback_matrices(block, sizes_of(block))

    def feedback(self, block: BlockView) -> Mapping[str, Tensor]:
        """Return B by weight."""
        return block.memory

    def backward(self, block: BlockView, kept: Any, message: Tensor) -> tuple[Messages, Updates]:
        return block.vjp(kept, message, self.feedback(block))


class SignSymmetry(FeedbackAlignment):
    """Messages go through matrices with the signs of the weights (Liao et al. 2016, section 3).

    Args:
        magnitude: `uniform`: the root mean square of W at the start, equal for all; `batchwise`:
            drawn anew for each sample, of that size; `fixed`: drawn once.
    """

    def __init__(self, magnitude: str = "fixed") -> None:
        modes = ("uniform", "batchwise", "fixed")
        if magnitude not in modes:
            raise SettingsError(f"sign-symmetry: magnitude {magnitude!r}; give one of {modes}")
        self.magnitude = magnitude

    def start(self, block: BlockView) -> dict[str, Any]:
        sizes = sizes_of(block)
        if self.magnitude != "fixed":
            return sizes
        return {n: b.abs() for n, b in feedback_matrices(block, sizes).items()}

    def feedback(self, block: BlockView) -> Mapping[str, Tensor]:
        # (earlier snapshots have no sizes)
        sizes = block.memory or {n: w[0].numel() ** -0.5 for n, w in block.matrices.items()}
        if self.magnitude == "batchwise":
            sizes = feedback_matrices(block, sizes)
        return {n: w.sign() * abs(sizes[n]) for n, w in block.matrices.items()}


class KolenPollack(FeedbackAlignment):
    """B moves by the same updates as W; with weight decay both become equal.

    W <- W - lr (delta x^T + lambda W),        B <- B - lr (delta x^T + lambda B)
    """

    def start(self, block: BlockView) -> dict[str, Any]:
        return {n: nn.Parameter(b) for n, b in super().start(block).items()}

    def backward(self, block: BlockView, kept: Any, message: Tensor) -> tuple[Messages, Updates]:
        messages, g = super().backward(block, kept, message)
        return messages, {**g, **{MEMORY + name: g[name] for name in block.memory}}


class DirectFeedbackAlignment(Rule):
    """The readout's error goes to every block, through a fixed random matrix (Noekland 2016).

    delta = f'(a) * (B e),        e = phi dL/dy (B, O),        B (n, O) of N(0, scale^2 / n)

    so that |B e| is about scale |e| whatever the width; n counts all channels and positions of a
    convolution.

    Args:
        scale: size of the errors in a block, of the readout's. With less of it blocks take smaller
            steps than the readout, at one learning rate.
    """

    signals = Signals(back="error")

    def __init__(self, scale: float = 1.0) -> None:
        if not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
            raise SettingsError(
                f"direct-feedback-alignment: scale {scale!r}; give a positive number"
            )
        self.scale = float(scale)

    def start(self, block: BlockView) -> dict[str, Any]:
        drawn = block.randn_like(block.h.new_empty(block.outputs[-1], *block.shape))
        return {"B": drawn * self.scale * math.prod(block.shape) ** -0.5}

    def backward(self, block: BlockView, kept: Any, message: Tensor) -> tuple[Messages, Updates]:
        messages, g = block.vjp(kept, torch.tensordot(message, block.memory["B"], dims=1))
        return [None] * len(messages), g
