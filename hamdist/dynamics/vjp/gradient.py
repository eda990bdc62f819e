"""Gradients as their factors, as closed forms return them, without a tensor of a weight's size.

An update by them is one product that adds into the weight.

R: rows (batch, times further dimensions), O, I: outputs and inputs of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from hamdist.dynamics.native import rows
from hamdist.dynamics.saved_state.stateful import registered

# A product of two vectors that is added to a matrix of this size or more is faster as `addr_` than
# as `addmm_` (1024 x 1024 on a core of an EPYC 9004: 100 against 150 us; 256 x 256: 11 against 8).
BY_VECTORS = 1 << 18


@dataclass(frozen=True, slots=True)
class AtOnce:
    """Permission to move weights as soon as their gradient is computed: theta_i += rates_i g_i.

    It holds where the norm of a layer's gradient is not above `limit`.
    """

    rates: tuple[float, ...]
    limit: float


class Gradients(list["Gradient | None"]):
    """The gradients of a function's weights, filled in by a pull.

    moved: number of weights that have moved already. later: functions that compute gradients on
    demand (`complete`), to be called before the pull after the next.
    """

    def __init__(self, many: int, at_once: AtOnce | None = None) -> None:
        super().__init__([None] * many)
        self.at_once = at_once
        self.moved = 0
        self.later: list[Callable[[Gradients], None]] = []  # (of which none may hold this list)

    def put(self, places: Sequence[int | None], gradients: Sequence[Gradient | None]) -> None:
        """Set the gradients of a kernel's weights, each at its place; None: not trained."""
        for place, gradient in zip(places, gradients, strict=True):
            if place is not None:
                self[place] = gradient

    def complete(self) -> None:
        """Compute the gradients that were deferred."""
        later, self.later = self.later, []
        for make in later:
            make(self)


@registered("Outer")
@dataclass(slots=True)
class Outer:
    """g = z^T x, of a matrix (O, I). z: (R, O), x: (R, I). moved: the weight has moved by it."""

    z: Tensor
    x: Tensor
    moved: bool = False

    def dense(self) -> Tensor:
        """Return g itself."""
        g = self.x.new_empty(self.z.shape[1], self.x.shape[1])
        if not rows.add_outer(g, self.z, self.x, 1.0, 0.0):
            torch.mm(self.z.t(), self.x, out=g)
        return g

    def add_to(self, tensor: Tensor, alpha: float, beta: float = 1.0) -> None:
        """Set tensor = beta tensor + alpha g, in place."""
        if self.z.shape[0] == 1 and beta == 1 and tensor.numel() >= BY_VECTORS:
            tensor.addr_(self.z.view(-1), self.x.view(-1), alpha=alpha)
        elif not rows.add_outer(tensor, self.z, self.x, alpha, beta):
            tensor.addmm_(self.z.t(), self.x, beta=beta, alpha=alpha)


@registered("Column")
@dataclass(slots=True)
class Column:
    """g = sum of the rows of z, of a bias (O,). z: (R, O). moved: as in `Outer`."""

    z: Tensor
    moved: bool = False

    def dense(self) -> Tensor:
        """Return g itself."""
        return self.z.sum(0)

    def add_to(self, tensor: Tensor, alpha: float, beta: float = 1.0) -> None:
        """Set tensor = beta tensor + alpha g, in place."""
        rows = self.z.shape[0]
        if rows == 1 and beta == 1:
            tensor.add_(self.z.view(-1), alpha=alpha)
        else:
            tensor.addmv_(self.z.t(), self.z.new_ones(rows), beta=beta, alpha=alpha)


@registered("Rows")
@dataclass(slots=True)
class TableRows:
    """g_i = sum of the rows z_r with index_r = i, of a table (N, O). index: (R,), z: (R, O)."""

    index: Tensor
    z: Tensor
    many: int
    moved: bool = False

    def dense(self) -> Tensor:
        """Return g itself."""
        table = self.z.new_zeros(self.many, self.z.shape[1])
        return table.index_add_(0, self.index, self.z)

    def add_to(self, tensor: Tensor, alpha: float, beta: float = 1.0) -> None:
        """Set tensor = beta tensor + alpha g, in place."""
        if beta != 1:
            tensor.mul_(beta)
        tensor.index_add_(0, self.index, self.z, alpha=alpha)


