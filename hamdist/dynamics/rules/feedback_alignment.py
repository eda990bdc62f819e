"""Rules that send messages through other matrices than the weights.

    delta = f'(a) * m,      dL/dW = delta x^T,      message to the parent = B^T delta

    feedback alignment    B fixed, drawn once                Lillicrap et al. 2016
    sign symmetry         B = sign(W) |.|                    Liao, Leibo and Poggio 2016
    Kolen-Pollack         B moves by the update of W         Kolen and Pollack 1994

B has the shape of W; layer norms, biases and activations between are passed exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hamdist.dynamics.rules.rule import MEMORY, BlockView, Messages, Rule, Signals, Updates
from hamdist.errors import SettingsError


def drawn(block: BlockView) -> dict[str, Tensor]:
    """Return a matrix for each weight matrix of the block, B ~ N(0, 1/fan_in)."""
    return {n: block.randn_like(w) * w[0].numel() ** -0.5 for n, w in block.matrices.items()}


class FeedbackAlignment(Rule):
    """Messages go through fixed random matrices (Lillicrap et al. 2016, Eq. 2)."""

    on_readout = True

    def start(self, block: BlockView) -> dict[str, Any]:
        return drawn(block)

    def feedback(self, block: BlockView) -> Mapping[str, Tensor]:
        """Return B by weight."""
        return block.memory

    def backward(self, block: BlockView, kept: Any, message: Tensor) -> tuple[Messages, Updates]:
        return block.vjp(kept, message, self.feedback(block))


class SignSymmetry(FeedbackAlignment):
    """Messages go through matrices with the signs of the weights (Liao et al. 2016, section 3).

    Args:
        magnitude: `uniform`: that of the weights' initial spread, equal for all; `batchwise`: drawn
            anew for each sample; `fixed`: drawn once.
    """

    def __init__(self, magnitude: str = "fixed") -> None:
        modes = ("uniform", "batchwise", "fixed")
        if magnitude not in modes:
            raise SettingsError(f"sign-symmetry: magnitude {magnitude!r}; give one of {modes}")
        self.magnitude = magnitude

    def start(self, block: BlockView) -> dict[str, Any]:
        return {n: b.abs() for n, b in drawn(block).items()} if self.magnitude == "fixed" else {}

    def feedback(self, block: BlockView) -> Mapping[str, Tensor]:
        if self.magnitude == "uniform":
            return {n: w.sign() * w[0].numel() ** -0.5 for n, w in block.matrices.items()}
        sizes = block.memory if self.magnitude == "fixed" else drawn(block)
        return {n: w.sign() * sizes[n].abs() for n, w in block.matrices.items()}


class KolenPollack(FeedbackAlignment):
    """B moves by the same updates as W; with weight decay both become equal.

    W <- W - lr (delta x^T + lambda W),        B <- B - lr (delta x^T + lambda B)
    """

    def start(self, block: BlockView) -> dict[str, Any]:
        return {name: nn.Parameter(b) for name, b in drawn(block).items()}

    def backward(self, block: BlockView, kept: Any, message: Tensor) -> tuple[Messages, Updates]:
        messages, g = super().backward(block, kept, message)
        return messages, {**g, **{MEMORY + name: g[name] for name in block.memory}}


class DirectFeedbackAlignment(Rule):
    """The readout's error goes to every block, through a fixed random matrix (Noekland 2016).

    delta = f'(a) * (B e),        e = phi dL/dy (B, O),        B (n, O) of N(0, 1/n)

    so that |B e| is about |e| whatever the width, as with the W^T of a layer; n counts all channels
    and positions of a convolution.
    """

    signals = Signals(back="error")

    def start(self, block: BlockView) -> dict[str, Any]:
        drawn = block.randn_like(block.h.new_empty(block.outputs[-1], *block.shape))
        return {"B": drawn * math.prod(block.shape) ** -0.5}

    def backward(self, block: BlockView, kept: Any, message: Tensor) -> tuple[Messages, Updates]:
        messages, g = block.vjp(kept, torch.tensordot(message, block.memory["B"], dims=1))
        return [None] * len(messages), g
