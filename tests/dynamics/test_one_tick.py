"""The tick that is written out is the tick of the engine."""

from __future__ import annotations

import torch
from torch import nn

from hamdist import streams, train
from hamdist.dynamics.one_tick import TanhLayer, tick

LR, ITEMS = 0.3, 40


def layer(linear: nn.Module, rows: int) -> TanhLayer:
    theta = [p.detach().clone() for p in linear.parameters()]
    out, inputs = theta[0].shape
    h = torch.zeros(rows, out, dtype=torch.float64)
    omega = [torch.zeros_like(t) for t in theta]
    return TanhLayer(theta, omega, h, h, torch.zeros(rows, inputs, dtype=torch.float64))


def test_ticks_written_out_are_those_of_the_engine() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()
    items = [(torch.randn(4, 5).double(), torch.randn(4, 3).double()) for _ in range(ITEMS)]
    result = train(
        model,
        streams.from_iterable(items),
        level="local",
        loss="mse",
        partition={"blocks": 3},
        learning={"lr": LR},
        steps=ITEMS,
    )
    blocks = [layer(model[i], 4) for i in (0, 2, 4)]
    learned = []
    for k in range(ITEMS + 2):
        target = items[k - 2][1] if k >= 2 else None
        tick(blocks, items[min(k, ITEMS - 1)][0], target, LR)
        if k >= ITEMS - 1:  # the end of the stream reaches a block after another
            learned += blocks[k - ITEMS + 1].theta
    for ours, theirs in zip(learned, result.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-13)
