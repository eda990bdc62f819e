"""Held-out evaluation of a merged model.

B: batch, N: rows of the held-out set, O: outputs, T: tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hamdist.config import IGNORE_INDEX
from hamdist.dynamics.graph.inputs import NetworkInputs, call_model
from hamdist.dynamics.objective.losses import (
    ONLY,
    Losses,
    LossFunction,
    counts,
    losses_of,
    main_output,
    tensors,
)
from hamdist.dynamics.objective.prequential import count_correct
from hamdist.errors import HamdistError, StreamError
from hamdist.streams.check import check_finite
from hamdist.streams.iterable import IterableStream
from hamdist.streams.sample import Sample, SampleSpec, Stream, TargetSpec

CHUNK = 1024
Targets: TypeAlias = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores on held-out data.

    Attributes:
        loss: mean over rows.
        accuracy: share of rows predicted right; None for real values.
        outputs: of a model of several, by name; loss and accuracy are then those of `main`.
    """

    loss: float
    accuracy: float | None
    outputs: Mapping[str, Scores] = field(default_factory=dict)
    main: str = ONLY


def evaluate(
    model: nn.Module,
    x: NetworkInputs,
    y: Targets,
    loss: Losses,
    *,
    ignore_index: int = IGNORE_INDEX,
    spec: SampleSpec | None = None,
) -> Scores:
    """Return the scores of `model` on x (N, ...) with targets y, (N,) classes or (N, O) values.

    Tensors or numpy arrays; several inputs and outputs are given by name. `loss` is a mean over the
    batch; targets of the class `ignore_index` do not count. The model is set to evaluation
    meanwhile. spec: of the samples that were learned, whose kind of targets y has to have.
    """
    (whole,) = IterableStream([(x, y)], classes=None, outputs=None, copied=False).samples()
    targets = whole.y if isinstance(whole.y, Mapping) else None
    chunks = _chunks(whole.inputs or whole.u, whole.y)  # type: ignore[arg-type]  # (y is given)
    return evaluate_samples(model, chunks, loss, targets, ignore_index=ignore_index, spec=spec)


def evaluate_samples(
    model: nn.Module,
    samples: Iterable[Sample],
    loss: Losses,
    targets: Collection[str] | None,
    *,
    ignore_index: int = IGNORE_INDEX,
    spec: SampleSpec | None = None,
) -> Scores:
    """Return the scores of `model` over the rows of all samples that have a target.

    The model is set to evaluation meanwhile; `targets` names the outputs with targets, if they are
    given by name. spec: as of `evaluate`.

    Raises:
        StreamError: an output has no target at all, or the model or the loss refuses a sample.
        GraphError: the model does not have such an output.
    """
    tallies: dict[str, _Tally] | None = None
    with _evaluating(model):
        for n, sample in enumerate(samples):
            u = sample.u if sample.inputs is None else sample.inputs
            for name, value in {"u": u}.items() if isinstance(u, Tensor) else u.items():
                check_finite(n, f"held-out {name}", value)
            with _naming(n):
                predictions = tensors(call_model(model, u))
            if tallies is None:
                losses = losses_of(list(predictions), loss, targets)
                tallies = {name: _Tally(part, ignore_index) for name, part in losses.items()}
            for name, tally in tallies.items():
                target = sample.target(name)
                if target is not None:
                    _check_kind(n, name, target, None if spec is None else spec.target(name))
                    with _naming(n):
                        tally.add(predictions[name], target)
    if tallies is None:
        raise StreamError("nothing is held out: the part to evaluate on has no sample")
    for name, tally in tallies.items():
        if not tally.rows:
            of_output = "" if name == ONLY else f" for {name!r}"
            raise StreamError(f"no held-out sample has a target{of_output}")
    if list(tallies) == [ONLY]:
        return tallies[ONLY].scores()
    scores = {name: tally.scores() for name, tally in tallies.items()}
    main = main_output({name: part.accuracy for name, part in scores.items()})
    return Scores(scores[main].loss, scores[main].accuracy, scores, main)


def _check_kind(n: int, name: str, y: Tensor, learned: TargetSpec | None) -> None:
    """Raise StreamError for targets of another kind than those learned, which a loss may take."""
    if learned is None:
        return
    kind = y.dim(), y.is_floating_point()
    if kind != (len(learned.shape), learned.dtype.is_floating_point):
        raise StreamError(
            f"held-out sample {n}: the targets{f' of {name!r}' if name else ''} are {y.dtype} "
            f"{tuple(y.shape)}, those that were learned {learned.dtype} {learned.shape}: give both "
            "one kind"
        )


def _chunks(x: NetworkInputs, y: Targets) -> Iterator[Sample]:
    u = next(iter(x.values())) if isinstance(x, Mapping) else x
    for first in range(0, len(u), CHUNK):
        rows = slice(first, first + CHUNK)
        inputs = {name: part[rows] for name, part in x.items()} if isinstance(x, Mapping) else None
        target = {n: t[rows] for n, t in y.items()} if isinstance(y, Mapping) else y[rows]
        yield Sample(u[rows], target, inputs=inputs)


def evaluate_sequences(
    model: nn.Module, stream: Stream, loss: LossFunction, *, ignore_index: int = IGNORE_INDEX
) -> Scores:
    """Return the scores of a model for sequences, (T, B, ...) -> (T, B, O), on a stream that ends.

    They are taken over all rows of all tokens that have a target. Raises StreamError if none has
    one.
    """
    tally = _Tally(loss, ignore_index)
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
    """Yield the tokens of each sequence, however the last one ends."""
    tokens: list[Sample] = []
    for sample in stream.samples():
        tokens.append(sample)
        if sample.end:
            yield tokens
            tokens = []
    if tokens:
        yield tokens


class _Tally:
    """Sums over rows; `loss` is a mean over the rows that count, by the weights of their classes if
    it has some, as torch's cross-entropy.
    """

    def __init__(self, loss: LossFunction, ignore_index: int) -> None:
        self._loss = loss
        self._ignore_index = ignore_index
        weighs = isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss))
        self._weights = getattr(loss, "weight", None) if weighs else None
        self.rows = 0
        self._total = self._share = 0.0
        self._correct = 0
        self._counted = 0

    def add(self, prediction: Tensor, target: Tensor) -> None:
        """Add the rows of one prediction."""
        rows = counts(target, self._ignore_index)
        if not rows:
            return
        share: float = rows
        if self._weights is not None and not target.is_floating_point():
            share = float(self._weights[target[target != self._ignore_index]].sum())
        if share:
            self._total += float(self._loss(prediction, target)) * share
        self.rows, self._share = self.rows + rows, self._share + share
        right, counted = count_correct(prediction, target, self._ignore_index)
        self._correct, self._counted = self._correct + right, self._counted + counted

    def scores(self) -> Scores:
        """Return the means over the rows so far."""
        accuracy = self._correct / self._counted if self._counted else None
        return Scores(self._total / self._share if self._share else math.nan, accuracy)


@contextmanager
def _naming(n: int) -> Iterator[None]:
    """Turn errors of the model or the loss into a StreamError of held-out sample n."""
    try:
        yield
    except HamdistError:
        raise
    except Exception as error:  # a user's forward or loss may raise anything
        raise StreamError(f"held-out sample {n}: {type(error).__name__}: {error}") from error


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation inside, and build no graph."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
