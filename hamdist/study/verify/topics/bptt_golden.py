"""Golden trajectories of sequences, stepped by hamdist."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from hamdist.dynamics.blocks.sequence import SequenceBlock
from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Graph
from hamdist.dynamics.modules.recurrent import RecurrentCell
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.schedule.events import Phase
from hamdist.errors import SettingsError
from hamdist.runtime.nodes.node import Node
from hamdist.runtime.nodes.sequence import SequenceNode
from hamdist.runtime.plan.plan import make_plan
from hamdist.streams.adapters import from_iterable
from hamdist.streams.sample import Sample
from hamdist.study.shared.exact_runs import PlanNodes, float64_settings
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
from hamdist.study.verify.topics.bptt import cell_block

CELL = "cell"
# Of the file, and of the cell.
WEIGHTS = {"Wx": "cell.weight_ih", "Wh": "cell.weight_hh", "b": "cell.bias_ih"}
KEYS = {name: key for key, name in WEIGHTS.items()}


def _golden_graph(data: GoldenData) -> Graph:
    """Return the graph of tanh(Wx u + Wh h + b), with the loss of h itself."""
    hidden, inputs = entry(data, "th.Wx").shape
    cell = nn.RNNCell(inputs, hidden, dtype=torch.float64)
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih)
    for weight, key in zip(weights, WEIGHTS, strict=True):
        weight.data = tensor(entry(data, f"th.{key}", weight.shape))
    cell.bias_hh.data.zero_()
    cell.bias_hh.requires_grad_(False)
    readout = BlockSpec("y", nn.Identity(), (CELL,), loss=mse)
    return Graph([cell_block(CELL, RecurrentCell(cell), INPUT, hidden), readout])


def _golden_run(data: GoldenData, **dynamics: Any) -> dict[str, Array]:
    """Return hamdist's h, z and om.*, and the sum of the losses, under the names of the file."""
    u, y = tensor(entry(data, "u")), tensor(entry(data, "yhat"))
    u, y = (x if x.dim() == 3 else x[:, None] for x in (u, y))
    samples = [Sample(u[m], y[m], end=m == len(u) - 1) for m in range(len(u))]
    graph = _golden_graph(data)
    settings = float64_settings(
        "bptt",
        locality={"truncation": int(number(data, "r"))},
        learning={"lr": 0.0},
        dynamics={"reset": {"h": "never"}, "limit": 1e300, **dynamics},
        metrics={"window": 1},
    )
    stream = from_iterable(samples)
    network = PlanNodes(make_plan(graph, settings, stream.spec))
    cell, readout = network.nodes.values()
    block = cell.block
    if not isinstance(cell, SequenceNode) or not isinstance(block, SequenceBlock):
        raise TypeError(f"block {CELL!r} goes through no sequences")
    h0 = tensor(entry(data, "h0")).expand(len(u[0]), -1).contiguous()
    block.h = h0
    zero = torch.zeros_like(h0)
    entries = {"h": [h0], "z": [zero]}
    for key, omega in zip(WEIGHTS, block.weights.omega, strict=True):
        entries[f"om.{key}"] = [torch.zeros_like(omega)]
    phase = cell.event.phase

    def after_step(node: Node, _tick: int) -> None:
        """Record h after each token forward, z and omega after each reversed token."""
        nonlocal phase
        if node is not cell or cell.tick is None:
            return
        if phase is Phase.FORWARD:
            entries["h"].append(block.h)
        else:
            entries["z"].append(zero if block.z is None else block.z)
            for name, omega in zip(block.cell.names, block.weights.omega, strict=True):
                entries[f"om.{KEYS[name]}"].append(omega)
        phase = cell.event.phase

    network.run(stream, after_step)
    arrays = {key: torch.stack(values).numpy() for key, values in entries.items()}
    metrics = readout.metrics
    if metrics is not None:
        metrics.flush()
        arrays["torch_loss"] = np.array([sum(w.loss for w in metrics.windows)])
    return arrays


def _trajectory(data: GoldenData) -> Difference:
    ours = _golden_run(data, **{key: number(data, key) for key in ("tau", "phi", "eta")})
    keys = ("h", "z", *(f"om.{key}" for key in WEIGHTS))
    return worst({key: (ours[key].reshape(data[key].shape), entry(data, key)) for key in keys})


def _torch_gradient(data: GoldenData) -> Difference:
    """Compare the last omega at eta = 0, phi = 1/tau with the gradient of the tokens' losses."""
    ours = _golden_run(data, tau=number(data, "tau"))
    pairs = {
        f"torch_grad.{key}": (ours[f"om.{key}"][-1:], entry(data, f"torch_grad.{key}")[None])
        for key in WEIGHTS
    }
    if int(number(data, "r")) >= len(entry(data, "u")) and "torch_loss" in data:
        pairs["torch_loss"] = (ours["torch_loss"], entry(data, "torch_loss").reshape(1))
    return worst(pairs)


def golden(data: GoldenData, name: str) -> list[Check]:
    """Return the checks of an rnn_bptt file."""
    n, inputs = entry(data, "u").shape[0], entry(data, "u").shape[-1]
    r = int(number(data, "r"))
    if not 1 <= r <= n:
        raise SettingsError(f"entry 'r' is {r}, the sequence has {n} tokens")
    if entry(data, "th.Wx").shape[1] != inputs:
        raise SettingsError(
            f"entry 'th.Wx' has shape {data['th.Wx'].shape}, u has {inputs} features"
        )
    _golden_graph(data)
    what = f"{name}: h, and z, omega per reversed token (relative)"
    checks = [Check(what, ORACLE, RTOL, partial(_trajectory, data))]
    if all(f"torch_grad.{key}" in data for key in WEIGHTS):
        what = f"{name}: the last omega at eta = 0 is the gradient (relative)"
        measure = partial(_torch_gradient, data)
        checks.append(Check(what, "autograd (golden file)", RTOL, measure))
    return checks
