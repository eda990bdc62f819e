"""hamdist's in-process engine, in a process without Ray; and its weights against torch's SGD."""

from __future__ import annotations

import warnings
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hamdist
from hamdist.streams import from_iterable
from harness.centralised import sgd
from harness.live_bytes import LiveBytes
from harness.ours import Configuration, Ours
from harness.works import Work

LARGE_LR = 0.05  # so that a wrong step shows
LIVE_ITEMS = 8  # once the network is full


class InProcess:
    def __init__(self) -> None:
        self._ours: Ours | None = None

    def build(self, work: dict[str, Any], level: str, blocks: int | None) -> None:
        self._ours = Ours(Work.of(work), Configuration(level, blocks, kind="inprocess"))

    def run(self, seconds: float) -> float:
        if self._ours is None:
            raise RuntimeError("build() comes first")
        return self._ours.run(seconds)

    def time_use(self) -> dict[str, dict[str, float]]:
        return {} if self._ours is None else self._ours.time_use()

    def difference(self, work: dict[str, Any], steps: int) -> dict[str, float]:
        """`backprop` in one block against torch's SGD, from the same weights on the same samples:
        the largest difference of a weight, and how far the weights moved at most."""
        made = Work.of(work)
        items = list(islice(cycle(made.items()), steps))
        learning = {"lr": LARGE_LR}
        settings = Configuration("backprop", 1, kind="inprocess").settings(
            dtype=made.dtype, learning=learning
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stream = from_iterable(items, classes=made.classes)
            ours = hamdist.train(made.model(), stream, settings).model
        model = made.model()
        optimiser = sgd(model, "plain", LARGE_LR)
        for u, y in items:
            optimiser.zero_grad()
            cross_entropy(model(u), y).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return {
            "difference": _farthest(ours, model),
            "moved": _farthest(made.model(), model),
        }

    def live_activations(self, work: dict[str, Any], delay: int) -> int:
        """The most bytes of tensors alive at a time in a run of `trace` in two blocks, without
        those that have the shape of a weight."""
        made = Work.of(work)
        items = list(islice(cycle(made.items()), 4 * delay + LIVE_ITEMS))
        settings = Configuration(kind="inprocess", delay=delay).settings()
        model = made.model()
        stream = from_iterable(items, classes=made.classes)
        live = LiveBytes(p.shape for p in model.parameters())
        with warnings.catch_warnings(), live:
            warnings.simplefilter("ignore")
            hamdist.train(model, stream, settings)
        return live.peak


def _farthest(a: nn.Module, b: nn.Module) -> float:
    with torch.no_grad():
        pairs = zip(a.parameters(), b.parameters(), strict=True)
        return max(float((p - q).abs().max()) for p, q in pairs)
