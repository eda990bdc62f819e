"""Oracle: trajectories from an independent numpy implementation (tests/golden, float64).

Entry k of h, z, omega and theta is the value at time t_k. A node's step at tick k leaves z_k and
h_{k+1}; omega and theta of k + 1, in the sequential order those of k (they move when z_{k+1} is
complete).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hamdist.config import Settings
from hamdist.dynamics.graph import BlockSpec, Graph
from hamdist.dynamics.hold import HoldBlock
from hamdist.dynamics.losses import mse
from hamdist.runtime.hold import HoldNode
from hamdist.runtime.loop import run_loop
from hamdist.runtime.mail import Mailroom
from hamdist.runtime.nodes import make_node
from hamdist.runtime.plan import make_plan
from hamdist.runtime.source import SourceNode
from hamdist.streams import from_iterable

GOLDEN = Path(__file__).parents[1] / "golden"
# Those of the kind "tick" (the others: study/verify/golden.py).
FILES = sorted(p.name for p in GOLDEN.glob("*.npz") if {"spec", "u"} <= {*np.load(p)})
ACTIVATIONS = {"tanh": nn.Tanh, "linear": nn.Identity}


class Recorder:
    """Wraps a node and keeps its trajectory."""

    def __init__(self, node: HoldNode, sequential: bool) -> None:
        self.inner = node
        self.name = node.name
        self.late = node.late
        self.shift = 0 if sequential else 1
        assert isinstance(node.block, HoldBlock)
        self.block = node.block
        self.h = {0: self.block.h.clone()}
        self.z: dict[int, torch.Tensor] = {}
        self.omega = {0: [o.clone() for o in self.block.weights.omega]}
        self.theta = {0: [t.clone() for t in self.block.weights.theta]}

    @property
    def tick(self):
        return self.inner.tick

    def start(self):
        self.inner.start()

    def step(self):
        k = self.inner.tick
        self.inner.step()
        if self.inner.tick is None:
            return
        self.h[k + 1] = self.block.h.clone()
        self.z[k] = self.block.z.clone()
        self.omega[k + self.shift] = [o.clone() for o in self.block.weights.omega]
        self.theta[k + self.shift] = [t.clone() for t in self.block.weights.theta]


def _module(layers, inputs):
    chain = []
    for outputs, activation in layers:
        chain += [nn.Linear(inputs, outputs, dtype=torch.float64), ACTIVATIONS[activation]()]
        inputs = outputs
    return nn.Sequential(*chain)


def _run(name):
    data = np.load(GOLDEN / name)
    spec = json.loads(str(data["spec"]))
    dims = spec["dims"]
    (readout,), output_layers = spec["out"]
    assert not output_layers
    blocks = []
    for node, parents, layers in spec["nodes"]:
        module = _module(layers, sum(dims[p] for p in parents))
        for i in range(len(layers)):
            module[2 * i].weight.data = torch.tensor(data[f"th.{node}.{i}.W"][0])
            module[2 * i].bias.data = torch.tensor(data[f"th.{node}.{i}.b"][0])
        blocks.append(
            BlockSpec(
                node,
                module,
                tuple(parents),
                loss=mse if node == readout else None,
                state=node == readout,
                shape=(dims[node],),
            )
        )
    tau = float(data["tau"][0])
    phi = float(data["phi"][0])
    assert np.ptp(data["tau"]) == np.ptp(data["phi"]) == 0
    order = str(data["order"]).replace("_", "-")
    delay_free = "mask_node" in data
    locality = {"order": order, "target": "current", "readout": "state"}
    if delay_free:
        locality |= {"moves": "layer-by-layer", "speed": "depth"}
    settings = Settings.model_validate(
        {
            "level": "local",
            "dtype": "float64",
            "locality": locality,
            "dynamics": {
                "tau": tau,
                "c": float(data["c"]),
                "eta": float(data["eta"]),
                "beta": float(data["beta"]),
                "phi": phi,
                "sign": int(data["s"]),
            },
        }
    )
    u, y = torch.tensor(data["u"]), torch.tensor(data["yhat"])
    every = len(blocks) if delay_free else 1  # a sample lasts as many ticks
    assert all(np.ptp(data["u"][i : i + every], axis=0).max() == 0 for i in range(0, len(u), every))
    stream = from_iterable(list(zip(u[::every], y[::every], strict=True)))
    graph = Graph(blocks)
    plan = make_plan(graph, settings, stream.spec)
    mail = Mailroom({"u", *graph.blocks})
    recorders = []
    for b in graph.blocks:
        node = make_node(plan, b, mail)
        node.block.h = torch.tensor(data[f"h.{b}"][0])
        node.block.z = torch.tensor(data[f"z.{b}"][0])
        node.block.weights.omega = [
            torch.tensor(data[f"om.{b}.{key}"][0]) for key in _keys(spec, b)
        ]
        recorders.append(Recorder(node, order == "sequential"))
    run_loop([SourceNode(plan, stream, mail), *recorders])
    return data, spec, recorders


def _keys(spec, block):
    layers = next(layers for name, _, layers in spec["nodes"] if name == block)
    return [f"{i}.{part}" for i in range(len(layers)) for part in "Wb"]


@pytest.mark.parametrize("name", FILES)
def test_trajectory(name):
    data, spec, recorders = _run(name)
    ticks = len(data["u"])
    for r in recorders:
        for k in range(ticks + 1):
            _close(r.h[k], data[f"h.{r.name}"][k], f"h.{r.name} at {k}")
            if k in r.z:
                _close(r.z[k], data[f"z.{r.name}"][k], f"z.{r.name} at {k}")
            for i, key in enumerate(_keys(spec, r.name)):
                if k in r.omega:
                    _close(r.omega[k][i], data[f"om.{r.name}.{key}"][k], f"om.{key} at {k}")
                    _close(r.theta[k][i], data[f"th.{r.name}.{key}"][k], f"th.{key} at {k}")
        assert set(range(ticks)) <= set(r.z)
        assert set(range(ticks)) <= set(r.omega)


def test_every_kind_of_golden_file_is_here():
    for order in ("simultaneous", "omega_first", "sequential"):
        assert any(order in name for name in FILES)
    for kind in ("layered", "grouped", "digraph", "delayfree", "static"):
        assert any(name.startswith(kind) for name in FILES)


def _close(found, expected, what):
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-11, err_msg=what)
