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

import torch
from torch import Tensor, nn

from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Combine, Graph
from hamdist.dynamics.modules.recurrent import Reads, RecurrentCell
from hamdist.dynamics.objective.losses import mse
from hamdist.runtime.results.result import RunResult
from hamdist.runtime.train.train import train
from hamdist.streams.adapters import from_iterable
from hamdist.streams.sample import Sample
from hamdist.study.shared.exact_runs import float64_settings
from hamdist.study.verify.oracles.check import Check, Difference, absolute, largest

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
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
            what = f"gradient of one sequence ({case})"
            yield Check(what, AUTOGRAD, BOUND, partial(_gradient, case))
            what = f"weights after {len(case.lengths)} sequences, momentum and dampening ({case})"
            yield Check(what, SGD, BOUND, partial(_weights, case))
    for truncation in (None, 3):
        case = SequenceCase("LSTM", truncation, **sizes)
        what, oracle = f"stored states per block ({case})", "min(n, r) of the longest sequence"
        yield Check(what, oracle, 0.0, partial(_stored, case))
