"""Golden files of Hamilton's equations tick by tick: any network of dense nodes, any order.

Entry k of h, z, omega and theta is the value at t_k, before tick k; entry k of y, L and H' belongs
to tick k itself. A node of the file is a block with a state; its output net is an output net, or,
where it is the identity on one node, that node is a readout with a state.
Beyond the format of shared/golden/README.md a file may hold

    c.v, eta.v        of block v, instead of c and eta
    eta_z, eta_omega  instead of one eta for both costates
    r_w               weight cost: H' has the term r_w/2 |theta|^2
    missing (K,)      ticks without a target
    held, reset       ticks of a sample, and whether h and z are cleared before each
    stamped           tau is not set but follows from the stream's time stamps
    inner             the output net is a part of the block that it reads

K: ticks, B: batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hamdist.config import Settings
from hamdist.dynamics.blocks.energy import Records, robust_hamiltonian
from hamdist.dynamics.blocks.hold import HoldBlock
from hamdist.dynamics.graph.graph import INPUT, OUTPUT_KEY, BlockSpec, Graph
from hamdist.dynamics.objective.losses import cross_entropy, mse
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.levels import Locality
from hamdist.errors import SettingsError
from hamdist.runtime.plan.plan import Plan, make_plan
from hamdist.streams.adapters import from_iterable
from hamdist.streams.sample import Sample, Stream
from hamdist.study.shared.exact_runs import ModuleRecord, RecordedNodes, float64_settings
from hamdist.study.verify.oracles import golden
from hamdist.study.verify.oracles.check import Check, Difference
from hamdist.study.verify.oracles.golden import ORACLE, RTOL, Array, GoldenData, entry, number

READOUT = "y"
WEIGHTS = {"W": "weight", "b": "bias"}


@dataclass(frozen=True)
class _Node:
    """A node, or the output net: the names of its parents, its layers (outputs, activation)."""

    name: str
    parents: tuple[str, ...]
    layers: tuple[tuple[int, str], ...]

    @property
    def keys(self) -> list[str]:
        """Return the names of its parameters, in the order of the module's."""
        return [f"{self.name}.{key}" for key, _ in golden.weight_shapes(self.layers, 0)]


@dataclass(frozen=True)
class Ticks:
    """A tick file, read: K ticks of a network of `nodes`, with the output net `out`."""

    data: GoldenData
    nodes: tuple[_Node, ...]
    out: _Node
    dims: Mapping[str, int]
    K: int
    batch: int

    @property
    def state_readout(self) -> str | None:
        """Return the node that is its own output (no output net), or whose block holds it."""
        alone = len(self.out.parents) == 1 and self.out.parents[0] != INPUT
        inside = not self.out.layers or bool(self.data.get("inner", False))
        return self.out.parents[0] if alone and inside else None

    @property
    def blocks(self) -> tuple[_Node, ...]:
        """Return the nodes that are blocks: all, and the output net where it is one."""
        return self.nodes if self.state_readout else (*self.nodes, self.out)

    def width(self, node: _Node) -> int:
        """Return the number of a node's inputs."""
        return sum(self.dims[p] for p in node.parents)

    @property
    def order(self) -> str:
        """Return the order of the equations."""
        return golden.choice(self.data, "order", golden.ORDERS)

    @property
    def classes(self) -> int | None:
        """Return the number of classes, if the loss is cross-entropy."""
        wide = self.out.layers[-1][0] if self.out.layers else self.width(self.out)
        return wide if golden.choice(self.data, "loss", ("mse", "ce")) == "ce" else None


