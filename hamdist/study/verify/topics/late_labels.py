"""Labels come late, of rows with weights: scores and weights are those of progressive validation
with delay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from hamdist.runtime.train.train import train
from hamdist.streams.sample import Sample, Stream, with_weights
from hamdist.streams.wrappers.late_targets import Delayed, LateLabels
from hamdist.study.shared.exact_runs import float64_settings
from hamdist.study.verify.oracles.check import Check, absolute
from hamdist.study.verify.oracles.networks import BATCH, F64, Draws, chain

BOUND = 1e-12
ORACLE = "progressive validation with delay: questions and answers in the order of their times"
RATE = 0.1
PATIENCE = 16


def checks(full: bool) -> Iterator[Check]:
    """Yield a check per way in which labels come."""
    samples = 600 if full else 60
    for delay in (1, 5, 20):
        comes = {n: n + delay for n in range(samples)}

        def delayed(delay: int = delay) -> Stream:
            return LateLabels(Delayed(Draws(samples), delay, tagged=False), delay)

        yield _check(f"{delay} samples", samples, delayed, comes)
    comes = {n: n + 1 + (7 * n) % 12 for n in range(samples) if n % 9}
    for name, keeps, weighed in (
        ("by key, in any order or never", False, False),
        ("by key, rows with weights", False, True),
        ("by key, with kept traces", True, False),
    ):
        keyed = partial(LateLabels, Keyed(samples, comes, weighed), patience=PATIENCE, kept=keeps)
        yield _check(name, samples, keyed, comes, keeps, weighed)


class Keyed:
    """The draws, with labels that come with the samples of `comes`, by key."""

    portable = True

    def __init__(self, samples: int, comes: Mapping[int, int], weighed: bool) -> None:
        self.spec = replace(Draws(samples).spec, weighted=weighed)
        self._samples, self._comes = samples, comes

    def samples(self) -> Iterator[Sample]:
        plain = list(Draws(self._samples).samples())
        for n, sample in enumerate(plain):
            late: dict[int | str, Tensor | None] = {}
            for m in [m for m in range(n) if self._comes.get(m) == n]:
                y = plain[m].target("")
                if y is not None and self.spec.weighted:
                    y = with_weights(y, row_weights(m))
                late[f"row {m}"] = y
            yield Sample(sample.u, late=late, key=f"row {n}")


def row_weights(n: int) -> Tensor:
    """Return (BATCH,) weights of the rows of sample n, some of them 0."""
    return ((torch.arange(BATCH) + n) % 3).to(F64) / 2


def _check(
    name: str,
    samples: int,
    stream: Callable[[], Stream],
    comes: Mapping[int, int],
    keeps: bool = False,
    weighed: bool = False,
) -> Check:
    title = f"late labels, {name}: losses, hits and weights of {samples} samples"
    return Check(title, ORACLE, BOUND, lambda: _apart(samples, stream(), comes, keeps, weighed))


def _apart(
    samples: int, stream: Stream, comes: Mapping[int, int], keeps: bool, weighed: bool
) -> float:
    settings = float64_settings("backprop", learning={"lr": RATE}, metrics={"window": 1})
    result = train(chain(), stream, settings)
    (windows,) = result.windows.values()
    scores, weights = _progressive(samples, comes, keeps, weighed)
    if [w.first for w in windows] != list(scores):
        return float("inf")
    ours = torch.tensor([(w.loss, w.correct) for w in windows], dtype=F64)
    pairs = [(ours, torch.tensor(list(scores.values()), dtype=F64))]
    pairs += zip(result.model.parameters(), weights, strict=True)
    return max(absolute(a, b) for a, b in pairs)


def _progressive(
    number: int, comes: Mapping[int, int], keeps: bool, weighed: bool
) -> tuple[dict[int, tuple[float, int]], list[Tensor]]:
    """Return (loss, hits) by sample, in the order in which labels come, and the weights at the
    end."""
    model = chain()
    optimiser = torch.optim.SGD(model.parameters(), RATE)
    samples = list(Draws(number).samples())
    questions: dict[int, list[Tensor]] = {}
    scores: dict[int, tuple[float, int]] = {}
    for now, sample in enumerate(samples):
        for n in [n for n in range(now) if comes.get(n) == now]:
            u, y, then = samples[n].u, samples[n].y, questions.pop(n)
            if not isinstance(y, Tensor):
                continue
            rows = row_weights(n) if weighed else torch.ones(BATCH, dtype=F64)
            scores[n] = float(_loss(then[-1], y, rows)), int((then[-1].argmax(1) == y).sum())
            optimiser.zero_grad()
            _loss(model(u), y, rows).backward()  # type: ignore[no-untyped-call]
            if keeps:
                _gradients(model, then, y)
            optimiser.step()
        questions[now] = _activations(model, sample.u)
    return scores, [p.detach() for p in model.parameters()]


def _loss(prediction: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """Return (1 / B) sum_b w_b l_b."""
    return (rows * functional.cross_entropy(prediction, y, reduction="none")).mean()


def _activations(model: nn.Sequential, u: Tensor) -> list[Tensor]:
    """Return the input, and what comes out of every activation and at the end."""
    with torch.no_grad():
        h = [u]
        for layer in model:
            h = [*h, layer(h[-1])] if isinstance(layer, nn.Linear) else [*h[:-1], layer(h[-1])]
    return h


def _gradients(model: nn.Sequential, h: list[Tensor], y: Tensor) -> None:
    """Do backpropagation by hand, with today's weights and the activations of then:

    g_W = z^T h,      z_below = (z W) (1 - h^2)
    """
    z = (h[-1].softmax(1) - functional.one_hot(y, h[-1].shape[1])) / len(y)
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer, below in zip(reversed(linears), reversed(h[:-1]), strict=True):
        layer.weight.grad, layer.bias.grad = z.T @ below, z.sum(0)
        z = (z @ layer.weight.detach()) * (1 - below**2)
