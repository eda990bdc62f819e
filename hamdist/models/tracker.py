"""A fully connected net that follows a signal (NILP): no input, a target for its first neuron.

    h' = c ( -h + tanh(W h + b) ),    y = h_1

With b: W ~ N(0, 1/n^2), b = 0 and h_0 = 0. Without b, where h = 0 would last for ever, the neurons
begin by holding each other up: W ~ N(1.3/n, 0.05^2), an eigenvalue above 1, and h_0 = 0.7.
B: batch, n: neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.modules.prenorm import linear_of
from hamdist.dynamics.objective.losses import mse

PURE_GAIN, PURE_NOISE, PURE_START = 1.3, 0.05, 0.7


class First(nn.Module):
    """The first neuron. h: (B, n); returns (B, 1)."""

    def forward(self, h: Tensor) -> Tensor:
        return h[:, :1]


def tracker(
    n: int, *, bias: bool, seed: int, dtype: torch.dtype, blocks: int = 1, delay: int = 1
) -> Graph:
    """Return the net as `blocks` slices of its n neurons, each reading all of them.

    blocks: 1 for one block `x`, n for neuron by neuron. delay: ticks of every edge. `seed` alone
    decides the weights, however many the blocks, up to rounding to `dtype`.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(n, n, generator=generator, dtype=torch.float64)
    weight = draw / n if bias else PURE_GAIN / n + PURE_NOISE * draw
    names = ["x"] if blocks == 1 else [f"x{i}" for i in range(blocks)]
    specs = []
    for name, rows in zip(names, torch.arange(n).tensor_split(blocks), strict=True):
        reads, size = name == names[0], len(rows)
        specs.append(
            BlockSpec(
                name,
                nn.Sequential(linear_of(weight[rows], dtype, bias=bias), nn.Tanh()),
                tuple(names),
                delays=dict.fromkeys(names, delay),
                loss=mse if reads else None,
                state=reads,
                output=First() if reads and size > 1 else None,
                shape=(size,),
                initial=None if bias else torch.full((size,), PURE_START, dtype=dtype),
            )
        )
    return Graph(specs)
