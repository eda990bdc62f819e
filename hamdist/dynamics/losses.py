"""Losses L(y, target). Each is a mean over the batch (equations.md, "State, output, Hamiltonian").

B: batch, O: outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor
from torch.nn import functional

from hamdist.config import Loss

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """(1/B) sum_b 1/2 sum_j (y_bj - target_bj)^2. prediction and target: (B, O)."""
    return 0.5 * (prediction - target).square().sum() / prediction.shape[0]


def cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of softmax cross-entropy. prediction: (B, classes), target: (B,)."""
    return functional.cross_entropy(prediction, target)


def make_loss(name: Loss) -> LossFunction:
    return {Loss.MSE: mse, Loss.CROSS_ENTROPY: cross_entropy}[name]
