"""Golden trajectories of sequences, stepped by hamdist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hamdist.config import Settings
from hamdist.dynamics.blocks.sequence import SequenceBlock
from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Combine, Graph
from hamdist.dynamics.modules.recurrent import RecurrentCell
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.schedule.events import Phase
from hamdist.errors import SettingsError
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.loop import run_loop
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.sequence import SequenceNode
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.plan.plan import make_plan
from hamdist.streams.adapters import from_iterable
from hamdist.streams.sample import Sample
from hamdist.study.verify.oracles.check import Check, Difference
from hamdist.study.verify.oracles.golden import (
    ORACLE,
    RTOL,
    Array,
    GoldenData,
    entry,
    number,
    tensor,
    worst,
)
from hamdist.study.verify.topics.bptt import CELL, WEIGHTS


@dataclass
class _Watch:
    """The cell's node, and what it held after every step: h (n, B, H) after each token forward,
    z and omega after each reversed token."""

    node: SequenceNode
    h: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    omega: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.node.name
        self.late = self.node.late
        self.tick = self.node.tick

    def start(self) -> None:
        self.node.start()

    def step(self) -> None:
        phase, block = self.node.event.phase, self.node.block
        self.node.step()
        self.tick = self.node.tick
        if not isinstance(block, SequenceBlock) or self.tick is None:
            return
        if phase is Phase.FORWARD:
            self.h.append(block.h)
            return
        self.z.append(torch.zeros_like(block.h) if block.z is None else block.z)
        for name, omega in zip(block.cell.names, block.weights.omega, strict=True):
            self.omega.setdefault(name, []).append(omega)


def _golden_graph(data: GoldenData) -> Graph:
    """tanh(Wx u + Wh h + b), and the loss of h itself."""
    hidden, inputs = entry(data, "th.Wx").shape
    cell = nn.RNNCell(inputs, hidden, dtype=torch.float64)
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih)
    for weight, key in zip(weights, WEIGHTS, strict=True):
        weight.data = tensor(entry(data, f"th.{key}", weight.shape))
    cell.bias_hh.data.zero_()
    cell.bias_hh.requires_grad_(False)
    return Graph(
        [
            BlockSpec(
                CELL,
                RecurrentCell(cell),
                (INPUT, CELL),
                combine=Combine.ARGUMENTS,
                shape=(hidden,),
            ),
            BlockSpec("y", nn.Identity(), (CELL,), loss=mse),
        ]
    )


def _golden_run(data: GoldenData, **dynamics: Any) -> dict[str, Array]:
    """hamdist's own h, z and om.*, and the sum of the losses, under the names of the file."""
    u, y = tensor(entry(data, "u")), tensor(entry(data, "yhat"))
    u, y = (x if x.dim() == 3 else x[:, None] for x in (u, y))
    samples = [Sample(u[m], y[m], end=m == len(u) - 1) for m in range(len(u))]
    graph = _golden_graph(data)
    settings = Settings.model_validate(
        {
            "level": "bptt",
            "dtype": "float64",
            "locality": {"truncation": int(number(data, "r"))},
            "learning": {"lr": 0.0},
            "dynamics": {"reset": {"h": "never"}, "limit": 1e300, **dynamics},
            "metrics": {"window": 1},
        }
    )
    stream = from_iterable(samples)
    plan = make_plan(graph, settings, stream.spec)
    mailbox = Mailbox({INPUT, *graph.blocks})
    watches = []
    for name in graph.blocks:
        node = make_node(plan, name, mailbox)
        if not isinstance(node, SequenceNode):
            raise TypeError(f"block {name!r} goes through no sequences")
        watches.append(_Watch(node))
    cell, readout = watches
    h0 = tensor(entry(data, "h0")).expand(len(u[0]), -1).contiguous()
    if isinstance(cell.node.block, SequenceBlock):
        cell.node.block.h = h0
    run_loop([SourceNode(plan, stream, mailbox), *watches])
    zero = torch.zeros_like(h0)
    made = {"h": [h0, *cell.h], "z": [zero, *cell.z]}
    for key, name in WEIGHTS.items():
        omega = cell.omega[name]
        made[f"om.{key}"] = [torch.zeros_like(omega[0]), *omega]
    arrays = {key: torch.stack(values).numpy() for key, values in made.items()}
    metrics = readout.node.metrics
    if metrics is not None:
        metrics.flush()
        arrays["torch_loss"] = np.array([sum(w.loss for w in metrics.windows)])
    return arrays


def _trajectory(data: GoldenData) -> Difference:
    own = {key: number(data, key) for key in ("tau", "phi", "eta")}
    return _compared(data, _golden_run(data, **own), ("h", "z", *(f"om.{key}" for key in WEIGHTS)))


def _compared(data: GoldenData, found: dict[str, Array], keys: Sequence[str]) -> Difference:
    pairs = {}
    for key in keys:
        expected = entry(data, key)
        pairs[key] = (found[key].reshape(expected.shape), expected)
    return worst(pairs)


def _torch_gradient(data: GoldenData) -> Difference:
    """eta = 0 and phi = 1/tau: the last omega is the gradient of the losses gone through."""
    found = _golden_run(data, tau=number(data, "tau"))
    pairs = {
        f"torch_grad.{key}": (found[f"om.{key}"][-1:], entry(data, f"torch_grad.{key}")[None])
        for key in WEIGHTS
    }
    if int(number(data, "r")) >= len(entry(data, "u")) and "torch_loss" in data:
        pairs["torch_loss"] = (found["torch_loss"], entry(data, "torch_loss").reshape(1))
    return worst(pairs)


def golden(data: GoldenData, name: str) -> list[Check]:
    """The checks of an rnn_bptt file."""
    n, inputs = entry(data, "u").shape[0], entry(data, "u").shape[-1]
    r = int(number(data, "r"))
    if not 1 <= r <= n:
        raise SettingsError(f"entry 'r' is {r}, the sequence has {n} tokens")
    if entry(data, "th.Wx").shape[1] != inputs:
        raise SettingsError(
            f"entry 'th.Wx' has shape {data['th.Wx'].shape}, u has {inputs} features"
        )
    _golden_graph(data)
    made = [
        Check(
            f"{name}: h, and z, omega per reversed token (relative)",
            ORACLE,
            RTOL,
            partial(_trajectory, data),
        )
    ]
    if all(f"torch_grad.{key}" in data for key in WEIGHTS):
        made.append(
            Check(
                f"{name}: the last omega at eta = 0 is the gradient (relative)",
                "autograd (golden file)",
                RTOL,
                partial(_torch_gradient, data),
            )
        )
    return made
