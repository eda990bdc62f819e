"""Labels that come late: scores and weights are those of progressive validation with delay."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from hamdist.config import Settings
from hamdist.runtime.train.train import train
from hamdist.streams.wrappers.late_targets import Delayed, LateLabels
from hamdist.study.verify.oracles.check import Check
from hamdist.study.verify.oracles.networks import F64, Draws, chain

BOUND = 1e-12
ORACLE = "progressive validation with delay: questions and answers in the order of their times"
RATE = 0.1


def checks(full: bool) -> Iterator[Check]:
    items = 600 if full else 60
    for delay in (1, 5, 20):
        name = f"late labels, {delay} items: losses, hits and weights of {items} samples"
        yield Check(name, ORACLE, BOUND, lambda delay=delay: _apart(items, delay))  # type: ignore[misc]


def _apart(items: int, delay: int) -> float:
    settings = Settings.model_validate(
        {
            "level": "backprop",
            "dtype": "float64",
            "learning": {"lr": RATE},
            "metrics": {"window": 1},
        }
    )
    stream = LateLabels(Delayed(Draws(items), delay, tagged=False), delay)
    result = train(chain(), stream, settings)
    (windows,) = result.windows.values()
    scores, weights = _progressive(items, delay)
    if [w.first for w in windows] != list(scores):
        return float("inf")
    own = torch.tensor([(w.loss, w.correct) for w in windows], dtype=F64)
    apart = [(own - torch.tensor(list(scores.values()), dtype=F64)).abs().max()]
    apart += [(a - b).abs().max() for a, b in zip(result.model.parameters(), weights, strict=True)]
    return float(torch.stack(apart).max())


def _progressive(items: int, delay: int) -> tuple[dict[int, tuple[float, int]], list[Tensor]]:
    """(loss, hits) by sample, in the order in which labels come, and the weights at the end."""
    model = chain()
    optimiser = torch.optim.SGD(model.parameters(), RATE)
    samples = list(Draws(items).samples())
    asked: dict[int, Tensor] = {}
    scores: dict[int, tuple[float, int]] = {}
    for now, sample in enumerate(samples):
        answered = now - delay
        if answered >= 0:
            u, y, said = samples[answered].u, samples[answered].y, asked.pop(answered)
            if isinstance(y, Tensor):
                hits = int((said.argmax(1) == y).sum())
                scores[answered] = functional.cross_entropy(said, y).item(), hits
                optimiser.zero_grad()
                functional.cross_entropy(model(u), y).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        asked[now] = model(sample.u).detach()
    return scores, [p.detach() for p in model.parameters()]
