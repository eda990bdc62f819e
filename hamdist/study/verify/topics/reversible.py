"""Level `reversible`: gradients without stored activations, by running the blocks backwards.

n: features of one state of a pair, N: steps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hamdist.config import Settings
from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Graph
from hamdist.dynamics.modules.pairs import SecondHalf, ToPair
from hamdist.dynamics.modules.reversible import Coupling, Midpoint, MidpointStart, Squeeze
from hamdist.dynamics.objective.losses import mse
from hamdist.runtime.train.train import train
from hamdist.streams.adapters import from_iterable
from hamdist.study.shared.exact_runs import float64_settings
from hamdist.study.verify.oracles import golden
from hamdist.study.verify.oracles.check import Check, Difference, absolute, largest
from hamdist.study.verify.oracles.golden import ORACLE, RTOL, Array, GoldenData, entry, number
from hamdist.study.verify.oracles.networks import CLASSES, F64, FEATURES, Draws, dense, seeded
from hamdist.study.verify.topics.backpropagation import apart_from_sgd, sgd

BOUND = 1e-10
WIDTH = 8
CHANNELS, SIDE = 2, 4
TAU = 0.05
KINDS = ("tanh", "anti")


def checks(full: bool) -> Generator[Check, None, None]:
    """Yield the checks of gradients, of training, and of the midpoint rule."""
    for depth in (100, 1000) if full else (100,):
        for name, make in MODELS.items():
            title = f"{name}, depth {depth}: gradients (relative to the largest)"
            measure = partial(_gradients, partial(make, depth), depth)
            yield Check(title, "autograd with every activation stored", BOUND, measure)
    depth, samples = (100, 20) if full else (40, 10)
    for blocks in (1, depth // 10, depth):
        yield Check(
            f"{depth} midpoint steps in {blocks} block{'s' if blocks > 1 else ''}: losses and "
            f"weights of {samples} samples",
            "autograd on the whole network and torch.optim.SGD",
            BOUND,
            partial(_trained, blocks, depth, samples),
        )
    yield from golden.shipped_checks("leapfrog")


# -- networks --------------------------------------------------------------------------------------


def midpoint(depth: int) -> nn.Sequential:
    """Return a net with one f in all steps."""
    step = Midpoint(dense(WIDTH, WIDTH), depth, TAU)
    return nn.Sequential(_linear(FEATURES, WIDTH), step, SecondHalf(), _linear(WIDTH, CLASSES))


def midpoint_layers(depth: int) -> nn.Sequential:
    """Return a net in which each step has an f of its own."""
    first = MidpointStart(dense(WIDTH, WIDTH), TAU)
    steps = [Coupling(dense(WIDTH, WIDTH), 2 * TAU) for _ in range(depth - 1)]
    ends = _linear(FEATURES, WIDTH), _linear(2 * WIDTH, CLASSES)
    return nn.Sequential(ends[0], first, *steps, ends[1])


def couplings(depth: int) -> nn.Sequential:
    """Return halves of RevNet blocks; F = tanh(LN(h) W + b)."""
    steps: list[nn.Module] = [
        Coupling(nn.Sequential(nn.LayerNorm(WIDTH, dtype=F64), *dense(WIDTH, WIDTH)), 0.3)
        for _ in range(depth)
    ]
    steps[0] = nn.Sequential(ToPair(), steps[0])
    return nn.Sequential(_linear(FEATURES, WIDTH), *steps, _linear(2 * WIDTH, CLASSES))


def convolutions(depth: int) -> nn.Sequential:
    """Return a small RevNet: couplings of convolutions, half-way a `Squeeze`."""
    pixels = CHANNELS * SIDE**2
    stem = nn.Sequential(_linear(FEATURES, pixels), nn.Unflatten(1, (CHANNELS, SIDE, SIDE)))
    wide = [_convolution(CHANNELS // 2) for _ in range(depth // 2)]
    deep = [_convolution(2 * CHANNELS) for _ in range(depth - depth // 2)]
    head = nn.Sequential(nn.Flatten(), _linear(pixels, CLASSES))
    return nn.Sequential(stem, *wide, Squeeze(), *deep, head)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=F64)


def _convolution(channels: int) -> Coupling:
    f = nn.Sequential(
        nn.GroupNorm(1, channels, dtype=F64),
        nn.Conv2d(channels, channels, 3, padding=1, dtype=F64),
        nn.ReLU(inplace=True),
    )
    return Coupling(f, 0.3)


MODELS: dict[str, Callable[[int], nn.Sequential]] = {
    "midpoint, one f": midpoint,
    "midpoint, an f per step": midpoint_layers,
    "couplings (RevNet)": couplings,
    "convolutional couplings": convolutions,
}


# -- against autograd ------------------------------------------------------------------------------


def _settings(**sections: Any) -> Settings:
    """Return settings with a tau that is not 1, so that it shows where one is forgotten."""
    return float64_settings("reversible", dynamics={"tau": 0.5}, **sections)


def _gradients(make: Callable[[], nn.Sequential], depth: int) -> Difference:
    """Return the largest difference of a weight's gradient, relative to its largest entry."""
    settings = _settings(learning={"lr": 0.0})
    result = train(seeded(make), Draws(1), settings)
    omega = {k: g for block in result.blocks.values() for k, g in block.omega.items()}
    plain = seeded(make)
    sgd(plain, Draws(1), settings.learning)
    gradients = {key: p.grad for key, p in plain.named_parameters() if p.grad is not None}
    return largest(
        (f"{key}, depth {depth}", absolute(omega[key], grad) / float(grad.abs().max()))
        for key, grad in gradients.items()
    )