def read_ticks(data: GoldenData) -> Ticks:
    """Read a tick file's entries. Raises SettingsError where they do not fit together."""
    spec = json.loads(str(entry(data, "spec", ())))
    K, batch, inputs = entry(data, "u").shape
    nodes = tuple(_node(*node) for node in spec["nodes"])
    dims = {INPUT: inputs, **{n.name: n.layers[-1][0] for n in nodes}}
    ticks = Ticks(data, nodes, _node(READOUT, *spec["out"]), dims, K, batch)
    for node in nodes:
        for q in ("h", "z"):
            entry(data, f"{q}.{node.name}", (K + 1, batch, dims[node.name]))
    for node in (*nodes, ticks.out):
        for key, shape in golden.weight_shapes(node.layers, ticks.width(node)):
            for q in ("th", "om"):
                entry(data, f"{q}.{node.name}.{key}", (K + 1, *shape))
    for key in ("yhat", "tau", "phi"):
        if len(entry(data, key, None if key == "yhat" else (K,))) != K:
            raise SettingsError(f"entry {key!r} has {len(data[key])} ticks, u has {K}")
    if "mask_node" in data and not np.isin(entry(data, "mask_node", (K, len(nodes))), (0, 1)).all():
        raise SettingsError("entry 'mask_node' holds something else than 0 and 1")
    return ticks


def _node(name: str, parents: Sequence[str], layers: Sequence[tuple[int, str]]) -> _Node:
    return _Node(name, tuple(parents), golden.read_layers(layers, f"node {name!r}"))


def _graph(ticks: Ticks) -> Graph:
    loss = mse if ticks.classes is None else cross_entropy

    def module(node: _Node) -> nn.Sequential:
        layers = golden.dense_layers(node.layers, ticks.width(node))
        chain = nn.Sequential(*(part for layer in layers for part in layer))
        for key, weight in zip(node.keys, chain.parameters(), strict=True):
            weight.data = torch.tensor(ticks.data[f"th.{key}"][0])
        return chain

    blocks = []
    for node in ticks.blocks:
        is_state = node is not ticks.out
        has_loss = node.name == ticks.state_readout
        blocks.append(
            BlockSpec(
                node.name,
                module(node),
                node.parents,
                loss=loss if has_loss or not is_state else None,
                state=has_loss,
                output=module(ticks.out) if has_loss and ticks.out.layers else None,
                shape=(ticks.dims[node.name],) if is_state else None,
            )
        )
    return Graph(blocks)


def _settings(ticks: Ticks, delay_free: bool) -> Settings:
    """Return the settings. delay_free: the blocks move one after the other (HL Eq. 10)."""
    data = ticks.data
    pace: dict[str, Any] = {"speed": int(data.get("held", 1))}
    if delay_free:
        pace = {"moves": "layer-by-layer", "speed": "depth"}
    dynamics: dict[str, Any] = {
        "tau": "stamps" if data.get("stamped") else {"values": data["tau"].tolist()},
        "phi": {"values": data["phi"].tolist()},
        "c": number(data, "c"),
        "sign": int(number(data, "s")),
        "beta": number(data, "beta") if "beta" in data else 0.0,
        "blocks": {node.name: _block_constants(ticks, node) for node in ticks.blocks},
        "limit": 1e300,
    }
    if data.get("reset"):
        dynamics["reset"] = {"h": "sample", "z": "sample"}
    for key in ("eta", "eta_z", "eta_omega"):
        if key in data:
            dynamics[key] = number(data, key)
    if "r_w" in data:
        dynamics["weight_cost"] = number(data, "r_w")
    order = ticks.order.replace("_", "-")
    locality = {"order": order, "target": "current", "readout": "state", **pace}
    metrics = {"record": "trajectory"}
    return float64_settings("local", locality=locality, dynamics=dynamics, metrics=metrics)


def _block_constants(ticks: Ticks, node: _Node) -> dict[str, Any]:
    """Return a block's constants that differ from the network's: c, eta, beta by parameter."""
    data = ticks.data
    constants: dict[str, Any] = {
        key: number(data, f"{key}.{node.name}")
        for key in ("c", "eta")
        if f"{key}.{node.name}" in data
    }
    parts = {"": node}
    if node.name == ticks.state_readout:
        parts[OUTPUT_KEY] = ticks.out
    rates = {}
    for prefix, part in parts.items():
        for key in part.keys:
            _, i, letter = key.rsplit(".", 2)
            if f"beta.{key}" in data:
                name = f"{prefix}{2 * int(i)}.{WEIGHTS[letter]}"
                rates[name] = number(data, f"beta.{key}")
    return constants | ({"beta": rates} if rates else {})


