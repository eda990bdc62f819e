"""Prequential (test-then-train) metrics: computed where the readout lives, sent in bundles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hamdist.dynamics.losses import class_axis


@dataclass(frozen=True, slots=True)
class Window:
    """Sums over the items first..last of the stream that had a target (a batch is one item).

    loss: sum over items of the batch-mean loss. correct, rows: rows predicted right, and rows in
    all, of class targets (both 0 for real-valued targets).
    """

    first: int
    last: int
    items: int
    loss: float
    correct: int
    rows: int

    @property
    def mean_loss(self) -> float:
        return self.loss / self.items if self.items else float("nan")

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.rows if self.rows else None


def merge_windows(windows: Sequence[Window]) -> Window:
    """The window that covers all of `windows` (given in order)."""
    return Window(
        first=windows[0].first,
        last=windows[-1].last,
        items=sum(w.items for w in windows),
        loss=sum(w.loss for w in windows),
        correct=sum(w.correct for w in windows),
        rows=sum(w.rows for w in windows),
    )


def count_correct(prediction: Tensor, target: Tensor) -> tuple[int, int]:
    """Rows predicted right and rows in all; (0, 0) unless the target holds class indices.

    prediction: (B, classes, ...) or (B, ..., classes), target: (B, ...) of an integer type.
    """
    if target.is_floating_point() or prediction.dim() != target.dim() + 1:
        return 0, 0
    axis = 1 if prediction.dim() == 2 else class_axis(prediction.shape, target.shape)
    return int((prediction.argmax(axis) == target).sum()), target.numel()


class Prequential:
    """Collects a readout's losses into windows of `every` items.

    With `limit` windows kept, neighbours are joined and `every` doubles: an endless stream is
    recorded in constant memory.
    """

    def __init__(self, every: int, limit: int = 2048) -> None:
        self.every = every
        self.limit = limit
        self.windows: list[Window] = []
        self._open: list[Window] = []

    def record(self, item: int, prediction: Tensor, target: Tensor, loss: Tensor) -> None:
        with torch.no_grad():
            correct, rows = count_correct(prediction, target)
        self._open.append(Window(item, item, 1, float(loss), correct, rows))
        if len(self._open) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Close the open window, however short."""
        if self._open:
            self.windows.append(merge_windows(self._open))
            self._open = []
        if len(self.windows) >= self.limit:
            pairs = range(0, len(self.windows) - 1, 2)
            self.windows = [merge_windows(self.windows[i : i + 2]) for i in pairs] + (
                self.windows[-1:] if len(self.windows) % 2 else []
            )
            self.every *= 2
