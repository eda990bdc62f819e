"""The parts of a data set: what is learned from, and what is held out.

Step sizes and other settings are chosen on a validation part, never on the test part: a run with
`stream.evaluate: validation` learns from five sixths of the training part and is scored on the
rest. Which rows these are depends on their number alone, not on a seed.

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
    """Which of `many` rows of a training part are the validation part: (N,) bool, every sixth one
    from the third on."""
    rows = torch.zeros(many, dtype=torch.bool)
    rows[FIRST::VALIDATION_EVERY] = True
    return rows


def without_test(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y (N, ...) of a training part as x, y to learn from and x, y of the validation part."""
    rows = validation_rows(len(y))
    return x[~rows], y[~rows], x[rows], y[rows]


def validation_items(items: list[T]) -> tuple[list[T], list[T]]:
    """The same for items in a list: those to learn from, and the validation part."""
    chosen = validation_rows(len(items)).tolist()
    learned = [item for item, held in zip(items, chosen, strict=True) if not held]
    return learned, [item for item, held in zip(items, chosen, strict=True) if held]
