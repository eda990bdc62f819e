"""Unsupervised rules of one linear layer: u = W x, in the tick in which a sample passes.

    Hebb       dW = u x^T                                   Hebb 1949
    Oja        dW = u x^T - (u u^T) W                       Oja 1982, 1989 (subspace)
    Sanger     dW = u x^T - lower(u u^T) W                  Sanger 1989, Eq. 6
    SoftHebb   dW = y x^T - diag(y u) W,   y = softmax(u / T)       Moraitis et al. 2022, Eq. 8

Means over the batch; an update is -dW, so that lr dW is added. The bias stays, and u has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hamdist.dynamics.rules.rule import BlockView, Rule, Signals, Updates
from hamdist.errors import GraphError, SettingsError


class Oja(Rule):
    """Principal subspace of the inputs (Oja), or the components in order (Sanger).

    Args:
        decay: `hebb` (none; weights grow), `oja`, or `sanger`.
    """

    signals = Signals(back="none")

    def __init__(self, decay: str = "oja") -> None:
        if decay not in ("hebb", "oja", "sanger"):
            raise SettingsError(f"oja: decay {decay!r}; give 'hebb', 'oja' or 'sanger'")
        self.decay = decay

    def forward(self, block: BlockView, inputs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        return block.f(inputs), torch.cat([x.flatten(1) for x in inputs], 1)

    def learn(self, block: BlockView, kept: Any, label: Tensor | None) -> Updates:  # noqa: ARG002
        if not block.matrices:
            return {}
        ((name, W), *others) = block.matrices.items()
        if others or W.dim() != 2 or W.shape[1] != kept.shape[1]:
            shapes = {n: tuple(w.shape) for n, w in block.matrices.items()}
            reason = f"{type(self).__name__} is of one linear layer of {kept.shape[1]} inputs"
            raise GraphError(f"block {block.name!r}: {reason}; its weights are {shapes}")
        return {name: self.step(W, kept, kept @ W.T) / -len(kept)}

    def step(self, W: Tensor, x: Tensor, u: Tensor) -> Tensor:
        """Return dW, summed over the batch, of inputs x (B, I) and u (B, O)."""
        if self.decay == "hebb":
            return u.T @ x
        together = u.T @ u
        return u.T @ x - (together.tril() if self.decay == "sanger" else together) @ W


class SoftHebb(Oja):
    """Soft winner-take-all: units become the classes of a mixture model of the inputs.

    Args:
        temperature: T of the softmax.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def step(self, W: Tensor, x: Tensor, u: Tensor) -> Tensor:
        y = torch.softmax(u / self.temperature, 1)
        return y.T @ x - (y * u).sum(0)[:, None] * W
