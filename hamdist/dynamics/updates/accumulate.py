"""The gradients of a sample's micro-batches, added up until its weights move (microbatches.py).

Gradients that come as factors (vjp/gradient.py) stay so, their rows joined, as long as these are
fewer numbers than the weight has: the product over all rows is then made once, where the weight
moves. R: rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from hamdist.dynamics.saved_state.stateful import Stateful
from hamdist.dynamics.vjp.gradient import (
    Column,
    Factors,
    Gradient,
    Gradients,
    Outer,
    TableRows,
    Unused,
    add_to,
    dense,
)

Sum: TypeAlias = Tensor | Unused | list[Factors]
Copies: TypeAlias = dict[tuple[int, ...], Tensor]  # by the identities of what was copied


class GradientSum(Stateful):
    """The sum of the gradients of a function's weights, in separate memory."""

    def __init__(self) -> None:
        self._sums: list[Sum] | None = None

    STATE = ("_sums",)

    def add(self, g: Sequence[Gradient]) -> None:
        """Add the gradients of one micro-batch, whose memory may be used again afterwards."""
        if isinstance(g, Gradients):
            g.complete()
        copies: Copies = {}
        before: Sequence[Sum] = self._sums or [[] for _ in g]
        self._sums = [_added(total, g_i, copies) for total, g_i in zip(before, g, strict=True)]

    def take(self) -> list[Gradient] | None:
        """Return the sum, and begin anew; None where nothing was added."""
        sums, self._sums = self._sums, None
        copies: Copies = {}
        if sums is None:
            return None
        return [_joined(total, copies) if isinstance(total, list) else total for total in sums]


def _added(total: Sum, g_i: Gradient, copies: Copies) -> Sum:
    if isinstance(g_i, Unused):
        return g_i if isinstance(total, list) and not total else total
    if isinstance(total, Unused):
        total = []
    if isinstance(total, list):
        if not isinstance(g_i, Tensor) and _stays(total, g_i, copies):
            return [*total, _joined([g_i], copies)]
        if not total:
            return g_i.clone() if isinstance(g_i, Tensor) else g_i.dense()
        total = dense(_joined(total, {}))
    add_to(total, g_i, 1.0)
    return total


def _stays(total: Sequence[Factors], factors: Factors, copies: Copies) -> bool:
    """Return True if a sum stays in factors; for a bias, if that of its matrix does."""
    if isinstance(factors, Column):
        return (id(factors.z),) in copies
    outputs = factors.z.shape[1]
    inputs, columns = (factors.x.shape[1],) * 2 if isinstance(factors, Outer) else (factors.many, 1)
    return sum(len(part.z) for part in (*total, factors)) * (outputs + columns) <= outputs * inputs


def _joined(parts: Sequence[Factors], copies: Copies) -> Factors:
    """Return the parts as one, copied; tensors that two gradients share are copied once."""

    def rows(*tensors: Tensor) -> Tensor:
        key = tuple(map(id, tensors))
        if key not in copies:
            copies[key] = torch.cat(tensors)
        return copies[key]

    z = rows(*(part.z for part in parts))
    first = parts[0]
    if isinstance(first, Outer):
        return Outer(z, rows(*(part.x for part in parts if isinstance(part, Outer))))
    if isinstance(first, TableRows):
        index = rows(*(part.index for part in parts if isinstance(part, TableRows)))
        return TableRows(index, z, first.many)
    return Column(z)
