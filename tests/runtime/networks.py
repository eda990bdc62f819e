"""Small networks and streams for the runtime's tests."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from hamdist.dynamics.graph.graph import BlockSpec, Combine, Graph
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.streams import Sample, from_iterable

FEATURES, CLASSES, BATCH = 6, 3, 4


def seeded(build):
    """`build()` with the global generator seeded, and put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return build()


def chain(width=8, depth=5, dropout=0.0):
    def build():
        layers = []
        inputs = FEATURES
        for _ in range(depth - 1):
            layers += [nn.Linear(inputs, width), nn.Tanh()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, CLASSES))

    return seeded(build)


def dense(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh())


def skip_graph():
    """Two skips, unequal delays, one block with two parents as separate arguments, two readouts."""
    return seeded(
        lambda: Graph(
            [
                BlockSpec("a", dense(FEATURES, 5), ("u",)),
                BlockSpec("b", dense(5, 4), ("a",), delays={"a": 2}),
                BlockSpec("c", dense(9, 4), ("a", "b")),
                BlockSpec("d", nn.Bilinear(4, 5, 6), ("c", "a"), combine=Combine.ARGUMENTS),
                BlockSpec("y", nn.Linear(4, CLASSES), ("c",), loss=cross_entropy),
                BlockSpec("w", nn.Linear(6, CLASSES), ("d",), loss=cross_entropy),
            ]
        )
    )


def cycle_graph():
    """A cycle b <-> c, a self-edge on c, a skip a -> d, a delay of 3."""
    return seeded(
        lambda: Graph(
            [
                BlockSpec("a", dense(FEATURES, 4), ("u",)),
                BlockSpec("b", dense(7, 4), ("a", "c"), shape=(4,)),
                BlockSpec("c", dense(7, 3), ("b", "c"), shape=(3,), delays={"b": 3}),
                BlockSpec("d", nn.Linear(7, CLASSES), ("a", "c"), loss=cross_entropy),
            ]
        )
    )


def batches(items, *, missing=(), last=BATCH):
    """`items` seeded batches; targets withheld at `missing`; the last batch of size `last`."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for n in range(items):
        size = last if n == items - 1 else BATCH
        u = torch.randn(size, FEATURES, generator=generator)
        y = torch.randint(CLASSES, (size,), generator=generator)
        made.append((u, None if n in missing else y))
    return made


def stream(items, **options):
    return from_iterable(batches(items, **options), classes=CLASSES)


class PortableStream:
    """The same samples, from a stream that can be sent to another process."""

    portable = True

    def __init__(self, items, **options):
        self.items, self.options = items, options
        self.spec = stream(items, **options).spec

    def samples(self):
        return stream(self.items, **self.options).samples()


class EndlessStream:
    """The same ten batches for ever."""

    portable = True
    spec = stream(10).spec

    def samples(self):
        return (Sample(u, y) for u, y in itertools.cycle(batches(10)))


class Broken(nn.Module):
    """Fails in its forward pass number `at` (not on meta tensors)."""

    def __init__(self, at):
        super().__init__()
        self.at = at
        self.calls = 0

    def forward(self, x):
        if x.device.type != "meta":
            if self.calls == self.at:
                raise ArithmeticError("the user's own mistake")
            self.calls += 1
        return x


class Stuck(nn.Module):
    """Never comes back from its forward pass number `at`."""

    def __init__(self, at):
        super().__init__()
        self.at = at
        self.calls = 0

    def forward(self, x):
        if x.device.type != "meta":
            if self.calls == self.at:
                import threading

                threading.Event().wait()
            self.calls += 1
        return x
