"""Values of a traced model as the columns of one signal, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from hamdist.dynamics.tracing.program import SymbolicSize


@dataclass(frozen=True, slots=True)
class ColumnForm:
    """Shape and dtype of a value for any batch.

    dims: per dimension; None where they depend on the values themselves. masked: it holds the -inf
    of a mask, or a number as large.
    """

    dims: tuple[SymbolicSize, ...] | None
    dtype: torch.dtype
    masked: bool = False

    @property
    def batch_first(self) -> bool:
        """Return True for (B, ...) with the rest fixed."""
        dims = self.dims
        return bool(dims) and dims is not None and dims[0] == SymbolicSize(1) and _fixed(dims[1:])

    @property
    def free(self) -> bool:
        """Return True if the shape is the same for every batch."""
        return self.dims is not None and _fixed(self.dims)

    @property
    def sendable(self) -> bool:
        """Return True if it can be one or more columns of a signal (B, ...)."""
        if self.dims is None or not self.dtype.is_floating_point or self.masked:
            return False
        moving = [d for d in self.dims if d.batched]
        whole = all(not d.more and not any(a for _, a, _ in d.lengths) for d in moving)
        return len(moving) <= 1 and whole and all(d.by_row > 0 for d in moving)

    @property
    def columns(self) -> int:
        """Return the numbers per row of the signal that carries it."""
        return math.prod(d.by_row for d in self.dims or ())


def _fixed(dims: Sequence[SymbolicSize]) -> bool:
    return not any(d.batched for d in dims)


def packed(batch: int, values: Sequence[Tensor], forms: Sequence[ColumnForm]) -> Tensor:
    """Return values of one batch as one signal (B, columns), of the widest of their dtypes.

    A value without batch is repeated in every row, so that the messages about its copies add up to
    the one about itself.
    """
    dtype = reduce(torch.promote_types, [value.dtype for value in values])
    columns = []
    for value, form in zip(values, forms, strict=True):
        if form.free:
            flat = value.reshape(1, -1).expand(batch, -1)
        else:
            front = _moving(form)
            moved = value.movedim(front, 0) if _plain(form) else value
            flat = moved.reshape(batch, -1)
        columns.append(flat.to(dtype))
    return columns[0] if len(columns) == 1 else torch.cat(columns, 1)


def unpacked(
    h: Tensor,
    before: Sequence[tuple[bool, Sequence[int]]],
    dims: Sequence[int],
    form: ColumnForm,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return one value, of shape `dims`, from a signal.

    before: of the values in front of it, True if they are without batch, and their shapes. dtype:
    of a value that was sent with others of other dtypes; None: that of the signal, which may be the
    reader's (runtime/plan/dtypes.py).
    """
    batch, dtype = h.shape[0], dtype or h.dtype
    first = sum(_columns(free, shape, batch) for free, shape in before)
    width = _columns(form.free, dims, batch)
    columns = h if width == h.shape[1] else h[:, first : first + width]
    dims = list(dims)
    if form.free:
        return columns[0].reshape(dims).to(dtype)
    if not _plain(form):
        return columns.reshape(dims).to(dtype)
    front = _moving(form)
    rest = dims[:front] + dims[front + 1 :]
    return columns.reshape([batch, *rest]).movedim(0, front).to(dtype)


def _columns(free: bool, shape: Sequence[int], batch: int) -> int:
    return math.prod(shape) // (1 if free else batch)


def _moving(form: ColumnForm) -> int:
    """Return the dimension of the batch."""
    return next(i for i, d in enumerate(form.dims or ()) if d.batched)


def _plain(form: ColumnForm) -> bool:
    """Return True if that dimension is the batch itself."""
    return (form.dims or ())[_moving(form)] == SymbolicSize(1)