@registered("Unused")
@dataclass(slots=True)
class Unused:
    """g = 0, of a weight that a pass did not use: its step is left out, as torch's optimisers do.

    zero: one number of its type.
    """

    zero: Tensor
    shape: tuple[int, ...]
    moved: bool = False

    def dense(self) -> Tensor:
        """Return g itself."""
        return self.zero.new_zeros(self.shape)

    def add_to(self, tensor: Tensor, alpha: float, beta: float = 1.0) -> None:  # noqa: ARG002
        """Set tensor = beta tensor, in place."""
        if beta != 1:
            tensor.mul_(beta)


Factors: TypeAlias = Outer | Column | TableRows
Gradient: TypeAlias = Tensor | Factors | Unused


def with_unused(g: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[Gradient]:
    """Return the gradients of `weights`, with `Unused` in the place of None."""
    return [
        Unused(w.new_zeros(()), tuple(w.shape)) if g_i is None else g_i
        for g_i, w in zip(g, weights, strict=True)
    ]


def dense(g: Gradient) -> Tensor:
    """Return g as a tensor like its weight."""
    return g if isinstance(g, Tensor) else g.dense()


def has_moved(g: Gradient) -> bool:
    """Return True if the weight has moved by g already."""
    return not isinstance(g, Tensor) and g.moved


def all_moved(g: Sequence[Gradient] | None) -> bool:
    """Return True if all weights have moved by g already."""
    return isinstance(g, Gradients) and g.moved == len(g)


def all_dense(g: Sequence[Gradient]) -> list[Tensor]:
    """Return the gradients as tensors like their weights."""
    return [dense(g_i) for g_i in g]


def add_to(tensor: Tensor, g: Gradient, alpha: float, beta: float = 1.0) -> None:
    """Set tensor = beta tensor + alpha g, in place."""
    if not isinstance(g, Tensor):
        g.add_to(tensor, alpha, beta)
        return
    if beta != 1:
        tensor.mul_(beta)
    tensor.add_(g, alpha=alpha)


def _norms(tensors: list[Tensor]) -> list[float]:
    norms = [rows.norm(t) for t in tensors]
    if None in norms:
        return [float(n) for n in torch._foreach_norm(tensors)]
    return cast("list[float]", norms)


def norm_of(g: Sequence[Gradient]) -> float:
    """Return |g|, of all of g together.

    |z^T x|^2 = sum_rs (z_r . z_s)(x_r . x_s), which for R rows costs R^2 (O + I) instead of the R O
    I of the product itself; the cheaper one is taken.
    """
    squares = 0.0
    for g_i in g:
        if isinstance(g_i, Unused):
            continue
        if isinstance(g_i, Outer):
            rows_, out, into = *g_i.z.shape, g_i.x.shape[1]
            if rows_ * (out + into) < out * into:
                together = (g_i.z @ g_i.z.t()).mul_(g_i.x @ g_i.x.t())
                squares += max(0.0, float(together.sum()))
                continue
        squares += float(torch.linalg.vector_norm(dense(g_i))) ** 2
    return math.sqrt(squares)


def norm_bound(g: Sequence[Gradient]) -> float:
    """Return a number that the norm of all of g together does not exceed, or NaN.

    All norms are taken in one call: |z^T x| <= |z| |x| (Frobenius), and R rows of z add up to at
    most sqrt(R) |z|.
    """
    looked: list[Tensor] = []
    shares: list[tuple[float, int, int]] = []  # a factor, and one or two of the norms
    last: Tensor | None = None  # a layer's matrix and bias have one z
    for g_i in g:
        if isinstance(g_i, Unused):
            continue
        if isinstance(g_i, Outer):
            shares.append((1.0, len(looked), len(looked) + 1))
            last = g_i.z
            looked += (last, g_i.x)
        elif isinstance(g_i, Tensor):
            shares.append((1.0, len(looked), -1))
            looked.append(g_i)
            last = None
        else:
            if g_i.z is not last:  # its norm stands one before the last
                last = g_i.z
                looked += (last, last)
            shares.append((math.sqrt(g_i.z.shape[0]), len(looked) - 2, -1))
    norms = _norms(looked)
    squares = 0.0
    for factor, a, b in shares:
        norm = factor * norms[a] * (1.0 if b < 0 else norms[b])
        squares += norm * norm
    return math.sqrt(squares)
