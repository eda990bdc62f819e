"""Tensors in memory as a stream.

N: rows, B: batch, O: outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from hamdist.errors import SettingsError, StreamError
from hamdist.streams.sample import Sample, SampleSpec, generator


class ArrayStream:
    """Batches of the rows of two tensors, in one seeded order.

    The order is one long sequence of rows: one permutation per epoch after the other, each drawn
    from (seed, epoch) alone. Batches are cut from that sequence, so a batch may hold the end of one
    epoch and the beginning of the next.

    Samples are fresh, contiguous tensors; x and y are kept by reference and never written. Beside
    them a running stream keeps at most N + B row numbers. Portable: each `samples()` gives the
    same samples, in any process.

    Args:
        x: inputs (N, ...).
        y: integer classes (N,), or floating-point values (N, O).
        shuffled: False to take the rows in their given order.
        endless: False to stop after one epoch, the last batch being the shorter one.
        classes: number of classes of integer targets; None for the largest one in `y` plus one.
        uneven: True to end each epoch with a shorter batch (where `batch` does not divide N).
        tokens: number of different tokens, where x holds their numbers.

    Raises:
        SettingsError: `batch` below 1, or `classes` with floating-point targets.
        StreamError: tensors that are empty, differ in length, or hold targets that are no targets.
    """

    portable: bool = True

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch: int,
        seed: int,
        *,
        shuffled: bool = True,
        endless: bool = True,
        classes: int | None = None,
        uneven: bool = False,
        tokens: int | None = None,
    ) -> None:
        if batch < 1:
            raise SettingsError(f"batch is {batch}; a batch has at least 1 row")
        for name, value in (("x", x), ("y", y)):
            if not isinstance(value, Tensor) or value.dim() == 0:
                raise StreamError(
                    f"{name} is {_kind(value)}; give a torch tensor with the rows in front "
                    "(torch.from_numpy makes one of an array)"
                )
        if len(x) != len(y):
            raise StreamError(f"x has {len(x)} rows and y has {len(y)}: one target per input")
        if len(x) == 0:
            raise StreamError("x and y have no rows: a stream needs at least one")
        self._x = x
        self._y, self._classes = _targets(y, classes)
        self._batch = batch
        self._seed = seed
        self._shuffled = shuffled
        self._endless = endless
        self._uneven = uneven
        self._tokens = tokens

    @property
    def spec(self) -> SampleSpec:
        """Return the shapes of a full batch (of the only one, if an epoch is shorter)."""
        varies = self._uneven or not self._endless
        batch = min(self._batch, len(self._x)) if varies else self._batch
        return SampleSpec(
            (batch, *self._x.shape[1:]),
            self._x.dtype,
            (batch, *self._y.shape[1:]),
            self._y.dtype,
            self._classes,
            tokens=self._tokens,
        )

    def samples(self) -> Iterator[Sample]:
        """Yield the samples from sample 0 on: u (B, ...), y (B,) or (B, O)."""
        for rows in self._batches():
            yield Sample(self._x.index_select(0, rows), self._y.index_select(0, rows))

    def _batches(self) -> Iterator[Tensor]:
        if not self._endless:
            yield from torch.split(self._epoch(0), self._batch)
            return
        waiting = torch.empty(0, dtype=torch.int64)
        for epoch in count():
            waiting = torch.cat([waiting, self._epoch(epoch)])
            ready = len(waiting) if self._uneven else len(waiting) - len(waiting) % self._batch
            if ready:  # an empty tensor splits into one empty piece
                yield from torch.split(waiting[:ready], self._batch)
            waiting = waiting[ready:]

    def _epoch(self, epoch: int) -> Tensor:
        if not self._shuffled:
            return torch.arange(len(self._x))
        return torch.randperm(len(self._x), generator=generator("order", self._seed, epoch))


def _targets(y: Tensor, classes: int | None) -> tuple[Tensor, int | None]:
    """Return targets as losses take them (int64 classes, or floats), and the number of classes."""
    if y.is_floating_point():
        if classes is not None:
            raise SettingsError(
                f"classes={classes} with targets of {y.dtype}: classes are integers (y.long()), "
                "real-valued targets have no `classes`"
            )
        if y.dim() < 2:
            raise StreamError(
                f"y has shape {tuple(y.shape)}: real-valued targets are (N, O); "
                "for one output per row use y.unsqueeze(1)"
            )
        return y, None
    if y.dtype == torch.bool or y.is_complex():
        raise StreamError(f"y has dtype {y.dtype}; targets are integer classes or float values")
    if y.dim() != 1:
        raise StreamError(
            f"y has shape {tuple(y.shape)}: integer targets are classes, (N,); "
            "convert real-valued targets to a floating-point dtype"
        )
    y = y.to(torch.int64)
    low, high = (int(bound) for bound in torch.aminmax(y))
    classes = high + 1 if classes is None else classes
    if low < 0 or high >= classes:
        row = int(((y < 0) | (y >= classes)).nonzero()[0])
        raise StreamError(
            f"y[{row}] is {int(y[row])}; with {classes} classes targets are 0 to {classes - 1}"
        )
    return y, classes


def _kind(value: object) -> str:
    return "a tensor without dimensions" if isinstance(value, Tensor) else type(value).__name__
