"""The gate between a stream and a network: unusable samples stop the run, and say why.

B: batch, O: outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hamdist.errors import StreamError
from hamdist.streams.sample import Sample, SampleSpec

ALIGNMENT = 64  # bytes; what torch's CPU allocator gives, and vector instructions like


class Checker:
    """Compares every item with what the stream said its items are.

    equal_batches: all items must have the batch of `spec` (levels that hold samples mix
    neighbouring ones); otherwise batches may differ, the other dimensions may not.
    """

    def __init__(self, spec: SampleSpec, *, equal_batches: bool) -> None:
        self._spec = spec
        self._equal_batches = equal_batches

    def check(self, n: int, sample: Sample) -> Sample:
        """Item n with u and y contiguous, aligned to 64 bytes, and alone in their storage.

        The sample itself where it is so already. Raises StreamError naming the item, the field,
        the value received and the remedy: for a wrong type, dtype or shape, another batch size
        (in y than in u, or, with equal_batches, than before), NaN or infinity in floating-point
        values, and class targets outside 0 ... classes - 1.
        """
        u = self._input(n, sample.u)
        y = None if sample.y is None else self._target(n, sample.y, u.shape[0])
        if u is sample.u and y is sample.y:
            return sample
        return Sample(u, y, sample.end, sample.time)

    def _input(self, n: int, u: Tensor) -> Tensor:
        spec = self._spec
        _check_dtype(n, "u", u, spec.u_dtype)
        if u.dim() == 0 or u.shape[1:] != spec.u_shape[1:]:
            raise StreamError(
                f"item {n}: u has shape {tuple(u.shape)}, earlier ones had {_rows(spec.u_shape)}: "
                "every item is a batch, (B, ...), whose rows have one shape; reshape it, or add "
                "the batch dimension"
            )
        if self._equal_batches and u.shape[0] != spec.batch:
            raise StreamError(
                f"item {n} has batch {u.shape[0]}, earlier ones had {spec.batch}: drop shorter "
                "batches (drop_last=True), or use a pulse level, which takes them"
            )
        if u.shape[0] == 0:
            raise StreamError(f"item {n}: u has batch 0: leave empty batches out of the stream")
        _check_finite(n, "u", u)
        return _own(u)

    def _target(self, n: int, y: Tensor, batch: int) -> Tensor:
        spec = self._spec
        _check_dtype(n, "y", y, spec.y_dtype)
        if y.dim() == 0 or y.shape[1:] != spec.y_shape[1:]:
            raise StreamError(
                f"item {n}: y has shape {tuple(y.shape)}, expected {_rows(spec.y_shape)}: "
                "targets are (B,) classes or (B, O) values; reshape it"
            )
        if y.shape[0] != batch:
            raise StreamError(
                f"item {n}: y has batch {y.shape[0]}, but u has batch {batch}: "
                "give one target per input, or None for the whole item"
            )
        _check_finite(n, "y", y)
        if spec.classes is not None:
            low, high = torch.aminmax(y)
            if low.item() < 0 or high.item() >= spec.classes:
                row = int(((y < 0) | (y >= spec.classes)).nonzero()[0])
                raise StreamError(
                    f"item {n}: y[{row}] is {y[row].item()}, but with {spec.classes} classes "
                    f"targets are 0 to {spec.classes - 1}: correct the labels, or the number of "
                    "classes"
                )
        return _own(y)


def _check_dtype(n: int, field: str, value: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise StreamError(f"item {n}: {field} is a {type(value).__name__}, not a torch tensor")
    if value.dtype != dtype:
        raise StreamError(
            f"item {n}: {field} has dtype {value.dtype}, expected {dtype}: convert it with "
            f".to({dtype})"
        )


def _check_finite(n: int, field: str, value: Tensor) -> None:
    if not value.is_floating_point() or math.isfinite(value.sum().item()):
        return
    # a sum of finite values can overflow: look again, value by value
    bad = (~value.isfinite()).nonzero()
    if len(bad):
        where = tuple(bad[0].tolist())
        raise StreamError(
            f"item {n}: {field}{list(where)} is {value[where].item()} ({len(bad)} such values): "
            "clean the data, or drop such items, before they enter the stream"
        )


def _own(value: Tensor) -> Tensor:
    """The tensor itself if it is contiguous, aligned and alone in its storage, else a copy."""
    if (
        value.is_contiguous()
        and not value.requires_grad
        and value.data_ptr() % ALIGNMENT == 0
        and value.untyped_storage().nbytes() == value.nbytes
    ):
        return value
    return value.detach().clone(memory_format=torch.contiguous_format)


def _rows(shape: tuple[int, ...]) -> str:
    return f"({', '.join(['B', *map(str, shape[1:])])}{',' if len(shape) == 1 else ''})"
