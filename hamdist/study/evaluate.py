"""Held-out evaluation of a merged model.

B: batch, N: rows of the held-out set, O: outputs, T: tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hamdist.dynamics.losses import LossFunction
from hamdist.dynamics.metrics import count_correct
from hamdist.errors import StreamError
from hamdist.streams.sample import Sample, Stream

CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Scores:
    """loss: mean over rows. accuracy: share of rows predicted right; None for real values."""

    loss: float
    accuracy: float | None


def evaluate(model: nn.Module, x: Tensor, y: Tensor, loss: LossFunction) -> Scores:
    """Scores of `model` on x (N, ...) with targets y, (N,) classes or (N, O) values.

    `loss` is a mean over the batch. The model is set to evaluation meanwhile.
    """
    tally = _Tally(loss)
    with _evaluating(model):
        for u, target in zip(torch.split(x, CHUNK), torch.split(y, CHUNK), strict=True):
            tally.add(model(u), target)
    return tally.scores()


def evaluate_sequences(model: nn.Module, stream: Stream, loss: LossFunction) -> Scores:
    """Scores of a model for sequences, (T, B, ...) -> (T, B, O), on those of a stream that ends:
    over all rows of all tokens that have a target.

    Raises StreamError where none has one.
    """
    tally = _Tally(loss)
    with _evaluating(model):
        for sequence in _sequences(stream):
            predictions = model(torch.stack([sample.u for sample in sequence]))
            for prediction, sample in zip(predictions, sequence, strict=True):
                if isinstance(sample.y, Tensor):
                    tally.add(prediction, sample.y)
    if not tally.rows:
        raise StreamError("no token of the held-out sequences has a target")
    return tally.scores()


def _sequences(stream: Stream) -> Iterator[list[Sample]]:
    """The tokens of each sequence, however the last one ends."""
    tokens: list[Sample] = []
    for sample in stream.samples():
        tokens.append(sample)
        if sample.end:
            yield tokens
            tokens = []
    if tokens:
        yield tokens


class _Tally:
    """Sums over rows. loss: a mean over the batch."""

    def __init__(self, loss: LossFunction) -> None:
        self._loss = loss
        self.rows = 0
        self._total = 0.0
        self._correct = 0
        self._counted = 0

    def add(self, prediction: Tensor, target: Tensor) -> None:
        self._total += float(self._loss(prediction, target)) * len(target)
        self.rows += len(target)
        right, counted = count_correct(prediction, target)
        self._correct, self._counted = self._correct + right, self._counted + counted

    def scores(self) -> Scores:
        accuracy = self._correct / self._counted if self._counted else None
        return Scores(self._total / self.rows, accuracy)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is set to evaluation, and no graph is built."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
