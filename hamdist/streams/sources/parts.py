"""Splits a data set into a part to learn from and a part that is held out.

Step sizes and other settings are chosen on a validation part, never on the test part: a run with
`stream.evaluate: validation` learns from five sixths of the training part and is scored on the
rest. The rows of each depend on their number alone, not on a seed.

N: rows.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

VALIDATION_EVERY = 6
FIRST = 2

T = TypeVar("T")


def validation_rows(many: int) -> Tensor:
    """Return a mask (N,) of the validation part of `many` rows: every sixth from the third on."""
    rows = torch.zeros(many, dtype=torch.bool)
    rows[FIRST::VALIDATION_EVERY] = True
    return rows


def without_test(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split x, y (N, ...) of a training part into x, y to learn from and x, y for validation."""
    rows = validation_rows(len(y))
    return x[~rows], y[~rows], x[rows], y[rows]


def validation_split(values: list[T]) -> tuple[list[T], list[T]]:
    """Split a list of samples into those to learn from and the validation part."""
    chosen = validation_rows(len(values)).tolist()
    learned = [value for value, held in zip(values, chosen, strict=True) if not held]
    return learned, [value for value, held in zip(values, chosen, strict=True) if held]
