"""Golden files of the tracker (NILP): a fully connected net of n neurons of which the first one
follows z(t), as one state block with an edge to itself, and neuron by neuron.

    x' = c ( -x + act(W v) ),  v = x or [x; 1]        H' = q/2 (x_1 - z)^2 + r_w/2 |W|^2 + p . x'

The file's p and P are the costates of x and W. Its L takes the error at x_k, and so may that of the
sequential order, where H' and p's equation look at x_{k+1}.
K: ticks, N: neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hamdist.config import Settings
from hamdist.dynamics.blocks.energy import hamiltonian, lagrangian, robust_hamiltonian
from hamdist.dynamics.blocks.hold import HoldBlock
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.errors import SettingsError
from hamdist.models.tracker import First
from hamdist.runtime.plan.plan import make_plan
from hamdist.streams.adapters import from_iterable
from hamdist.study.shared.exact_runs import RecordedNodes, float64_settings
from hamdist.study.verify.oracles import golden
from hamdist.study.verify.oracles.check import Check, Difference
from hamdist.study.verify.oracles.golden import ORACLE, RTOL, Array, GoldenData, entry, number

# Without a bias unit a net is near an attractor, where rounding grows: 1e-12 in W_0 moves x by
# 1.3e-10 in 1000 steps (golden README).
RTOL_PURE = 1e-7
WHOLE = "x"
NEURON_TICKS = 250


def _graph(data: GoldenData) -> Graph:
    n = len(entry(data, "x0"))
    module = _module(data, range(n))
    whole = BlockSpec(WHOLE, module, (WHOLE,), shape=(n,), loss=mse, state=True, output=First())
    return Graph([whole])


def _by_neuron(data: GoldenData) -> Graph:
    """Return a graph in which each neuron is a block that reads all; the first is the readout."""
    n = len(entry(data, "x0"))
    names = [f"x{i}" for i in range(n)]
    return Graph(
        BlockSpec(
            name, _module(data, [i]), tuple(names), shape=(1,), loss=None if i else mse, state=not i
        )
        for i, name in enumerate(names)
    )


def _module(data: GoldenData, rows: Sequence[int]) -> nn.Sequential:
    """Return act(W v) of some rows of W_0, float64."""
    x0, weights = entry(data, "x0"), entry(data, "W0")
    bias = weights.shape[1] == len(x0) + 1
    if weights.shape not in ((len(x0), len(x0)), (len(x0), len(x0) + 1)):
        raise SettingsError(f"W0 has shape {weights.shape}, with {len(x0)} neurons")
    linear = nn.Linear(len(x0), len(rows), bias=bias, dtype=torch.float64)
    W = torch.tensor(weights[list(rows)])
    linear.weight.data = W[:, : len(x0)].contiguous()
    if bias:
        linear.bias.data = W[:, -1].contiguous()
    act = golden.ACTIVATIONS[golden.choice(data, "act", list(golden.ACTIVATIONS))]
    return nn.Sequential(linear, act())


def _settings(data: GoldenData) -> Settings:
    dynamics: dict[str, Any] = {
        "tau": number(data, "tau"),
        "c": number(data, "c"),
        "eta": number(data, "eta"),
        "beta": 1 / number(data, "r"),
        "phi": number(data, "q"),
        "sign": int(number(data, "s")) if "s" in data else -1,
        "weight_cost": number(data, "r_w"),
        "limit": 1e300,
    }
    order = golden.choice(data, "order", golden.ORDERS).replace("_", "-")
    locality = {"order": order, "target": "current", "readout": "state"}
    metrics = {"record": "trajectory"}
    return float64_settings("local", locality=locality, dynamics=dynamics, metrics=metrics)


def track(data: GoldenData, graph: Graph, K: int) -> dict[str, Array]:
    """Return hamdist's trajectories x, p, W, P (K + 1 entries) and energies L, H, Hrobust (K
    entries)."""
    z = torch.tensor(entry(data, "z"))[:K]
    samples = [(torch.zeros(1, 1, dtype=z.dtype), value.reshape(1, 1)) for value in [*z, z[-1]]]
    stream = from_iterable(samples)
    network = RecordedNodes(make_plan(graph, _settings(data), stream.spec))
    x0, p0, P0 = (torch.tensor(data["x0"]), torch.tensor(entry(data, "p")[0]), _costate(data))
    at = 0
    for record in network.records.values():
        block = record.node.block
        if not isinstance(block, HoldBlock):
            raise TypeError("a neuron is a block with a state")
        rows = slice(at, at + block.h.shape[1])
        at = rows.stop
        block.h, block.z = x0[rows].reshape(1, -1), p0[rows].reshape(1, -1)
        block.weights.omega = [P0[rows, : len(x0)].contiguous()]
        if P0.shape[1] > len(x0):
            block.weights.omega.append(P0[rows, -1].contiguous())
    network.record(stream)
    modules = [record.modules[0] for record in network.records.values()]
    ours = {
        "W": np.concatenate([_joined(module.theta, K) for module in modules], axis=1),
        "P": np.concatenate([_joined(module.omega, K) for module in modules], axis=1),
    }
    recorded = {name: rec.node.records() for name, rec in network.records.items()}
    records = {name: r for name, r in recorded.items() if r is not None}
    for name, part in (("x", "h"), ("p", "z")):
        states = [getattr(r, part)[: K + 1, 0] for r in records.values()]
        ours[name] = torch.cat(states, dim=-1).numpy()
    for name, energy in (("L", lagrangian), ("H", hamiltonian), ("Hrobust", robust_hamiltonian)):
        ours[name] = energy(records)[1][:K].numpy()
    return ours


def _costate(data: GoldenData) -> Tensor:
    """Return P_0; zero where the file's snapshots begin later."""
    if len(entry(data, "snap")) and data["snap"][0] == 0:
        return torch.tensor(entry(data, "P")[0])
    return torch.zeros(data["W0"].shape, dtype=torch.float64)