def _trained(blocks: int, depth: int, samples: int) -> float:
    """Return the largest difference of a loss, and of a weight at the end."""
    size = depth // blocks
    settings = _settings(
        learning={"lr": 0.1, "momentum": 0.5, "dampening": 0.3},
        metrics={"window": 1},
        partition={"cuts": ["1", *map(str, range(1 + size, 2 + depth, size))]},
    )
    return apart_from_sgd(lambda: seeded(partial(midpoint_layers, depth)), samples, settings)


# -- golden files ----------------------------------------------------------------------------------


class _Field(nn.Module):
    """tanh(A h + b) with A = W ('tanh') or W - W^T ('anti'). h: (B, n)."""

    def __init__(self, W: Tensor, b: Tensor, kind: str) -> None:
        super().__init__()
        self.W = nn.Parameter(W)
        self.b = nn.Parameter(b)
        self.kind = kind

    def forward(self, h: Tensor) -> Tensor:
        A = self.W - self.W.T if self.kind == "anti" else self.W
        return torch.tanh(h @ A.T + self.b)


def checks_of(data: GoldenData, name: str) -> list[Check]:
    """Return the checks of a file of the kind leapfrog (`leak`: lambda; 0 where it has none)."""
    golden.choice(data, "kind", KINDS)
    size, steps = len(entry(data, "b")), int(number(data, "N"))
    shapes = {"W": (size, size), "h0": (size,), "y": (size,), "h": (steps + 1, size)}
    for key, shape in {**shapes, "dW": shapes["W"], "db": (size,), "dh0": (size,)}.items():
        entry(data, key, shape)
    number(data, "tau")
    return [
        Check(f"{name}: {title} (relative)", ORACLE, RTOL, partial(_leapfrog_apart, data, part))
        for title, part in (
            ("h forward, and recovered backwards", "states"),
            ("gradients by W, b and h_0", "gradients"),
        )
    ]


def _leapfrog_apart(data: GoldenData, part: str) -> Difference:
    run = _run(data)
    if part == "states":
        keys = {"h forward": "h", "h recovered": "h"}
    else:
        keys = {key: key for key in ("dW", "db", "dh0", "loss") if key in data}
        keys |= {f"{key} (autograd)": f"torch_{key}" for key in keys if f"torch_{key}" in data}
    return golden.worst(
        {
            title: (np.atleast_1d(run[title.removesuffix(" (autograd)")]), np.atleast_1d(data[key]))
            for title, key in keys.items()
        }
    )


def _run(data: GoldenData) -> dict[str, Array]:
    """Run the case on ordinary blocks: states as f is shown them, gradients as the blocks have
    them."""
    steps, leak = int(number(data, "N")), float(data.get("leak", 0.0))
    f = _Field(torch.tensor(data["W"]), torch.tensor(data["b"]), str(data["kind"]))
    end = SecondHalf()
    shown, last_shown = _watched(f), _watched(end)
    graph = Graph(
        [
            BlockSpec("start", nn.Identity(), (INPUT,)),
            BlockSpec("chain", Midpoint(f, steps, number(data, "tau"), leak=leak), ("start",)),
            BlockSpec("end", end, ("chain",), loss=mse),
        ]
    )
    sample = torch.tensor(data["h0"])[None], torch.tensor(data["y"])[None]
    result = train(graph, from_iterable([sample]), _settings(learning={"lr": 0.0}))
    chain, start = result.blocks["chain"], result.blocks["start"].z
    if start is None:
        raise ValueError("the first block has no costate")
    last = last_shown[-1].chunk(2, 1)[1]
    return {
        "h forward": torch.cat([*shown[-2 * steps : -steps], last]).numpy(),
        "h recovered": torch.cat([*shown[: -steps - 1 : -1], last]).numpy(),
        "dW": chain.omega["f.W"].numpy(),
        "db": chain.omega["f.b"].numpy(),
        "dh0": start[0].numpy(),
        "loss": np.array(result.windows["end"][0].mean_loss),
    }


def _watched(module: nn.Module) -> list[Tensor]:
    """Return a list to which `module` will add its inputs. A run works on copies; those keep the
    hook, which is a function, and with it this list."""
    shown: list[Tensor] = []

    def keep(_module: nn.Module, arguments: tuple[Tensor]) -> None:
        if not arguments[0].is_meta:
            shown.append(arguments[0].detach().clone())

    module.register_forward_pre_hook(keep)
    return shown
