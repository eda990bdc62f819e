"""The whole study of speed: its network, its measurements, and its results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hamdist.dynamics.objective.losses import mse
from hamdist.errors import SettingsError
from hamdist.models.build import ModelFactory, make_from_factory
from hamdist.runtime.process.threads import torch_threads
from hamdist.runtime.train.prepare import as_graph
from hamdist.streams.sample import SampleSpec, generator
from hamdist.study.propagation.gradients import (
    Network,
    as_network,
    exact_gradients,
    local_gradients,
    one_minus_cos,
    relative_error,
)
from hamdist.study.propagation.settling import CountRow, is_chain, tick_counts
from hamdist.study.propagation.streams import F64, StreamKind, timed_stream
from hamdist.study.shared.exact_runs import float64_settings

BATCH = 4
INPUTS, WIDTH, OUTPUTS = 8, 16, 4
DEPTH = 3


@dataclass(frozen=True, slots=True)
class SpeedStudy:
    """The measurements of a study.

    `speeds`: c in hops per second; `steps`: c tau, in (0, 1]; `seeds`: how many, each with its own
    weights and streams.
    """

    speeds: tuple[float, ...] = (10.0, 30.0, 100.0, 300.0, 1000.0)
    steps: tuple[float, ...] = (1.0, 0.5, 0.1)
    streams: tuple[StreamKind, ...] = tuple(StreamKind)
    seeds: int = 2

    def __post_init__(self) -> None:
        """Check the values. Raises SettingsError, in the words of the command's options."""
        options = {"speeds": self.speeds, "steps-ratio": self.steps, "streams": self.streams}
        for name, values in options.items():
            if not values or len({*values}) < len(values):
                raise SettingsError(f"--{name}: give at least one value, and none twice")
        for c in self.speeds:
            if not 0 < c < math.inf:
                raise SettingsError(f"--speeds: c = {c:g}: a speed is above 0 hops per second")
        for a in self.steps:
            if not 0 < a <= 1:
                raise SettingsError(
                    f"--steps-ratio: c tau = {a:g} is not in (0, 1]; above 1 states overshoot"
                )


def parse_study(options: Mapping[str, str], seeds: int) -> SpeedStudy:
    """Return the study of the options 'speeds', 'steps-ratio', 'streams', separated by commas.

    Raises SettingsError for anything that is no number or no stream.
    """
    fields = {"speeds": "speeds", "steps-ratio": "steps"}
    values: dict[str, Any] = {
        fields[name]: _numbers(name, text) for name, text in options.items() if name in fields
    }
    if "streams" in options:
        values["streams"] = _streams(options["streams"])
    return SpeedStudy(**values, seeds=seeds)


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(
            f"--{name} {text!r}: give numbers, separated by commas, for example 1,0.5"
        ) from None


def _streams(text: str) -> tuple[StreamKind, ...]:
    names = [part.strip() for part in text.split(",")]
    kinds = [kind.value for kind in StreamKind]
    wrong = [name for name in names if name not in kinds]
    if wrong:
        raise SettingsError(
            f"--streams {text!r}: {wrong[0]!r} is no stream; streams: {', '.join(kinds)}"
        )
    return tuple(StreamKind(name) for name in names)


@dataclass(frozen=True, slots=True)
class Subject:
    """The network under study: `make` returns it, by seed; `words` describe it."""

    make: Callable[[int], Network]
    words: str


def tanh_network(depth: int | None = None, width: int | None = None) -> Subject:
    """Return `depth` layers (3) of `width` neurons (16) with tanh, the last one linear."""
    depth, width = depth or DEPTH, width or WIDTH
    sizes = [INPUTS, *[width] * (depth - 1), OUTPUTS]

    def make(seed: int) -> Network:
        return cut_chain(tanh_mlp(sizes, seed), (INPUTS,))

    return Subject(make, f"tanh network {'-'.join(map(str, sizes))}")


def own_network(factory: ModelFactory, name: str, input_shape: Sequence[int]) -> Subject:
    """Return the network that `factory` makes."""

    def make(seed: int) -> Network:
        return cut_chain(make_from_factory(factory, seed=seed, dtype=F64), input_shape)

    return Subject(make, name)


def tanh_mlp(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """Return Linear, Tanh, ..., Linear between neighbouring `sizes`, in float64.

    W ~ N(0, 1/fan_in), b ~ N(0, 0.01).
    """
    drawn = generator("tanh mlp", seed)
    children: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        linear: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, fan_in, fan_out, dtype=F64
        )
        with torch.no_grad():
            draw = torch.randn(fan_out, fan_in, generator=drawn, dtype=F64)
            linear.weight.copy_(draw / math.sqrt(fan_in))
            linear.bias.copy_(0.1 * torch.randn(fan_out, generator=drawn, dtype=F64))
        children += [linear, nn.Tanh()]
    return nn.Sequential(*children[:-1])


def cut_chain(model: nn.Module, input_shape: Sequence[int], batch: int = BATCH) -> Network:
    """Cut `model` into a chain of state blocks, one per layer, with the squared error as its loss.

    That is Hamiltonian Learning's state net. Raises GraphError if the model cannot be cut.
    """
    spec = SampleSpec((batch, *input_shape), F64, (batch, 1), F64)
    settings = float64_settings("local", locality={"readout": "state"})
    return as_network(as_graph(model, settings, spec, mse), input_shape, batch)


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """A network on a stream, at one speed c (hops per second); `ticks` were run for it."""

    stream: str
    c_tau: float
    c: float
    seed: int
    error: float
    one_minus_cos: float
    ticks: int


@dataclass(frozen=True, slots=True)
class SpeedResult:
    """The results of a study of speed.

    `network`, `command`: in words; `counts`: of static inputs, if the network is a chain.
    """

    study: SpeedStudy
    network: str
    command: str
    rows: Sequence[SpeedRow]
    counts: Sequence[CountRow]


def run_study(
    study: SpeedStudy,
    subject: Subject,
    command: str = "",
    on_progress: Callable[[int, int, SpeedRow], None] = lambda *_: None,
) -> SpeedResult:
    """Run the whole study, in the calling thread.

    `on_progress` is called after every row with the number of finished rows and of all rows.
    """
    points = list(itertools.product(study.streams, study.steps, study.speeds))
    rows: list[SpeedRow] = []
    counts: list[CountRow] = []
    blocks = weights = 0
    with torch_threads(1):
        for seed in range(study.seeds):
            network = subject.make(seed)
            blocks, weights = len(network.graph.blocks), network.backprop.weights
            for kind, a, c in points:
                stream = timed_stream(kind, network.values, seed)
                exact = exact_gradients(network, stream)
                local, ticks = local_gradients(network, stream, c, a)
                errors = relative_error(local, exact), one_minus_cos(local, exact)
                rows.append(SpeedRow(kind.value, a, c, seed, *errors, ticks))
                on_progress(len(rows), study.seeds * len(points), rows[-1])
            if StreamKind.STATIC in study.streams and is_chain(network):
                counts += tick_counts(network, study.steps, seed)
    words = f"{subject.words}, {blocks} block{'s' * (blocks > 1)}, {weights:,} weights"
    return SpeedResult(study, words, command, rows, counts)
