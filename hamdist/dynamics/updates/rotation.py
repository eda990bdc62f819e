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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

from hamdist.dynamics.saved_state.stateful import Stateful

Pair: TypeAlias = "list[Tensor | None]"  # of the costates (O, O) and the inputs (I, I)


@torch.no_grad()
def eigenvectors(factors: Pair) -> Pair:
    """Return Q of each factor, in columns; None for one that is none, or is not finite.

    LAPACK does not come to an end on factors of tiny numbers: they are scaled, which leaves Q.
    """
    torch.get_num_threads()  # (a new thread computes with as many as the others from here on)
    bases: Pair = []
    for f in factors:
        largest = 0.0 if f is None else float(f.abs().max())
        if f is None or not math.isfinite(largest):
            bases.append(None)
        else:
            scaled = f.double() / largest if largest else f.double()
            bases.append(torch.linalg.eigh(scaled)[1].to(f.dtype))
    return bases


class Rotation(Stateful):
    """The axes of one layer: `bases` (Q_B, Q_A), and the `factors` that the next will be of."""

    STATE = ("bases", "factors")

    def __init__(self) -> None:
        self.bases: Pair = [None, None]
        self.factors: Pair | None = None
        self._computed: Future[Pair] | None = None
        self._turn: Pair | None = None  # T^2 of both sides, until `turned` has used it

    def refresh(self, factors: Pair) -> None:
        """Begin to compute the axes of `factors`, which nothing changes."""
        thread = ThreadPoolExecutor(1)
        self.factors, self._computed = factors, thread.submit(eigenvectors, factors)
        thread.shutdown(wait=False)

    def take(self) -> None:
        """Use the axes that `refresh` has asked for (computed now if a snapshot was between)."""
        if self.factors is None:
            return
        bases = self._computed.result() if self._computed else eigenvectors(self.factors)
        self.factors, self._computed, before = None, None, self.bases
        self.bases = [b if q is None else q for q, b in zip(bases, before, strict=True)]
        self._turn = [
            None if q is None else (q.t() if old is None else q.t() @ old).square()
            for q, old in zip(self.bases, before, strict=True)
        ]

    def into(self, weight: Tensor) -> Tensor:
        """Return Q_B^T W Q_A, in the shape of W (O, ...)."""
        return _between(weight, [None if q is None else q.t() for q in self.bases])

    def back(self, weight: Tensor) -> Tensor:
        """Return Q_B W Q_A^T."""
        return _between(weight, self.bases)

    def turned(self, squares: Tensor) -> Tensor:
        """Return v in the axes of today, once after each change of them."""
        turn, self._turn = self._turn or [None, None], None
        return _between(squares, turn)


def _between(weight: Tensor, sides: Pair) -> Tensor:
    """Return L W R^T."""
    flat, (left, right) = weight.flatten(1), sides
    flat = flat if left is None else left @ flat
    return (flat if right is None else flat @ right.t()).view_as(weight)


class Axes:
    """The axes of a block's weights: place of a matrix, of its bias, mu and rotation by layer."""

    def __init__(self, layers: Sequence[tuple[int, int, Tensor, Rotation]]) -> None:
        self._layers = layers

    def turned(self, squares: Sequence[Tensor]) -> list[Tensor]:
        """Return v of all weights in the axes of today."""
        return self._each(squares, Rotation.turned)

    def into(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return gradients, or omega, in the axes."""
        return self._each(tensors, Rotation.into)

    def _each(
        self, tensors: Sequence[Tensor], rotate: Callable[[Rotation, Tensor], Tensor]
    ) -> list[Tensor]:
        result = list(tensors)
        for weight, _, _, rotation in self._layers:
            result[weight] = rotate(rotation, result[weight])
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
        steps = self._each(steps, Rotation.back)
        for weight, bias, mean, _ in self._layers:
            steps[bias] = steps[bias] - torch.mv(steps[weight].flatten(1), mean)
        torch._foreach_add_(list(theta), steps)


NO_AXES = Axes(())
