"""Prequential (test-then-train) metrics, computed where the readout runs, sent in bundles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hamdist.config import IGNORE_INDEX
from hamdist.dynamics.objective.losses import class_axis
from hamdist.dynamics.saved_state.stateful import Stateful, registered

AT_ONCE = 64  # samples that are counted together
SMALL = 4096  # numbers of a prediction, up to which it is kept until then


@registered("Window")
@dataclass(frozen=True, slots=True)
class Window:
    """Sums over samples of the stream that had a target (a batch is one sample): in the order of
    their targets, so many, the earliest and the latest of which are `first` and `last`.

    loss: sum over samples of the batch-mean loss. correct, rows: rows predicted right, and rows in
    all, of class targets (both 0 for real-valued targets).
    """

    first: int
    last: int
    samples: int
    loss: float
    correct: int
    rows: int

    @property
    def mean_loss(self) -> float:
        """Return the mean loss per sample; NaN without samples."""
        return self.loss / self.samples if self.samples else float("nan")

    @property
    def accuracy(self) -> float | None:
        """Return the share of rows predicted right; None without class targets."""
        return self.correct / self.rows if self.rows else None


def merge_windows(windows: Sequence[Window]) -> Window:
    """Return the window that covers all of `windows` (given in order)."""
    return Window(
        first=min(w.first for w in windows),
        last=max(w.last for w in windows),
        samples=sum(w.samples for w in windows),
        loss=sum(w.loss for w in windows),
        correct=sum(w.correct for w in windows),
        rows=sum(w.rows for w in windows),
    )


def guessed(prediction: Tensor, target: Tensor) -> Tensor | None:
    """Return the predicted classes, (B, ...); None unless the target holds class indices.

    prediction: (B, classes, ...) or (B, ..., classes), target: (B, ...) of an integer type.
    """
    if target.is_floating_point() or prediction.dim() != target.dim() + 1:
        return None
    axis = 1 if prediction.dim() == 2 else class_axis(prediction.shape, target.shape)
    return prediction.argmax(axis)


def count_correct(
    prediction: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX
) -> tuple[int, int]:
    """Return the numbers of rows predicted right and of all rows that are not ignored.

    (0, 0) unless the target holds class indices. A prediction with a NaN is of no class.
    """
    guess = guessed(prediction, target)
    if guess is None:
        return 0, 0
    right, rows = _right(guess, target, ignore_index)
    if right and bool(prediction.isnan().any()):  # (argmax takes a NaN for the largest number)
        axis = 1 if prediction.dim() == 2 else class_axis(prediction.shape, target.shape)
        right, _ = _right(guess.masked_fill(prediction.isnan().any(axis), -1), target, ignore_index)
    return right, rows


def _right(guess: Tensor, target: Tensor, ignore_index: int) -> tuple[int, int]:
    has_target = target != ignore_index
    return int(((guess == target) & has_target).sum()), int(has_target.sum())


@registered("_Look")
class _Look(NamedTuple):
    """One sample that is not counted yet: the prediction of class targets, or the classes
    (guess)."""

    sample: int
    prediction: Tensor | None
    guess: Tensor | None
    target: Tensor
    loss: Tensor


class Prequential(Stateful):
    """Collects a readout's losses into windows of `every` samples.

    With `limit` windows kept, neighbours are joined (`joined` times by now): an endless stream is
    recorded in constant memory. All of them, and `every` doubles; or, where it `rolls`, those of
    the older half: the latest windows stay as short as they were. ignore_index: class targets of
    this number are no rows.
    """

    def __init__(
        self,
        every: int,
        limit: int = 2048,
        *,
        ignore_index: int = IGNORE_INDEX,
        rolls: bool = False,
    ) -> None:
        self.every, self.limit, self._rolls = every, limit, rolls
        self.joined = 0
        self.windows: list[Window] = []
        self._open: list[Window] = []  # at most one
        self._looks: list[_Look] = []  # behind it; counted together, which is cheaper
        self._items = 0  # of both
        self._ignore_index = ignore_index

    STATE = ("every", "joined", "windows", "_open", "_looks", "_items")
    ADDED: ClassVar[Mapping[str, Any]] = {"joined": 0}

    def record(self, sample: int, prediction: Tensor, target: Tensor, loss: Tensor) -> None:
        """Record a sample. prediction: (B, ...), never changed again; target: (B, ...)."""
        if prediction.dim() == 2 and prediction.numel() <= SMALL and target.dim() == 1:
            scored = None if target.is_floating_point() else prediction
            self._looks.append(_Look(sample, scored, None, target, loss))
        else:
            with torch.no_grad():
                guess = guessed(prediction, target)
            self._looks.append(_Look(sample, None, guess, target, loss))
        self._items += 1
        if self._items >= self.every:
            self.flush()
        elif len(self._looks) >= AT_ONCE:
            self._count()

    def _count(self) -> None:
        """Add the recorded samples to the open window."""
        looks, self._looks = self._looks, []
        if looks:
            self._open = [merge_windows([*self._open, _window(looks, self._ignore_index)])]

    def flush(self) -> None:
        """Close the open window, however short."""
        self._count()
        self.windows += self._open
        self._open = []
        self._items = 0
        if len(self.windows) >= self.limit:
            old = max(2, len(self.windows) // 2) if self._rolls else len(self.windows)
            pairs = [merge_windows(self.windows[i : min(i + 2, old)]) for i in range(0, old, 2)]
            self.windows = pairs + self.windows[old:]
            self.joined += 1
            self.every *= 1 if self._rolls else 2


def _window(looks: Sequence[_Look], ignore_index: int) -> Window:
    losses: list[float] = torch.stack([look.loss for look in looks]).tolist()
    correct = rows = 0
    for guess, target in _guesses(looks):
        right, rated = _right(guess, target, ignore_index)
        correct, rows = correct + right, rows + rated
    numbers = [look.sample for look in looks]  # (of late labels in their order)
    return Window(min(numbers), max(numbers), len(looks), sum(losses), correct, rows)


def _guesses(looks: Sequence[_Look]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the predicted and the right classes, row by row, of several samples each."""
    waiting = [(look.prediction, look.target) for look in looks if look.prediction is not None]
    if waiting:
        predictions, targets = zip(*waiting, strict=True)
        with torch.no_grad():
            yield torch.cat(predictions).argmax(1), torch.cat(targets)
    pairs = [(look.guess.reshape(-1), look.target) for look in looks if look.guess is not None]
    if pairs:
        guesses, targets = zip(*pairs, strict=True)
        yield torch.cat(guesses), torch.cat([target.reshape(-1) for target in targets])
