"""The work: networks, a fixed list of random samples, and a stream that cycles through them.

B: batch, W: width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from hamdist.streams.sample import Sample, SampleSpec

ITEMS = 16
LR = 1e-3
INPUTS, LAYERS, CLASSES = 784, 6, 10
SIDE, CHANNELS = 28, 32
TOKENS, LENGTH, MODEL, HEADS, ENCODERS = 256, 32, 64, 4, 4
WARM_ITEMS = 16


@dataclass(frozen=True)
class Work:
    """What is learned. kind: 'chain' (Linear layers of sizes `dims`, ReLU between them), 'convnet'
    or 'transformer'."""

    name: str
    kind: str
    batch: int
    dims: tuple[int, ...] = ()
    dtype: str = "float32"

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Work:
        """The inverse of `plain`."""
        return cls(**{**raw, "dims": tuple(raw["dims"])})

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def classes(self) -> int:
        return self.dims[-1] if self.dims else CLASSES

    def model(self) -> nn.Sequential:
        """The same weights each time. Its children that have weights are its layers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _MODELS[self.kind](self).to(getattr(torch, self.dtype))

    def items(self) -> list[tuple[Tensor, Tensor]]:
        """(u, y): the same ones each time."""
        draw = torch.Generator().manual_seed(1)
        dtype = getattr(torch, self.dtype)
        found = []
        for _ in range(ITEMS):
            if self.kind == "transformer":
                u = torch.randint(TOKENS, (self.batch, LENGTH), generator=draw)
            else:
                shape = (1, SIDE, SIDE) if self.kind == "convnet" else self.dims[:1]
                u = torch.randn(self.batch, *shape, generator=draw).to(dtype)
            found.append((u, torch.randint(self.classes, (self.batch,), generator=draw)))
        return found


def mlp(width: int, batch: int, dtype: str = "float32") -> Work:
    """784-W-W-W-W-W-10: six layers."""
    dims = (INPUTS, *[width] * (LAYERS - 1), CLASSES)
    return Work(f"MLP W={width} batch {batch}", "chain", batch, dims, dtype)


def chain(name: str, batch: int, *dims: int) -> Work:
    return Work(name, "chain", batch, dims)


def convnet(batch: int) -> Work:
    return Work(f"convnet batch {batch}", "convnet", batch)


def transformer(batch: int) -> Work:
    return Work(f"transformer batch {batch}", "transformer", batch)


def _chain(work: Work) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(work.dims, work.dims[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _convnet(_: Work) -> nn.Sequential:
    c, side = CHANNELS, SIDE // 4
    return nn.Sequential(
        *(nn.Conv2d(1, c, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(c, c, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(2 * c * side * side, CLASSES)),
    )


def _transformer(_: Work) -> nn.Sequential:
    encoders = [
        nn.TransformerEncoderLayer(MODEL, HEADS, 4 * MODEL, dropout=0.0, batch_first=True)
        for _ in range(ENCODERS)
    ]
    head = nn.Flatten(), nn.Linear(LENGTH * MODEL, CLASSES)
    return nn.Sequential(nn.Embedding(TOKENS, MODEL), *encoders, *head)


_MODELS = {"chain": _chain, "convnet": _convnet, "transformer": _transformer}


class Cycled:
    """The samples of a work, again and again, until `seconds` have passed after a warm-up.

    It measures where the samples are drawn, in whichever process that is: `report` tells how many
    were drawn in how many nanoseconds since the warm-up. A network that is slower than its stream
    holds it back, so this is the network's own pace, without its start and its end.
    """

    portable = True

    def __init__(self, work: Work, seconds: float, warm_up: float) -> None:
        self._items = [Sample(u, y) for u, y in work.items()]
        u, y = work.items()[0]
        self.spec = SampleSpec(tuple(u.shape), u.dtype, tuple(y.shape), y.dtype, work.classes)
        self._seconds = seconds
        self._warm_up = warm_up
        self._counts: dict[str, int] = {}

    def samples(self) -> Iterator[Sample]:
        entered = time.perf_counter()
        begun, first = None, 0
        for n in count():
            now = time.perf_counter()
            if begun is None:
                if now - entered >= self._warm_up and n >= WARM_ITEMS:
                    begun, first = now, n
            elif now - begun >= self._seconds:
                self._counts = {"timed": n - first, "nanoseconds": int((now - begun) * 1e9)}
                return
            yield self._items[n % len(self._items)]

    def report(self) -> dict[str, int]:
        return self._counts


def pace(counts: dict[str, int]) -> float:
    """Seconds a sample, from what a `Cycled` reported. Raises ValueError where it reported nothing:
    its run ended before its time."""
    if not counts.get("timed"):
        raise ValueError("the stream was not read to its end, so there is no pace")
    return counts["nanoseconds"] / counts["timed"] / 1e9
