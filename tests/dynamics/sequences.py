"""Recurrent networks as graphs, and the same by torch alone: the oracle of level `bptt`.

T: tokens of a sequence, B: batch, I: inputs, H: hidden, O: outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from dynamics.helpers import F64, noise
from torch import Tensor, nn

from hamdist.dynamics.graph.graph import BlockSpec, Combine, Graph
from hamdist.dynamics.modules.recurrent import Reads, RecurrentCell
from hamdist.dynamics.objective.losses import mse
from hamdist.streams import Sample

I, H, O = 3, 4, 2  # noqa: E741
WORDS = 7
KINDS = ("rnn", "gru", "lstm")
CELLS = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
LAYERS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def seeded(build: Callable[[], Graph], seed: int = 5) -> Graph:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def stacked(kind: str, layers: int = 1, inputs: int = I, hidden: int = H) -> Graph:
    """Cells over one another and a linear readout."""

    def build() -> Graph:
        blocks = []
        below = ("u", inputs)
        for i in range(layers):
            cell = RecurrentCell(CELLS[kind](below[1], hidden, dtype=F64))
            module = cell if i == 0 else Reads(cell, slice(0, hidden), None)
            blocks.append(
                BlockSpec(
                    f"cell{i}",
                    module,
                    (below[0], f"cell{i}"),
                    combine=Combine.ARGUMENTS,
                    shape=(cell.size,),
                )
            )
            below = (f"cell{i}", hidden)
        head = Reads(nn.Linear(hidden, O, dtype=F64), slice(0, hidden))
        return Graph([*blocks, BlockSpec("y", head, (below[0],), loss=mse)])

    return seeded(build)


class Torch(nn.Module):
    """What `stacked` computes, by nn.RNN, nn.GRU or nn.LSTM with the same weights."""

    def __init__(self, graph: Graph, kind: str, inputs: int = I, hidden: int = H) -> None:
        super().__init__()
        cells = [b.module for b in graph.blocks.values() if b.loss is None]
        self.layers = LAYERS[kind](inputs, hidden, num_layers=len(cells), dtype=F64)
        self.head = nn.Linear(hidden, O, dtype=F64)
        self.names: dict[tuple[str, str], str] = {}
        own = dict(self.named_parameters())
        for block in graph.blocks.values():
            for name, value in block.module.named_parameters():
                part = name.rpartition(".")[2]
                mine = f"head.{part}" if block.loss else f"layers.{part}_l{block.name[-1]}"
                own[mine].data.copy_(value.data)
                self.names[block.name, name] = mine

    def forward(self, u: Tensor, keep: int) -> list[Tensor | None]:
        """Predictions of the last `keep` tokens; no gradient flows into what came before."""
        early = len(u) - keep
        state = None
        if early:
            with torch.no_grad():
                _, state = self.layers(u[:early])
        found, _ = self.layers(u[early:], state)
        return [None] * early + list(self.head(found))

    def parameter(self, block: str, name: str) -> Tensor:
        return self.get_parameter(self.names[block, name])


def tangle() -> Graph:
    """Tokens, an embedding, two cells, an edge back from the second to the first, a skip from the
    embedding and one from the first cell, delays, two readouts at different depths."""

    def build() -> Graph:
        return Graph(
            [
                BlockSpec("e", nn.Embedding(WORDS, I, dtype=F64), ("u",)),
                BlockSpec(
                    "a",
                    RecurrentCell(nn.GRUCell(I + 5, H, dtype=F64)),
                    ("e", "b", "a"),
                    combine=Combine.ARGUMENTS,
                    delays={"b": 2},
                    shape=(H,),
                ),
                BlockSpec(
                    "b",
                    RecurrentCell(nn.RNNCell(H + I, 5, dtype=F64)),
                    ("a", "e", "b"),
                    combine=Combine.ARGUMENTS,
                    delays={"e": 4, "b": 3},
                    shape=(5,),
                ),
                BlockSpec("w", nn.Linear(H, O, dtype=F64), ("a",), loss=mse),
                BlockSpec("y", nn.Linear(H + 5, O, dtype=F64), ("a", "b"), loss=mse),
            ]
        )

    return seeded(build)


class Tangle(nn.Module):
    """What `tangle` computes, token by token."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(
            {name: copy.deepcopy(b.module) for name, b in graph.blocks.items()}
        )

    def forward(self, u: Tensor, keep: int) -> list[list[Tensor] | None]:
        e, a, b, w, y = self.blocks.values()
        h, g = torch.zeros(u.shape[1], H, dtype=F64), torch.zeros(u.shape[1], 5, dtype=F64)
        found: list[list[Tensor] | None] = []
        for t, token in enumerate(u):
            if t == len(u) - keep:
                h, g = h.detach(), g.detach()
            x = e(token)
            h = a.cell(torch.cat([x, g], -1), h)
            g = b.cell(torch.cat([h, x], -1), g)
            read = [w(h), y(torch.cat([h, g], -1))]
            found.append(read if t >= len(u) - keep else None)
        return found

    def parameter(self, block: str, name: str) -> Tensor:
        return self.blocks[block].get_parameter(name)


@dataclass(frozen=True)
class Text:
    """Sequences: u (T, B, I) or tokens (T, B); targets per token (B, O) or None."""

    u: list[Tensor]
    y: list[list[Tensor | None]]

    @property
    def samples(self) -> list[Sample]:
        return [
            Sample(u, y, end=t == len(us) - 1)
            for us, ys in zip(self.u, self.y, strict=True)
            for t, (u, y) in enumerate(zip(us, ys, strict=True))
        ]


def text(
    lengths: Sequence[int],
    *,
    batch: int = 2,
    words: bool = False,
    missing: Callable[[int, int], bool] = lambda s, t: False,
    seed: int = 11,
) -> Text:
    """missing(sequence, token): whether there is no target."""
    us, ys = [], []
    for s, n in enumerate(lengths):
        if words:
            generator = torch.Generator().manual_seed(seed + s)
            us.append(torch.randint(WORDS, (n, batch), generator=generator))
        else:
            us.append(noise(seed + s, n, batch, I))
        y = noise(seed + 100 + s, n, batch, O)
        ys.append([None if missing(s, t) else y[t] for t in range(n)])
    return Text(us, ys)


def losses(net: nn.Module, u: Tensor, y: Sequence[Tensor | None], keep: int) -> list[Tensor]:
    """The losses of the last `keep` tokens (of those that have a target), of all readouts."""
    found = []
    for read, target in zip(net(u, keep), y, strict=True):
        if read is not None and target is not None:
            found += [mse(p, target) for p in (read if isinstance(read, list) else [read])]
    return found


def learn(
    net: nn.Module,
    data: Text,
    truncation: int | None = None,
    decay_over: int | None = None,
    **sgd: float,
) -> None:
    """torch.optim.SGD on the sum of the losses of each sequence."""
    optimiser = torch.optim.SGD(net.parameters(), **sgd)
    entered = 0
    for u, y in zip(data.u, data.y, strict=True):
        entered += len(u)
        if decay_over is not None:
            optimiser.param_groups[0]["lr"] = sgd["lr"] * (1 - (entered - 1) / decay_over)
        taken = losses(net, u, y, min(len(u), truncation or len(u)))
        if taken:
            optimiser.zero_grad()
            sum(taken).backward()
            optimiser.step()
