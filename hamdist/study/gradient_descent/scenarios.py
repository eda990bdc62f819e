"""Gradient descent as Hamiltonian Learning (HL Appendix E): the scenarios, the placements, the
oracle, and one row of the table.

With rate gamma, momentum mu and dampening rho, torch.optim.SGD moves the weights by

    b_k = mu b_{k-1} + (1 - rho) G_k,  b_0 = G_0,     theta_{k+1} = theta_k - gamma b_k

and Hamilton's equations with beta = gamma/tau, eta = (1 - mu)/tau, phi = (1 - rho)/tau (phi = 1/tau
for the first loss) and omega_0 = 0 are

    omega_{k+1} = omega_k + tau ( phi G_k - eta omega_k )
    theta_{k+1} = theta_k - tau beta omega_{k+1}

so omega_{k+1} = b_k. G_k: gradient of sample k's loss, by the net as output net (HL Eq. 4), as one
state block, or as a state and an output net.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hamdist.config import FirstStep, Settings, merge
from hamdist.errors import SettingsError
from hamdist.runtime.process.threads import cores, torch_threads
from hamdist.runtime.train.train import train
from hamdist.study.gradient_descent.models import (
    MODELS,
    Data,
    Paths,
    images,
    iris,
    make_model,
    sequences,
)
from hamdist.study.shared.machine import Processes

BOUND = 1e-10
EPOCHS = {"rnn": 80, "lstm": 80}
MOST_EPOCHS = 40
SEED = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """A setting of SGD: lr, momentum, dampening; `tau` is the seconds of a tick."""

    lr: float
    momentum: float
    dampening: float
    tau: float


SCENARIOS: Mapping[str, Scenario] = {
    "GD-a": Scenario(0.01, 0.0, 0.0, 1.0),
    "GD-b": Scenario(0.001, 0.0, 0.0, 0.5),
    "Mom-a": Scenario(0.01, 0.05, 0.6, 1.0),
    "Mom-b": Scenario(0.01, 0.1, 0.5, 0.5),
}


class Placement(str, Enum):
    """The place of the network in Hamilton's equations."""

    OUTPUT = "output net"
    STATE = "state net"
    SPLIT = "state/output split"


# h and z are cleared before every sample, and a sample takes one tick: h_{k+1} = f(u_k), and the
# dissipation, one for both costates as in HL, finds no z to act on.
_CLEARED: dict[str, Any] = {"reset": {"h": "sample", "z": "sample"}}
_PLACED: Mapping[Placement, dict[str, Any]] = {
    Placement.OUTPUT: {"locality": {"grouping": "network", "order": "omega-first"}},
    Placement.STATE: {
        "locality": {"grouping": "network", "order": "sequential", "readout": "state"},
        "dynamics": _CLEARED,
    },
    Placement.SPLIT: {
        "locality": {"order": "sequential"},
        "partition": {"cuts": ["head"]},
        "dynamics": _CLEARED,
    },
}


def settings_of(
    scenario: Scenario,
    placement: Placement,
    steps: int,
    first_step: FirstStep = FirstStep.UNDAMPENED,
) -> Settings:
    """Return the settings of one run; its prequential windows are single samples."""
    s = scenario
    learning = {"lr": s.lr, "momentum": s.momentum, "dampening": s.dampening}
    fields = {
        "name": f"gradient descent, {placement.value}",
        "level": "local",
        "dtype": "float64",
        "seed": SEED,
        "steps": steps,
        "learning": {**learning, "first_step": first_step.value},
        "dynamics": {"tau": s.tau, "eta_z": (1 - s.momentum) / s.tau},
        "metrics": {"window": 1, "limit": steps + 1},
    }
    return Settings.model_validate(merge(fields, _PLACED[placement]))


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of a training.

    `losses`: (steps,), each before its sample was learned from; `weights`: the model's `state_dict`
    at the end.
    """

    losses: Tensor
    weights: Mapping[str, Tensor]

    def apart(self, other: Trained) -> tuple[float, float]:
        """Return the largest differences of losses and of weights; NaN if one is no number."""
        pairs = [(self.weights[key], tensor) for key, tensor in other.weights.items()]
        weights = torch.cat([(a - b).abs().flatten() for a, b in pairs])
        return float((self.losses - other.losses).abs().max()), float(weights.max())


def sgd(
    model: nn.Module, data: Data, scenario: Scenario, steps: int, *, zero_start: bool = False
) -> Trained:
    """Train by the oracle: torch.optim.SGD on the same model and samples in the same order.

    `zero_start`: the momentum begins at zero, b_{-1} = 0, as omega_0 = 0 does; by itself PyTorch
    begins with b_0 = G_0.
    """
    model = copy.deepcopy(model)
    optimiser = torch.optim.SGD(
        model.parameters(), scenario.lr, scenario.momentum, scenario.dampening
    )
    if zero_start:
        for p in model.parameters():
            optimiser.state[p]["momentum_buffer"] = torch.zeros_like(p)
    losses = []
    for sample in itertools.islice(data.stream.samples(), steps):
        loss = functional.cross_entropy(model(sample.u), cast(Tensor, sample.y))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimiser.step()
        losses.append(loss.detach())
    return Trained(torch.stack(losses), model.state_dict())


def hamiltonian(model: nn.Module, data: Data, settings: Settings) -> Trained:
    """Train by hamdist. Raises the errors of `train`, KeyboardInterrupt if Ctrl-C ended it."""
    result = train(model, data.stream, settings)
    if result.interrupted:
        raise KeyboardInterrupt
    (windows,) = result.windows.values()
    losses = torch.tensor([window.loss for window in windows], dtype=torch.float64)
    return Trained(losses, result.model.state_dict())


@dataclass(frozen=True, slots=True)
class ScenarioCell:
    """A cell of the table: largest differences of losses and of weights from the oracle."""

    placement: Placement
    losses: float
    weights: float
    seconds: float

    @property
    def difference(self) -> float:
        """Return the larger of both differences; NaN if one is."""
        both = (self.losses, self.weights)
        return math.nan if any(map(math.isnan, both)) else max(both)

    @property
    def passed(self) -> bool:
        """Return True if the cell equals the oracle, to BOUND."""
        return self.difference <= BOUND  # NaN is not


@dataclass(frozen=True, slots=True)
class ScenarioRow:
    """A row of the table: a model in a scenario, at all placements.

    `loss`: mean of the first and of the last epoch; `from_pytorch`: with the first step dampened,
    the difference of the final weights from PyTorch's, which does not dampen it.
    """

    model: str
    scenario: str
    source: str
    steps: int
    loss: tuple[float, float]
    cells: tuple[ScenarioCell, ...]
    seconds: float
    from_pytorch: float | None = None

    @property
    def passed(self) -> bool:
        """Return True if all cells do."""
        return all(cell.passed for cell in self.cells)


@dataclass(frozen=True, slots=True)
class ScenarioJob:
    """The specification of a row. `epochs` None: the paper's; `steps`: at most so many."""

    model: str
    scenario: str
    epochs: int | None = None
    steps: int | None = None
    first_step: FirstStep = FirstStep.UNDAMPENED
    paths: Paths = field(default_factory=Paths)


