"""A moving average of a block's weights: local, and without influence on what the block computes.

    a_k = a_{k-1} + w_k (theta_k - a_{k-1}),        w_k = (1 - r) / (1 - r^k)

which is the mean of theta_1 ... theta_k with weights r^{k-j}: the start has no part in it. With
`every` m only every m-th update counts, with r^m for r. Memory: one copy of the weights (in float32
where they are shorter). Polyak and Juditsky 1992; with the correction of Kingma and Ba 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hamdist.config import AverageSettings
from hamdist.dynamics.saved_state.stateful import Stateful


class Average(Stateful):
    """The average. values: a_k, in the order of the weights; at first the weights."""

    def __init__(self, theta: Sequence[Tensor], settings: AverageSettings) -> None:
        self._theta = list(theta)
        self._keeps = settings.decay**settings.every
        self._every = settings.every
        self._updates = 0
        self._fading = 1.0  # r^k
        self._sum = [t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in theta]

    STATE = ("_updates", "_fading", "_sum")

    def update(self) -> None:
        """Update the average after the weights have moved."""
        self._updates += 1
        if self._updates % self._every:
            return
        self._fading *= self._keeps
        share = (1 - self._keeps) / (1 - self._fading)
        now = [t.to(a.dtype) for t, a in zip(self._theta, self._sum, strict=True)]
        torch._foreach_lerp_(self._sum, now, share)

    @property
    def values(self) -> list[Tensor]:
        """Return a_k in the types of the weights."""
        return [a.to(t.dtype) for a, t in zip(self._sum, self._theta, strict=True)]
