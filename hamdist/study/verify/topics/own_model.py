"""A user's own module: equality of level `backprop` with autograd, and the speed c from which on
level `local` equals it, to 1 %.

B: batch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from hamdist.config import Settings, TargetOf
from hamdist.dynamics.objective.losses import LossFunction, cross_entropy, mse
from hamdist.dynamics.user_modules.copies import copied
from hamdist.errors import SettingsError
from hamdist.models.build import ModelFactory, make_from_factory
from hamdist.runtime.train.prepare import as_graph
from hamdist.runtime.train.train import train
from hamdist.streams.sample import SampleSpec
from hamdist.study.propagation.gradients import (
    TRIED,
    as_network,
    exact_gradients,
    local_gradients,
    relative_error,
)
from hamdist.study.propagation.streams import StreamKind, timed_stream
from hamdist.study.shared.exact_runs import float64_settings
from hamdist.study.verify.oracles.check import Check, Difference, largest
from hamdist.study.verify.oracles.networks import Draws, random_values
from hamdist.study.verify.topics.backpropagation import sgd

STEPS = 10
LR = 0.01
SEED = 0
# Round-off of an honest rearrangement of the same sums, in units of the type's epsilon.
ROUNDINGS = 1e3
TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class VerifiedModel:
    """The model to verify.

    Attributes:
        input_shape: without the batch.
        classes: the loss is cross-entropy (None: the squared error).
        blocks: to cut the model into (None: as the level does).
    """

    factory: ModelFactory
    name: str
    input_shape: tuple[int, ...]
    classes: int | None = None
    batch: int = 4
    blocks: int | None = None

    def checks(self) -> Generator[Check, None, None]:
        """Yield the checks. Raises SettingsError if the model cannot be verified."""
        model = self.make(torch.float64)
        if not any(p.requires_grad for p in model.parameters()):
            raise SettingsError(
                "--model: it has no weights that learn, so there is nothing to verify"
            )
        samples = self.samples(model, torch.float64)
        as_graph(model, self._settings("backprop", torch.float64), samples.spec, self._loss)
        for dtype in (torch.float64, torch.float32):
            bound = ROUNDINGS * torch.finfo(dtype).eps
            yield Check(
                f"{self.name}, level backprop, {str(dtype).removeprefix('torch.')}: losses, "
                f"weights and buffers of {STEPS} steps (relative)",
                "autograd and torch.optim.SGD",
                bound,
                partial(self._backprop, dtype),
            )
        if vocabulary(model) is None:
            title = f"{self.name}, level local: weight gradients on a smooth stream (relative)"
            yield Check(title, "backpropagation", TOLERANCE, self._local)

    def make(self, dtype: torch.dtype) -> nn.Module:
        """Return the model, without modules that draw random numbers, which would be others."""
        model = make_from_factory(self.factory, seed=SEED, dtype=dtype)
        for part in model.modules():
            if isinstance(part, (_DropoutNd, nn.RReLU)) or getattr(part, "dropout", False):
                part.eval()
        return model

    def samples(self, model: nn.Module, dtype: torch.dtype) -> Draws:
        """Return `STEPS` random samples. Raises SettingsError for what `model` returns."""
        shape, tokens = (self.batch, *self.input_shape), vocabulary(model)
        random = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            prediction = copied(model)(random_values(shape, dtype, tokens, random))
        if not isinstance(prediction, Tensor):
            raise SettingsError(
                f"--model: it returns {type(prediction).__name__}, not a tensor; verify a module "
                "that returns its prediction alone"
            )
        predicted, classes = tuple(prediction.shape), self.classes
        if classes is not None:
            if len(predicted) < 2 or predicted[1] < classes:
                raise SettingsError(
                    f"--classes {classes}: the model predicts {predicted}, batch in front"
                )
            predicted = (predicted[0], *predicted[2:])
        u_dtype = dtype if tokens is None else torch.int64
        y_dtype = dtype if classes is None else torch.int64
        spec = SampleSpec(shape, u_dtype, predicted, y_dtype, classes, tokens=tokens)
        return Draws(STEPS, spec=spec, seed=SEED)

    def _backprop(self, dtype: torch.dtype) -> Difference:
        """Return the largest |a - b| / max(1, |b|) of losses, weights and buffers."""
        plain = self.make(dtype)
        samples, settings = self.samples(plain, dtype), self._settings("backprop", dtype)
        result = train(plain, samples, settings, loss=self._loss)
        before = [p.detach().clone() for p in plain.parameters()]
        (losses,) = sgd(plain, samples, settings.learning, loss=self._loss)
        pairs = dict(zip(plain.state_dict(), result.model.state_dict().values(), strict=True))
        apart = {name: _relative(pairs[name], t) for name, t in plain.state_dict().items()}
        (windows,) = result.windows.values()
        curve = torch.tensor([w.loss for w in windows], dtype=torch.float64)
        apart["the loss"] = _relative(curve, losses)
        moved = max(
            ((p - b).abs().max().item() for p, b in zip(plain.parameters(), before, strict=True)),
            default=0.0,
        )
        worst = largest(apart.items())
        where = f"largest at {worst.where}; " if worst.difference else "equal to the bit; "
        blocks = len(result.blocks)
        where += f"{blocks} block{'s' * (blocks > 1)}, weights moved by up to {moved:.2g}"
        if samples.spec.u_dtype == torch.int64:
            where += "; local is left out: whole-number inputs cannot change smoothly"
        return Difference(worst.difference, where)

    def _local(self) -> Difference:
        """Return the error at the smallest speed at which it is within the tolerance."""
        model = self.make(torch.float64)
        spec = self.samples(model, torch.float64).spec
        graph = as_graph(model, self._settings("local", torch.float64), spec, self._loss)
        network = as_network(graph, self.input_shape, self.batch)
        stream = timed_stream(StreamKind.SMOOTH, network.values, SEED)
        exact = exact_gradients(network, stream)

        @cache
        def error(c: float) -> float:
            local, _ = local_gradients(network, stream, c, 1.0, TargetOf.SAMPLE)
            return relative_error(local, exact)

        # It falls as 1/c, so a bisection finds the first that is small enough.
        first = bisect_left(TRIED, True, key=lambda c: error(c) <= TOLERANCE)
        c = TRIED[min(first, len(TRIED) - 1)]
        where = f"from c = {c:g} on: so many hops per second, the stream moves at about 1 rad/s"
        if error(c) > TOLERANCE:
            where = f"not up to c = {c:g} hops per second"
        return Difference(error(c), where)

    def _settings(self, level: str, dtype: torch.dtype) -> Settings:
        return float64_settings(
            level,
            dtype=str(dtype).removeprefix("torch."),
            learning={"lr": LR},
            partition={"blocks": self.blocks},
            metrics={"window": 1},
        )

    @property
    def _loss(self) -> LossFunction:
        return mse if self.classes is None else cross_entropy


def parse_shape(text: str) -> tuple[int, ...]:
    """Return `3,28,28` as (3, 28, 28). Raises SettingsError for anything else."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise SettingsError(
            f"--input-shape {text!r}: give whole numbers above 0, without the batch, for example "
            "3,28,28"
        )
    return shape


def vocabulary(model: nn.Module) -> int | None:
    """Return how many tokens a model has whose first weights are an embedding; None for others."""
    first = next((m for m in model.modules() if next(m.parameters(False), None) is not None), None)
    return first.num_embeddings if isinstance(first, (nn.Embedding, nn.EmbeddingBag)) else None


def _relative(a: Tensor, b: Tensor) -> float:
    if not b.numel():
        return 0.0
    a, b = a.double(), b.double()
    return ((a - b).abs() / b.abs().clamp(min=1)).max().item()
