"""Pairs of states, held in one tensor whose halves on axis 1 are a and b.

B: batch, n: features of one state, or channels of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class InverseStep(NamedTuple):
    """Result of one map run backwards.

    x: its input; message: the vector-Jacobian product for x, of its shape; g: gradients by
    parameter of the map, None of one that it has not used.
    """

    x: Tensor
    message: Tensor
    g: list[Tensor | None]


class InvertibleMap(nn.Module, ABC):
    """One invertible map. Final classes define the inverse; they are used as plain modules."""

    @property
    def decay(self) -> float:
        """Return |lambda| tau of the leak, in this one step."""
        return 0.0

    @property
    def theta(self) -> list[nn.Parameter]:
        """Return the parameters that learn."""
        return [p for p in self.parameters() if p.requires_grad]

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """Return the x with forward(x) = y.

        Args:
            y: the output of `forward`.
        """

    @abstractmethod
    def back(self, y: Tensor, message: Tensor) -> InverseStep:
        """Return the x that led to y, the message to it, and the gradients.

        Args:
            y: the output of `forward`.
            message: about y, of its shape.
        """


class ToPair(InvertibleMap):
    """Pair of twice the same state: x -> (x, x), from (B, n, ...) to (B, 2n, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the pair (x, x), (B, 2 H, ...).

        Args:
            x: (B, H, ...).
        """
        return torch.cat([x, x], 1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return x, (B, H, ...), of the pair (x, x)."""
        return halves(y)[0]

    def back(self, y: Tensor, message: Tensor) -> InverseStep:
        """Return the input of `forward`, the message to it, and no gradients."""
        m_a, m_b = halves(message)
        return InverseStep(halves(y)[0].contiguous(), m_a + m_b, [])


class SecondHalf(nn.Module):
    """Second state of a pair, h_N of a midpoint chain, from (B, 2n, ...) to (B, n, ...).

    It is not invertible, so it belongs to the block of the readout.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the second half of a pair, (B, H, ...).

        Args:
            x: the pair, (B, 2 H, ...).
        """
        return halves(x)[1]


class MeanHalf(nn.Module):
    """Mean of the two states of a pair, from (B, 2n, ...) to (B, n, ...).

    It is not invertible, so it belongs to the block of the readout.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of the two halves of a pair, (B, H, ...).

        Args:
            x: the pair, (B, 2 H, ...).
        """
        a, b = halves(x)
        return 0.5 * (a + b)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and b, as views; raise ValueError for a tensor that cannot be halved on axis 1."""
    if x.dim() < 2 or x.shape[1] % 2:
        raise ValueError(
            f"a pair of states is one tensor with an even number of features on axis 1, received "
            f"{tuple(x.shape)}; give the module before it twice as many outputs, or use ToPair"
        )
    a, b = x.chunk(2, 1)
    return a, b
