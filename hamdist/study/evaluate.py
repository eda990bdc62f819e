"""Held-out evaluation of a merged model.

B: batch, N: rows of the held-out set, O: outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hamdist.dynamics.losses import LossFunction
from hamdist.dynamics.metrics import count_correct

CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Scores:
    """loss: mean over rows. accuracy: share of rows predicted right; None for real values."""

    loss: float
    accuracy: float | None


def evaluate(model: nn.Module, x: Tensor, y: Tensor, loss: LossFunction) -> Scores:
    """Scores of `model` on x (N, ...) with targets y, (N,) classes or (N, O) values.

    `loss` is a mean over the batch. The model is set to evaluation meanwhile.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total, correct, counted = 0.0, 0, 0
    try:
        with torch.no_grad():
            for u, target in zip(torch.split(x, CHUNK), torch.split(y, CHUNK), strict=True):
                prediction = model(u)
                total += float(loss(prediction, target)) * len(u)
                right, rows = count_correct(prediction, target)
                correct, counted = correct + right, counted + rows
    finally:
        for module, training in modes:
            module.training = training
    return Scores(total / len(x), correct / counted if counted else None)
