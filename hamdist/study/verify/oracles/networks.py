"""Small networks and streams for the checks, in float64, each drawn from a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Combine, Graph
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.streams.sample import Sample, SampleSpec

FEATURES, CLASSES, BATCH = 6, 3, 4
F64 = torch.float64

T = TypeVar("T")


def seeded(build: Callable[[], T], seed: int = 7) -> T:
    """Return `build()` with torch's global generator seeded, and restored afterwards."""
    with generator_kept(seed):
        return build()


def dense(inputs: int, outputs: int) -> nn.Sequential:
    """Return a linear layer with tanh."""
    return nn.Sequential(nn.Linear(inputs, outputs, dtype=F64), nn.Tanh())


def chain(width: int = 8, depth: int = 5) -> nn.Sequential:
    """Return Linear, Tanh, ..., Linear: `depth` layers with weights."""

    def build() -> nn.Sequential:
        layers: list[nn.Module] = []
        inputs = FEATURES
        for _ in range(depth - 1):
            layers += dense(inputs, width)
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, CLASSES, dtype=F64))

    return seeded(build)


def tied(frozen: int = 0) -> nn.Sequential:
    """Return a chain of 5 whose fourth layer is its second one; `frozen` layers do not learn."""

    def build() -> nn.Sequential:
        twice = dense(8, 8)
        layers = [dense(FEATURES, 8), twice, dense(8, 8), twice]
        for layer in layers[:frozen]:
            layer.requires_grad_(False)
        return nn.Sequential(*layers, nn.Linear(8, CLASSES, dtype=F64))

    return seeded(build)


class Masked(nn.Module):
    """Attends over the features; a padding mask of -inf, net once, is used in both layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 4, dtype=F64)
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(4, 2, batch_first=True, dtype=F64) for _ in range(2)
        )
        self.head = nn.Linear(4, CLASSES, dtype=F64)

    def forward(self, u: Tensor) -> Tensor:
        mask = torch.zeros_like(u).masked_fill_(u > 0.5, -math.inf)
        mask[:, 0] = 0  # of every row something is read
        h = self.embed(u[:, :, None])
        for layer in self.layers:
            h = h + layer(h, h, h, key_padding_mask=mask, need_weights=False)[0]
        prediction: Tensor = self.head(h.mean(1))
        return prediction


class Switching(nn.Module):
    """tanh, and from its tenth call on a sine: Python state."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return torch.tanh(x) if self.calls[0] < 10 else torch.sin(x)


class Reversed(torch.autograd.Function):
    """x, with half its gradient reversed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
        return -0.5 * grads[0]


class Reversing(nn.Module):
    """tanh behind an autograd.Function."""

    def forward(self, x: Tensor) -> Tensor:
        reversed_: Tensor = Reversed.apply(x)  # type: ignore[no-untyped-call]  # torch's
        return torch.tanh(reversed_)


def with_activation(activation: nn.Module) -> nn.Sequential:
    """Return the chain of 5 with another activation behind its second layer."""
    net = chain()
    net[3] = activation
    return net


def _halved(grads: Any) -> Any:
    return tuple(None if g is None else 0.5 * g for g in grads)


def hooked_chain() -> nn.Sequential:
    """Return the chain of 5 with hooks on its second layer, which change values and gradients."""
    net = chain()
    layer = net[2]
    layer.register_forward_pre_hook(lambda _, args: (0.7 * args[0],))
    layer.register_forward_hook(lambda _, __, y: 1.1 * y)
    layer.register_full_backward_hook(lambda _, grads, __: _halved(grads))
    layer.register_full_backward_pre_hook(lambda _, grads: _halved(grads))
    return net


class Skips(nn.Module):
    """The network of `skip_graph` as one plain module, written down once more.

    u: (B, FEATURES); returns the predictions of the readouts y and w, (B, CLASSES) each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = dense(FEATURES, 5)
        self.b = dense(5, 4)
        self.c = dense(9, 4)
        self.d = nn.Bilinear(4, 5, 6, dtype=F64)
        self.y = nn.Linear(4, CLASSES, dtype=F64)
        self.w = nn.Linear(6, CLASSES, dtype=F64)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        a = self.a(u)
        c = self.c(torch.cat([a, self.b(a)], dim=1))
        return self.y(c), self.w(self.d(c, a))


def skip_graph(net: Skips) -> Graph:
    """Return a graph of two skips, edges of two ticks, a block with two arguments, two readouts."""
    return Graph(
        [
            BlockSpec("a", net.a, (INPUT,)),
            BlockSpec("b", net.b, ("a",), delays={"a": 2}),
            BlockSpec("c", net.c, ("a", "b")),
            BlockSpec("d", net.d, ("c", "a"), combine=Combine.ARGUMENTS),
            BlockSpec("y", net.y, ("c",), loss=cross_entropy),
            BlockSpec("w", net.w, ("d",), loss=cross_entropy),
        ]
    )


def cycle_graph() -> Graph:
    """Return a cycle b <-> c, a self-edge on c, a skip a -> d, an edge of three ticks."""
    return seeded(
        lambda: Graph(
            [
                BlockSpec("a", dense(FEATURES, 4), (INPUT,)),
                BlockSpec("b", dense(7, 4), ("a", "c"), shape=(4,)),
                BlockSpec("c", dense(7, 3), ("b", "c"), shape=(3,), delays={"b": 3}),
                BlockSpec("d", nn.Linear(7, CLASSES, dtype=F64), ("a", "c"), loss=cross_entropy),
            ]
        )
    )


DRAWN = SampleSpec((BATCH, FEATURES), F64, (BATCH,), torch.int64, CLASSES)


class Draws:
    """`samples` random samples of a spec; the same ones whenever and wherever asked.

    missing: samples without a target. ends: sequences of `ends` samples, the last one marked.
    """

    portable = True

    def __init__(
        self,
        samples: int,
        *,
        spec: SampleSpec = DRAWN,
        seed: int = 3,
        missing: Collection[int] = (),
        ends: int | None = None,
    ) -> None:
        self.spec = spec
        self._samples, self._seed, self._missing, self._ends = samples, seed, missing, ends

    def samples(self) -> Iterator[Sample]:
        random, spec = torch.Generator().manual_seed(self._seed), self.spec
        for n in range(self._samples):
            u = random_values(spec.u_shape, spec.u_dtype, spec.tokens, random)
            y = random_values(spec.y_shape, spec.y_dtype, spec.classes, random)
            last = self._ends is not None and n % self._ends == self._ends - 1
            yield Sample(u, None if n in self._missing else y, end=last)


def random_values(
    shape: tuple[int, ...], dtype: torch.dtype, numbers: int | None, random: torch.Generator
) -> Tensor:
    """Return whole numbers below `numbers`, or values from N(0, 1)."""
    if numbers is not None:
        return torch.randint(numbers, shape, generator=random)
    return torch.randn(shape, generator=random, dtype=dtype)