def _joined(entries: Sequence[Sequence[Tensor]], K: int) -> Array:
    """Return (K + 1, rows, N) with the bias as the last column where there is one."""
    rows = [torch.cat([part.reshape(len(part), -1) for part in e], dim=1) for e in entries[: K + 1]]
    return torch.stack(rows).numpy()


def _pairs(data: GoldenData, ours: Mapping[str, Array], K: int) -> dict[str, tuple[Array, Array]]:
    """Return (ours, expected) of x, p, W and P in the first K ticks."""
    snap = data["snap"][data["snap"] < K]
    pairs = {name: (ours[name][:K], entry(data, name)[:K]) for name in ("x", "p")}
    for name in ("W", "P"):
        pairs[name] = (ours[name][snap], entry(data, name)[: len(snap)])
    for name in ("x", "p", "W", "P"):
        if f"{name}_end" in data and len(data["z"]) == K:
            pairs[f"{name}_end"] = (ours[name][K:], data[f"{name}_end"][None])
    return pairs


def _energies(data: GoldenData, ours: Mapping[str, Array]) -> Difference:
    """Return L, H and H'. In the sequential order the recorded loss is of x_{k+1}; a file may
    take it at x_k, as its formula is printed."""
    names = [name for name in ("L", "H", "Hrobust") if name in data]
    as_recorded = golden.worst({name: (ours[name], data[name]) for name in names})
    if golden.choice(data, "order", golden.ORDERS) != "sequential":
        return as_recorded
    K, q = len(data["z"]), number(data, "q")
    errors = ours["x"][:, 0] - np.append(data["z"], 0.0)
    ahead = ours["x"][1:, 0] - data["z"]
    shift = 0.5 * q * (errors[:K] ** 2 - ahead**2)
    at_old = golden.worst({name: (ours[name] + shift, data[name]) for name in names})
    return min(as_recorded, at_old, key=lambda f: f.difference)


def checks_of(data: GoldenData, name: str) -> list[Check]:
    """Return the checks of a tracking file."""
    pure = entry(data, "W0").shape[1] == len(entry(data, "x0"))
    rtol = RTOL_PURE if pure else RTOL
    graph, neurons = _graph(data), _by_neuron(data)
    for key in ("z", "snap", "x", "p", "W", "P"):
        entry(data, key)
    _settings(data)
    K = len(data["z"])
    ticks = min(K, NEURON_TICKS)

    @cache
    def whole() -> dict[str, Array]:
        return track(data, graph.copy(), K)

    return [
        Check(
            f"{name}: every tick (relative)",
            f"{ORACLE}: x, p, W, P",
            rtol,
            lambda: golden.worst(_pairs(data, whole(), K)),
        ),
        Check(
            f"{name}: energies (relative)",
            f"{ORACLE}: L, H, H'",
            rtol,
            lambda: _energies(data, whole()),
        ),
        Check(
            f"{name}: neuron by neuron, {ticks} ticks (relative)",
            f"{ORACLE}: x, p, W, P",
            rtol,
            lambda: golden.worst(_pairs(data, track(data, neurons.copy(), ticks), ticks)),
        ),
    ]