def run_row(job: ScenarioJob) -> ScenarioRow:
    """Compute a row, in this process and on one thread: SGD once, hamdist at every placement."""
    start = time.perf_counter()
    scenario = SCENARIOS[job.scenario]
    data = data_of(job.model, job.paths)
    model = model_of(job.model, data)
    epochs = EPOCHS.get(job.model, MOST_EPOCHS) if job.epochs is None else job.epochs
    steps = min(epochs * data.rows, job.steps or epochs * data.rows)
    dampened = job.first_step is FirstStep.DAMPENED and scenario.momentum > 0
    with torch_threads(1):
        oracle = sgd(model, data, scenario, steps, zero_start=dampened)
        cells = []
        for placement in Placement:
            started = time.perf_counter()
            settings = settings_of(scenario, placement, steps, job.first_step)
            losses, weights = hamiltonian(model, data, settings).apart(oracle)
            cells.append(ScenarioCell(placement, losses, weights, time.perf_counter() - started))
        plain = None
        if dampened:
            plain = oracle.apart(sgd(model, data, scenario, steps))[1]
    n = min(data.rows, steps)
    return ScenarioRow(
        model=job.model,
        scenario=job.scenario,
        source=data.source,
        steps=steps,
        loss=(float(oracle.losses[:n].mean()), float(oracle.losses[-n:].mean())),
        cells=tuple(cells),
        seconds=time.perf_counter() - start,
        from_pytorch=plain,
    )


def model_of(name: str, data: Data) -> nn.Sequential:
    """Return the model `name` for `data`, always with the same weights."""
    model = make_model(name, data.inputs, data.classes, SEED)
    if data.embedding is not None:
        model.get_parameter("body.0.weight").data.copy_(data.embedding)
    return model


def data_of(name: str, paths: Paths) -> Data:
    """Return the data of the model `name`."""
    if name in ("linear", "mlp"):
        return iris(SEED)
    if name in ("resnet", "vit"):
        return images(SEED, paths.images)
    return sequences(SEED, paths.texts, paths.glove)


# -- rows ------------------------------------------------------------------------------------------

# The long ones first, so that the processes end at about the same time.
COSTS = {"lstm": 6, "rnn": 3, "resnet": 3, "vit": 2}


def jobs(
    models: Sequence[str] = tuple(MODELS),
    *,
    epochs: int | None = None,
    steps: int | None = None,
    first_step: FirstStep = FirstStep.UNDAMPENED,
    paths: Paths | None = None,
) -> list[ScenarioJob]:
    """Return the rows of `models` in all scenarios; `epochs` None: those of the paper.

    Raises SettingsError for an unknown model.
    """
    wrong = [name for name in models if name not in MODELS]
    if wrong or not models:
        raise SettingsError(
            f"--models: {', '.join(wrong) or 'nothing'} is no model of the table; models: "
            f"{', '.join(MODELS)}"
        )
    return [
        ScenarioJob(model, scenario, epochs, steps, first_step, paths or Paths())
        for model in dict.fromkeys(models)
        for scenario in SCENARIOS
    ]


class RowWorkers:
    """Computes rows in as many processes as there are cores; with one process, in this one.

    As a context it ends the processes at its end, whatever they are doing.
    """

    def __init__(self, jobs: Sequence[ScenarioJob], processes: int | None = None) -> None:
        self._jobs = list(jobs)
        self._here = cache(run_row)
        self._pool: Processes | None = None
        self._futures: dict[ScenarioJob, Future[ScenarioRow]] = {}
        number = min(processes or cores(), len(jobs))
        if number > 1:
            self._pool = Processes(number)
            longest_first = sorted(jobs, key=lambda job: -COSTS.get(job.model, 1))
            self._futures = {job: self._pool.submit(run_row, job) for job in longest_first}

    def __enter__(self) -> RowWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def row(self, job: ScenarioJob) -> ScenarioRow:
        """Return one row; raises the error of its computation."""
        return self._futures[job].result() if self._futures else self._here(job)

    def finished(self) -> Iterator[ScenarioRow]:
        """Yield all rows, as they are finished."""
        if not self._futures:
            yield from map(self.row, self._jobs)
        for future in as_completed(self._futures.values()):
            yield future.result()