def _is_delay_free(ticks: Ticks, graph: Graph) -> bool:
    """Return True if the mask is that of HL Eq. 10, and samples are shown accordingly."""
    nu = len(ticks.nodes)
    mask = ticks.data.get("mask_node")
    if mask is None or nu < 2 or not ticks.state_readout or not graph.acyclic:
        return False
    depths = [graph.depths[n.name] for n in ticks.nodes]
    one_by_one = np.equal.outer(np.arange(ticks.K) % nu, depths)
    firsts = np.arange(ticks.K) // nu * nu
    shown = all(np.array_equal(ticks.data[q], ticks.data[q][firsts]) for q in ("u", "yhat"))
    return shown and np.array_equal(mask, one_by_one)


def _samples(ticks: Ticks, held: int) -> list[Sample]:
    """Return what is shown, for `held` ticks each; the last sample once more, to come to t_K."""
    data = ticks.data
    u, y = torch.tensor(data["u"]), torch.tensor(data["yhat"])
    times = np.append(0.0, np.cumsum(data["tau"])) if data.get("stamped") else None
    missing = data.get("missing", np.zeros(ticks.K, dtype=bool))
    return [
        Sample(
            u[min(k, ticks.K - 1)],
            None if k < ticks.K and missing[k] else y[min(k, ticks.K - 1)],
            time=None if times is None else float(times[k]),
        )
        for k in [*range(0, ticks.K, held), ticks.K]
    ]


class _Masked(HoldSchedule):
    """A held schedule in which the blocks move when a mask (K, nodes) says so."""

    def __init__(self, graph: Graph, knobs: Locality, mask: Mapping[str, Array]) -> None:
        super().__init__(graph, knobs)
        self._mask = mask

    def moves(self, block: str, tick: int) -> bool:
        column = self._mask.get(block)
        return column is None or tick >= len(column) or bool(column[tick])


def _planned(ticks: Ticks) -> tuple[Graph, Plan, Stream, Settings]:
    graph = _graph(ticks)
    delay_free = _is_delay_free(ticks, graph)
    settings = _settings(ticks, delay_free)
    held = len(ticks.nodes) if delay_free else int(ticks.data.get("held", 1))
    stream = from_iterable(_samples(ticks, held), classes=ticks.classes)
    plan = make_plan(graph, settings, stream.spec)
    mask = ticks.data.get("mask_node")
    if mask is not None and not delay_free:
        columns = {n.name: mask[:, i] for i, n in enumerate(ticks.nodes)}
        plan = replace(plan, schedule=_Masked(graph, plan.knobs, columns))
    return graph, plan, stream, settings


def run_ticks(ticks: Ticks) -> dict[str, Array]:
    """Return hamdist's trajectories, under the names of the file's entries; `L` holds phi L."""
    _, plan, stream, _ = _planned(ticks)
    network = RecordedNodes(plan)
    modules: list[tuple[_Node, ModuleRecord]] = []
    for record, node in zip(network.records.values(), ticks.blocks, strict=True):
        modules += zip((node, ticks.out), record.modules, strict=False)
        block = record.node.block
        if isinstance(block, HoldBlock):
            block.h = torch.tensor(ticks.data[f"h.{node.name}"][0])
            block.z = torch.tensor(ticks.data[f"z.{node.name}"][0])
    for node, module in modules:
        module.weights.omega = [torch.tensor(ticks.data[f"om.{key}"][0]) for key in node.keys]
    network.record(stream)
    entries = recorded(ticks, {b: r.node.records() for b, r in network.records.items()})
    for node, module in modules:
        for i, key in enumerate(node.keys):
            entries[f"om.{key}"] = _first(ticks.K + 1, (o[i] for o in module.omega))
            entries[f"th.{key}"] = _first(ticks.K + 1, (t[i] for t in module.theta))
    return entries


