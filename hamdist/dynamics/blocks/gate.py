"""Two local quantities by which a held block accounts for the delay of its messages.

gate      a counter of the ticks for which the input x has been still,

              s_k = s_{k-1} + 1  where |x_k - x_{k-1}| <= epsilon |x_k|,  else 0,

          and weights move only where s_k >= d: then the message that is there now, which answers to
          the input of d ticks ago, meets an input that is the same. Memory: one input.

retrospective   an estimate of that input from one state e of the input's size,

              e_k = e_{k-1} + (x_k - e_{k-1}) / T,    T = 1 + d/a,    x^_k = x_k + a (e_k - x_k)

          with which the block makes its own gradient; messages are made at x_k, as ever. a = 1 is a
          leaky average, a = 2 the first-order (Pade) delay, a -> inf x_k - d (x_k - x_{k-1}).

d: ticks from a sample's arrival at the block to that of the message about it, 2(D - l).
B: batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hamdist.dynamics.saved_state.stateful import Stateful


class Gate(Stateful):
    """Counter of still ticks. ticks: d; tolerance: epsilon, of all inputs together."""

    def __init__(self, ticks: int, tolerance: float) -> None:
        self.still = 0
        self._ticks = ticks
        self._tolerance = tolerance
        self._before: list[Tensor] | None = None

    STATE = ("still", "_before")

    def open(self, inputs: Sequence[Tensor]) -> bool:
        """Record this tick's inputs; return True if weights may move in it."""
        before, self._before = self._before, list(inputs)
        if not self._ticks:
            return True
        alike = before is not None and self._alike(before, inputs)
        self.still = self.still + 1 if alike else 0
        return self.still >= self._ticks

    def _alike(self, before: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
        if all(a is b for a, b in zip(before, inputs, strict=True)):
            return True
        apart = size = 0.0
        for a, b in zip(before, inputs, strict=True):
            if a.shape != b.shape:
                return False
            apart += float((b.double() - a.double()).square().sum())
            size += float(b.double().square().sum())
        return apart <= self._tolerance**2 * size


class RetrospectiveInput(Stateful):
    """Estimate of the input of d ticks ago.

    ticks: d; blend: a. Inputs that are no real numbers stay as they are.
    """

    def __init__(self, ticks: int, blend: float) -> None:
        self._keep = 1 / (1 + ticks / blend)
        self._blend = blend
        self._e: list[Tensor] | None = None

    STATE = ("_e",)

    def estimate(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Record this tick's inputs x_k; return x^_k."""
        if self._e is None or any(e.shape != x.shape for e, x in zip(self._e, inputs, strict=True)):
            self._e = [x.detach().clone() for x in inputs]
        estimates = []
        for e, x in zip(self._e, inputs, strict=True):
            if not x.is_floating_point():
                estimates.append(x)
                continue
            e.add_(x - e, alpha=self._keep)
            estimates.append(torch.add(x, e - x, alpha=self._blend))
        return estimates
