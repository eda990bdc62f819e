"""Gradient descent recovered (HL Appendix E): every cell of the table of `hamdist study recovery`,
and the golden files of its small networks.

K: ticks, one sample each.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.errors import SettingsError
from hamdist.runtime.plan.plan import Plan, make_plan
from hamdist.runtime.train.prepare import as_graph
from hamdist.streams import from_iterable
from hamdist.study.gradient_descent.report import NAMES
from hamdist.study.gradient_descent.scenarios import (
    BOUND,
    Placement,
    RowWorkers,
    Scenario,
    ScenarioJob,
    jobs,
    settings_of,
)
from hamdist.study.shared.exact_runs import RecordedNodes
from hamdist.study.verify.oracles import golden
from hamdist.study.verify.oracles.check import Check, Difference
from hamdist.study.verify.oracles.golden import ORACLE, RTOL, Array, GoldenData, entry, number

SMALL_STEPS = 25
SGD = "torch.optim.SGD, float64"


def checks(full: bool) -> Iterator[Check]:
    """Yield a check per model, scenario and placement.

    `full`: the paper's epochs, in as many processes as there are cores; else the first 25 samples,
    in this one.
    """
    scenarios = jobs() if full else jobs(steps=SMALL_STEPS)
    with RowWorkers(scenarios, None if full else 1) as rows:
        for job in scenarios:
            for placement in Placement:
                name = f"{NAMES[job.model]}, {job.scenario}, {placement.value}: losses and weights"
                yield Check(name, SGD, BOUND, partial(_cell, rows, job, placement))


def _cell(rows: RowWorkers, job: ScenarioJob, placement: Placement) -> Difference:
    row = rows.row(job)
    cell = next(c for c in row.cells if c.placement is placement)
    return Difference(
        cell.difference,
        f"losses {cell.losses:.1e}, weights {cell.weights:.1e}, {row.steps} steps on {row.source}",
    )


# -- golden files ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """A file, read: `layers` (outputs, activation) on samples X[order[k]], one in each tick."""

    data: GoldenData
    layers: tuple[tuple[int, str], ...]
    scenario: Scenario
    K: int

    @property
    def keys(self) -> list[str]:
        """Return the names of the parameters, in the order of the model's."""
        return [key for key, _ in golden.weight_shapes(self.layers, 0)]


def checks_of(data: GoldenData, name: str) -> list[Check]:
    """Return the checks of a file of torch.optim.SGD.

    The network runs as output net, as one state block, and cut before its last layer.
    """
    case = _read(data)
    whole, title = len(case.layers) == 1, "L, omega, theta, final weights (relative)"
    return [
        Check(
            f"{name}, {placement.value}: {title}", ORACLE, RTOL, partial(_compared, case, placement)
        )
        for placement in Placement
        if not (whole and placement is Placement.SPLIT)
    ]


def _read(data: GoldenData) -> _Case:
    """Read a file's entries. Raises SettingsError where they do not fit together."""
    spec = json.loads(str(entry(data, "spec", ())))
    layers = golden.read_layers(spec, "entry 'spec'")
    if not layers:
        raise SettingsError("entry 'spec' has no layer")
    constants = [number(data, key) for key in ("lr", "momentum", "dampening", "tau")]
    K = len(entry(data, "order"))
    case = _Case(data, layers, Scenario(*constants), K)
    snaps = len(entry(data, "snap"))
    if not np.all((data["snap"] >= 0) & (data["snap"] <= K)):
        raise SettingsError(f"entry 'snap' names ticks outside 0 ... {K}")
    for key, shape in golden.weight_shapes(layers, entry(data, "X").shape[1]):
        for q in ("th0", "torch_final"):
            entry(data, f"{q}.{key}", shape)
        for q in ("th", "om"):
            entry(data, f"{q}.{key}", (snaps, *shape))
    for q in ("L", "torch_loss"):
        entry(data, q, (K,))
    return case


def _model(case: _Case) -> nn.Sequential:
    """Return the network, with the weights of the file, as a body and a head."""
    layers = golden.dense_layers(case.layers, case.data["X"].shape[1])
    children: OrderedDict[str, nn.Module] = OrderedDict(
        body=nn.Sequential(*layers[:-1]), head=layers[-1]
    )
    if len(layers) == 1:
        del children["body"]
    model = nn.Sequential(children)
    for key, weight in zip(case.keys, model.parameters(), strict=True):
        weight.data = torch.tensor(case.data[f"th0.{key}"])
    return model


def _compared(case: _Case, placement: Placement) -> Difference:
    data = case.data
    settings = settings_of(case.scenario, placement, case.K)
    x, y = torch.tensor(data["X"]), torch.tensor(data["Y"])
    samples = [(x[n : n + 1], y[n : n + 1]) for n in data["order"].tolist()]
    stream = from_iterable(samples, classes=case.layers[-1][0])
    graph = as_graph(_model(case), settings, stream.spec, cross_entropy)
    plan = make_plan(graph, settings, stream.spec)
    network = RecordedNodes(plan)
    network.record(stream)
    records = [*network.records.values()]
    readout = records[-1].node.metrics
    losses = np.array([] if readout is None else [w.loss for w in readout.windows])
    pairs = {"L": (losses, data["L"]), "L of torch": (losses, data["torch_loss"])}
    snap = data["snap"].tolist()
    omega = [
        _joined(moment) for moment in zip(*(r.modules[0].omega for r in records), strict=False)
    ]
    theta = [
        _joined(moment) for moment in zip(*(r.modules[0].theta for r in records), strict=False)
    ]
    for i, key in enumerate(case.keys):
        pairs[f"om.{key}"] = np.stack([omega[k][i] for k in snap]), data[f"om.{key}"]
        pairs[f"th.{key}"] = np.stack([theta[k][i] for k in snap]), data[f"th.{key}"]
        pairs[f"torch_final.{key}"] = theta[case.K][i], data[f"torch_final.{key}"]
    return golden.worst({**pairs, **_constants(case, plan)})


def _joined(moment: Iterable[Sequence[Tensor]]) -> list[Array]:
    """Return all blocks' tensors in the order of the model's."""
    return [tensor.numpy() for block in moment for tensor in block]


def _constants(case: _Case, plan: Plan) -> dict[str, tuple[Array, Array]]:
    """Return eta, beta and phi of the table beside those of the file, where it has them."""
    d = plan.dynamics
    constants = {
        "eta": d.eta_omega,
        "beta": d.beta,
        "phi": d.phi(1),
        "phi_0": d.phi(0) if d.first_phi is None else d.first_phi,
    }
    return {
        key: (np.array([value]), case.data[key].reshape(1))
        for key, value in constants.items()
        if key in case.data
    }
