"""Checks of level `bptt`: backpropagation through time by the reversed stream
(docs: concepts/equations).

The oracle is torch alone: nn.RNN, nn.GRU or nn.LSTM over whole sequences, autograd, and
torch.optim.SGD; or the golden files rnn_bptt_*.

T: tokens of a sequence, B: batch, H: hidden, N: sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hamdist.dynamics.blocks.sequence import SequenceBlock
from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Combine, Graph
from hamdist.dynamics.modules.recurrent import Reads, RecurrentCell
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.schedule.events import Phase
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.errors import SettingsError
from hamdist.runtime.nodes.node import Node
from hamdist.runtime.nodes.sequence import SequenceNode
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.results.result import RunResult
from hamdist.runtime.train.train import train
from hamdist.streams.adapters import from_iterable
from hamdist.streams.sample import Sample
from hamdist.study.shared.exact_runs import PlanNodes, float64_settings
from hamdist.study.verify.oracles import golden
from hamdist.study.verify.oracles.check import Check, Difference, absolute, largest
from hamdist.study.verify.oracles.golden import ORACLE, RTOL, Array, GoldenData, entry, number

BOUND = 1e-12
AUTOGRAD = "autograd, float64"
SGD = "torch.optim.SGD, float64"
CELLS: dict[str, type[nn.Module]] = {"RNN": nn.RNNCell, "GRU": nn.GRUCell, "LSTM": nn.LSTMCell}
LAYERS: dict[str, type[nn.Module]] = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
OUTPUTS = 2


@dataclass(frozen=True)
class SequenceCase:
    """Cells of one kind over one another with a linear readout, on sequences of several lengths.

    truncation: r, or None for whole sequences. missing: every how many-th token has no target.
    """

    kind: str
    truncation: int | None
    layers: int = 2
    hidden: int = 5
    inputs: int = 3
    batch: int = 2
    lengths: tuple[int, ...] = (6, 1, 9, 4)
    lr: float = 0.1
    missing: int = 4

    def __str__(self) -> str:
        how = "whole" if self.truncation is None else f"last {self.truncation} tokens"
        return f"{self.kind}, {self.layers} layers, {how}"


def cell_block(name: str, module: nn.Module, below: str, size: int) -> BlockSpec:
    """Return a block that reads `below` and its own state, of `size` numbers a row."""
    return BlockSpec(name, module, (below, name), combine=Combine.ARGUMENTS, shape=(size,))


# -- hamdist ------------------------------------------------------------------------------------


def graph_of(case: SequenceCase) -> Graph:
    """Return the network of a case."""
    blocks = []
    below, inputs = INPUT, case.inputs
    with generator_kept(3):
        for i in range(case.layers):
            cell = RecurrentCell(CELLS[case.kind](inputs, case.hidden, dtype=torch.float64))
            module = cell if i == 0 else Reads(cell, slice(0, case.hidden), None)
            blocks.append(cell_block(f"cell{i}", module, below, cell.size))
            below, inputs = f"cell{i}", case.hidden
        head = nn.Linear(case.hidden, OUTPUTS, dtype=torch.float64)
    reads = Reads(head, slice(0, case.hidden))
    return Graph([*blocks, BlockSpec("y", reads, (below,), loss=mse)])


def samples_of(case: SequenceCase) -> list[Sample]:
    """Return the tokens of all sequences of a case."""
    generator = torch.Generator().manual_seed(4)

    def noise(features: int) -> Tensor:
        return torch.randn(case.batch, features, generator=generator, dtype=torch.float64)

    samples = []
    for length in case.lengths:
        for t in range(length):
            u, y, end = noise(case.inputs), noise(OUTPUTS), t == length - 1
            samples.append(Sample(u, y if (t + 1) % case.missing or end else None, end=end))
    return samples


def run(case: SequenceCase, samples: Sequence[Sample], **learning: Any) -> RunResult:
    """Train the network of a case on `samples`."""
    locality = {"truncation": case.truncation}
    settings = float64_settings("bptt", locality=locality, learning=learning, dynamics={"tau": 0.5})
    return train(graph_of(case), from_iterable(samples, outputs=OUTPUTS), settings)


# -- torch --------------------------------------------------------------------------------------


class _Torch(nn.Module):
    """The same network with the same weights. parts: its weights by block and name."""

    def __init__(self, case: SequenceCase) -> None:
        super().__init__()
        self.layers = LAYERS[case.kind](
            case.inputs, case.hidden, num_layers=case.layers, dtype=torch.float64
        )
        self.head = nn.Linear(case.hidden, OUTPUTS, dtype=torch.float64)
        weights = dict(self.named_parameters())
        self.parts: dict[tuple[str, str], Tensor] = {}
        for block in graph_of(case).blocks.values():
            for name, value in block.module.named_parameters():
                part = name.rpartition(".")[2]
                key = f"head.{part}" if block.loss else f"layers.{part}_l{block.name[-1]}"
                weights[key].data.copy_(value.data)
                self.parts[block.name, name] = weights[key]

    def loss(self, sequence: Sequence[Sample], keep: int) -> Tensor:
        """Return the sum of the losses of the last `keep` tokens, cut off from those before
        them."""
        u = torch.stack([sample.u for sample in sequence])
        early = len(u) - keep
        state = None
        if early:
            with torch.no_grad():
                _, state = self.layers(u[:early])
        predictions = self.head(self.layers(u[early:], state)[0])
        total = torch.zeros((), dtype=torch.float64)
        for prediction, sample in zip(predictions, sequence[early:], strict=True):
            if isinstance(sample.y, Tensor):
                total = total + mse(prediction, sample.y)
        return total


def _sequences(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    sequence: list[Sample] = []
    for sample in samples:
        sequence.append(sample)
        if sample.end:
            yield sequence
            sequence = []


def _keep(case: SequenceCase, length: int) -> int:
    return length if case.truncation is None else min(length, case.truncation)


def _gradient(case: SequenceCase) -> Difference:
    """Compare omega after the longest sequence, without momentum, with the gradient."""
    longest = max(_sequences(samples_of(case)), key=len)
    net = _Torch(case)
    net.loss(longest, _keep(case, len(longest))).backward()  # type: ignore[no-untyped-call]
    result = run(case, longest, lr=0.0)
    return largest(
        (f"{block}.{name}", absolute(omega, _grad(net.parts[block, name])))
        for block, state in result.blocks.items()
        for name, omega in state.omega.items()
    )


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _weights(case: SequenceCase) -> Difference:
    """Compare the weights after all sequences, with momentum and dampening."""
    learning: dict[str, Any] = {"lr": case.lr, "momentum": 0.5, "dampening": 0.3}
    samples = samples_of(case)
    net = _Torch(case)
    optimiser = torch.optim.SGD(net.parameters(), **learning)
    for sequence in _sequences(samples):
        optimiser.zero_grad()
        net.loss(sequence, _keep(case, len(sequence))).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    result = run(case, samples, **learning)
    return largest(
        (f"{block}.{name}", absolute(theta, net.parts[block, name]))
        for block, state in result.blocks.items()
        for name, theta in state.theta.items()
    )


def _stored(case: SequenceCase) -> Difference:
    """Compare the tokens whose states a block keeps with min(n, r) of the longest sequence."""
    expected = _keep(case, max(case.lengths))
    stored = run(case, samples_of(case), lr=0.0).stored
    return largest((f"{name} kept {n}", abs(n - expected)) for name, n in stored.items())


def checks(full: bool) -> Iterator[Check]:
    """Yield the checks; `full`: in the sizes of the paper (embedded tokens of 50 features, 30
    units).
    """
    sizes: dict[str, Any] = {}
    if full:
        lengths = tuple(5 + (7 * i) % 26 for i in range(100))
        sizes = {"inputs": 50, "hidden": 30, "batch": 1, "lengths": lengths, "lr": 1e-3}
    for kind in CELLS:
        for truncation in (None, 3):
            case = SequenceCase(kind, truncation, **sizes)
            title = f"gradient of one sequence ({case})"
            yield Check(title, AUTOGRAD, BOUND, partial(_gradient, case))
            title = f"weights after {len(case.lengths)} sequences, momentum and dampening ({case})"
            yield Check(title, SGD, BOUND, partial(_weights, case))
    for truncation in (None, 3):
        case = SequenceCase("LSTM", truncation, **sizes)
        title, oracle = f"stored states per block ({case})", "min(n, r) of the longest sequence"
        yield Check(title, oracle, 0.0, partial(_stored, case))


# -- golden files ----------------------------------------------------------------------------------

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
        weight.data = torch.tensor(entry(data, f"th.{key}", weight.shape))
    cell.bias_hh.data.zero_()
    cell.bias_hh.requires_grad_(False)
    readout = BlockSpec("y", nn.Identity(), (CELL,), loss=mse)
    return Graph([cell_block(CELL, RecurrentCell(cell), INPUT, hidden), readout])


def _golden_run(data: GoldenData, **dynamics: Any) -> dict[str, Array]:
    """Return hamdist's h, z and om.*, and the sum of the losses, under the names of the file."""
    u, y = torch.tensor(entry(data, "u")), torch.tensor(entry(data, "yhat"))
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
    h0 = torch.tensor(entry(data, "h0")).expand(len(u[0]), -1).contiguous()
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
    return golden.worst(
        {key: (ours[key].reshape(data[key].shape), entry(data, key)) for key in keys}
    )


def _torch_gradient(data: GoldenData) -> Difference:
    """Compare the last omega at eta = 0, phi = 1/tau with the gradient of the tokens' losses."""
    ours = _golden_run(data, tau=number(data, "tau"))
    pairs = {
        f"torch_grad.{key}": (ours[f"om.{key}"][-1:], entry(data, f"torch_grad.{key}")[None])
        for key in WEIGHTS
    }
    if int(number(data, "r")) >= len(entry(data, "u")) and "torch_loss" in data:
        pairs["torch_loss"] = (ours["torch_loss"], entry(data, "torch_loss").reshape(1))
    return golden.worst(pairs)


def checks_of(data: GoldenData, name: str) -> list[Check]:
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
    title = f"{name}: h, and z, omega per reversed token (relative)"
    checks = [Check(title, ORACLE, RTOL, partial(_trajectory, data))]
    if all(f"torch_grad.{key}" in data for key in WEIGHTS):
        title = f"{name}: the last omega at eta = 0 is the gradient (relative)"
        measure = partial(_torch_gradient, data)
        checks.append(Check(title, "autograd (golden file)", RTOL, measure))
    return checks
