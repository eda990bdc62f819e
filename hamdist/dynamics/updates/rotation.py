"""Adam's steps along the axes of a layer's curvature instead of along single weights.

For a linear layer y = W (x - mu) + c with gradients G = z^T (x - mu) of W and g_c = sum of the rows
of z (whitening.py has mu and A), from the layer's own inputs and costates alone:

    A, B  = running means of (x - mu)^T (x - mu) / R and z^T z / R      A = Q_A D Q_A^T, B likewise
    d     = Q_B^T G Q_A,     v <- r v + (1 - r) d^2
    dW    = Q_B [ Q_B^T omega Q_A / (sqrt(v) + epsilon) ] Q_A^T         (Adam's corrections besides)
    dc    = Adam's step along g_c,     db = dc - dW mu,                  as b = c - W mu

with omega the momentum of G (equal to G without one). The eigenvectors of the Kronecker factors A
and B are the axes in which curvature is close to diagonal, so that delay, which limits a step by
the curvature of its direction, limits each direction by itself. (SOAP: Vyas et al. 2024, Algorithm
3, there with factors G^T G and G G^T; K-FAC's factors: Martens and Grosse 2015.) One side alone:
Q_B = 1.

Every `refresh`-th update hands A and B to a thread, whose eigenvectors are used from half as many
updates later on, whatever time it takes: steps do not depend on it. Then v, a diagonal in the old
axes, becomes the diagonal of the same matrix in the new ones:

    v <- T_B^2 v (T_A^2)^T,     T = Q_new^T Q_old,  squared by element
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hamdist.dynamics.saved_state.remember import Remembers

Pair: TypeAlias = "list[Tensor | None]"  # of the costates (O, O) and the inputs (I, I)


@torch.no_grad()
def eigenvectors(factors: Pair) -> Pair:
    """Return Q of each factor, in columns; None for one that is none, or is not finite.

    LAPACK does not come to an end on factors of tiny numbers: they are scaled, which leaves Q.
    """
    torch.get_num_threads()  # (a new thread computes with as many as the others from here on)
    found: Pair = []
    for f in factors:
        largest = 0.0 if f is None else float(f.abs().max())
        if f is None or not math.isfinite(largest):
            found.append(None)
        else:
            scaled = f.double() / largest if largest else f.double()
            found.append(torch.linalg.eigh(scaled)[1].to(f.dtype))
    return found


class Rotation(Remembers):
    """The axes of one layer: `bases` (Q_B, Q_A), and the `factors` that the next will be of."""

    STATE = ("bases", "factors")

    def __init__(self) -> None:
        self.bases: Pair = [None, None]
        self.factors: Pair | None = None
        self._computed: Future[Pair] | None = None
        self._turn: Pair | None = None  # T^2 of both sides, until `turned` has used it

    def refresh(self, factors: Pair, *, at_once: bool) -> None:
        """Begin to compute the axes of `factors`, which nothing changes; at_once: take them."""
        self.factors, self._computed = factors, None
        if at_once:
            self.take()
            return
        thread = ThreadPoolExecutor(1)
        self._computed = thread.submit(eigenvectors, factors)
        thread.shutdown(wait=False)

    def take(self) -> None:
        """Use the axes that `refresh` has asked for (computed now if a snapshot was between)."""
        if self.factors is None:
            return
        found = self._computed.result() if self._computed else eigenvectors(self.factors)
        self.factors = self._computed = None
        new = [old if q is None else q for q, old in zip(found, self.bases, strict=True)]
        self._turn = [
            None if q is None else (q.t() if old is None else q.t() @ old).square()
            for q, old in zip(new, self.bases, strict=True)
        ]
        self.bases = new

    def into(self, weight: Tensor) -> Tensor:
        """Return Q_B^T W Q_A, in the shape of W (O, ...)."""
        b, a = self.bases
        return _between(weight, None if b is None else b.t(), a)

    def back(self, weight: Tensor) -> Tensor:
        """Return Q_B W Q_A^T."""
        b, a = self.bases
        return _between(weight, b, None if a is None else a.t())

    def turned(self, squares: Tensor) -> Tensor:
        """Return v in the axes of today, once after each change of them."""
        if self._turn is None:
            return squares
        (b, a), self._turn = self._turn, None
        return _between(squares, b, None if a is None else a.t())

    def restore(self, state: Any) -> None:
        """Continue from `state`; raise SnapshotError where it is that of another class."""
        super().restore(state)
        self._computed = self._turn = None


def _between(weight: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    flat = weight.flatten(1)
    if left is not None:
        flat = left @ flat
    if right is not None:
        flat = flat @ right
    return flat.view_as(weight)


class Axes:
    """The axes of a block's weights: `rotations` by place of a matrix, with its bias and mu."""

    def __init__(self, layers: Sequence[tuple[int, int, Tensor, Rotation]]) -> None:
        self._layers = layers

    def turned(self, squares: Sequence[Tensor]) -> list[Tensor]:
        """Return v of all weights in the axes of today."""
        result = list(squares)
        for weight, _, _, rotation in self._layers:
            result[weight] = rotation.turned(result[weight])
        return result

    def into(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return gradients, or omega, in the axes."""
        result = list(tensors)
        for weight, _, _, rotation in self._layers:
            result[weight] = rotation.into(result[weight])
        return result

    def move(
        self,
        theta: Sequence[Tensor],
        omega: Sequence[Tensor],
        roots: Sequence[Tensor],
        rates: Sequence[float],
    ) -> None:
        """Set theta += rate omega / root, by element in the axes; db = dc - dW mu."""
        if not self._layers:
            for t, o, root, rate in zip(theta, omega, roots, rates, strict=True):
                t.addcdiv_(o, root, value=rate)
            return
        steps = list(torch._foreach_div(self.into(omega), list(roots)))
        torch._foreach_mul_(steps, list(rates))
        for weight, bias, mean, rotation in self._layers:
            steps[weight] = rotation.back(steps[weight])
            steps[bias] = steps[bias] - torch.mv(steps[weight].flatten(1), mean)
        torch._foreach_add_(list(theta), steps)


NO_AXES = Axes(())
