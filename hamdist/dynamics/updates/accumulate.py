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
    add_to,
    dense,
)

Copies: TypeAlias = dict[tuple[int, ...], Tensor]  # by the identities of what was copied


class GradientSum(Stateful):
    """The sum of the gradients of a function's weights, in separate memory."""

    def __init__(self) -> None:
        self._sums: list[Tensor | list[Factors]] | None = None

    STATE = ("_sums",)

    def add(self, g: Sequence[Gradient]) -> None:
        """Adds the gradients of one micro-batch, whose memory may be used again afterwards."""
        if isinstance(g, Gradients):
            g.settle()
        copies: Copies = {}
        before = self._sums or [[] for _ in g]
        self._sums = [_added(total, one, copies) for total, one in zip(before, g, strict=True)]

    def take(self) -> list[Gradient] | None:
        """Returns the sum, and begins anew; None where nothing was added."""
        sums, self._sums = self._sums, None
        copies: Copies = {}
        if sums is None:
            return None
        return [one if isinstance(one, Tensor) else _joined(one, copies) for one in sums]


def _added(total: Tensor | list[Factors], one: Gradient, copies: Copies) -> Tensor | list[Factors]:
    if isinstance(total, list):
        if not isinstance(one, Tensor) and _stays(total, one, copies):
            return [*total, _joined([one], copies)]
        if not total:
            return one.clone() if isinstance(one, Tensor) else one.dense()
        total = dense(_joined(total, {}))
    add_to(total, one, 1.0)
    return total


def _stays(total: Sequence[Factors], one: Factors, copies: Copies) -> bool:
    """Return True if a sum stays in factors; for a bias, if that of its matrix does."""
    if isinstance(one, Column):
        return (id(one.z),) in copies
    outputs = one.z.shape[1]
    inputs, columns = (one.x.shape[1],) * 2 if isinstance(one, Outer) else (one.many, 1)
    return sum(len(part.z) for part in (*total, one)) * (outputs + columns) <= outputs * inputs


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