def _first(n: int, values: Iterable[Tensor]) -> Array:
    return np.stack([v.numpy() for v in islice(values, n)])


def recorded(ticks: Ticks, by_block: Mapping[str, Records | None]) -> dict[str, Array]:
    """Return h, z, y, phi L and H' out of what the blocks recorded."""
    records = {name: r for name, r in by_block.items() if r is not None}
    entries: dict[str, Array] = {}
    for node in ticks.nodes:
        for q in ("h", "z"):
            values = getattr(records[node.name], q)
            if values is not None:
                entries[f"{q}.{node.name}"] = values[: ticks.K + 1].numpy()
    readout = records[ticks.state_readout or READOUT]
    if readout.prediction is not None:
        entries["y"] = readout.prediction[: ticks.K].numpy()
    entries["L"] = readout.loss[: ticks.K].numpy()
    entries["Hp"] = robust_hamiltonian(records)[1][: ticks.K].numpy()
    return entries


def expected(ticks: Ticks) -> dict[str, Array]:
    """Return the file's own trajectories; `L` as phi L."""
    trajectories = {
        key: array
        for key, array in ticks.data.items()
        if key in ("y", "Hp") or key.partition(".")[0] in ("h", "z", "om", "th")
    }
    if "L" in ticks.data:
        trajectories["L"] = ticks.data["phi"] * entry(ticks.data, "L", (ticks.K,))
    return trajectories


def compared(ours: Mapping[str, Array], expected: Mapping[str, Array]) -> Difference:
    """Return the largest distance over the entries that both have."""
    return golden.worst({key: (ours[key], expected[key]) for key in expected if key in ours})


def checks(full: bool) -> Iterator[Check]:  # noqa: ARG001
    """Yield the checks of the files that autograd of H' made: every term, in every order."""
    return golden.shipped_checks("tick")


def checks_of(data: GoldenData, name: str) -> list[Check]:
    """Return the checks of a tick file."""
    ticks = read_ticks(data)
    title, oracle = f"{name}: every tick (relative)", f"{ORACLE}: h, z, ω, θ, y, L, H'"
    checks = [Check(title, oracle, RTOL, lambda: compared(run_ticks(ticks), expected(ticks)))]
    if any(key.startswith("bp_") for key in data):
        title = f"{name}: states, costates, gradients (relative)"
        oracle = "golden file: those of backpropagation"
        checks.append(Check(title, oracle, RTOL, lambda: _static(ticks, run_ticks(ticks))))
    return checks


def _static(ticks: Ticks, ours: Mapping[str, Array]) -> Difference:
    """Compare a run with static input, eta = beta = 0, c tau = 1, a chain of nu blocks:

    exact from tick
        h_l: l      z_l: 2 nu + 1 - l, sequential 2 nu - l      omega's increment: that of z_l

    (in the simultaneous order omega_{k+1} uses z_k, in the sequential order z_{k+1}).
    """
    data, nu = ticks.data, len(ticks.nodes)
    sequential = ticks.order == "sequential"
    scale = (data["tau"] * data["phi"])[0]
    pairs: dict[str, tuple[Array, Array]] = {}
    for depth, node in enumerate(ticks.nodes, start=1):
        z_from = 2 * nu + 1 - depth - sequential
        h, z = ours[f"h.{node.name}"][depth:], ours[f"z.{node.name}"][z_from:]
        pairs[f"h.{node.name}"] = _same(h, entry(data, f"bp_h.{node.name}"))
        delta = entry(data, f"bp_delta.{node.name}")
        pairs[f"c z.{node.name}"] = _same(number(data, "c") * z / data["phi"][0], delta)
        for key in node.keys:
            steps = np.diff(ours[f"om.{key}"], axis=0)[z_from - sequential :] / scale
            pairs[f"d omega.{key}"] = _same(steps, entry(data, f"bp_grad.{key}"))
    return golden.worst(pairs)


def _same(ours: Array, expected: Array) -> tuple[Array, Array]:
    return ours, np.broadcast_to(expected, ours.shape)
