"""Shared by the tests of dynamics: graphs, drawn tables, plans, networks driven by hand.

Float64 throughout, so that an oracle that sums in another order agrees to about 1e-15.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from itertools import pairwise, takewhile

import torch
from torch import Tensor, nn

from hamdist.config import Level, LocalityOverrides, Settings
from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.schedule.events import Event, Phase
from hamdist.dynamics.schedule.levels import Locality, make_locality
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.hold import HoldNode
from hamdist.runtime.nodes.loop import run_loop
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.pulse import PulseNode
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.plan.plan import Plan, make_plan
from hamdist.streams import from_iterable

F64 = torch.float64


def knobs(level: str, **overrides: object) -> Locality:
    return make_locality(Level(level), LocalityOverrides.model_validate(overrides))


def settings(level: str, **sections: object) -> Settings:
    return Settings.model_validate({"level": level, "dtype": "float64", **sections})


# -- graphs without weights, for schedules -----------------------------------------------------


def bare(*blocks: str, state: bool = False, cut: str | None = None) -> Graph:
    """A graph of identities from lines such as 'C: A B+3' (parents, with the edge's delay if it
    is not 1). Blocks that nobody reads are readouts. cut: the block that declares its shape."""
    parents = {}
    for line in blocks:
        name, _, rest = line.partition(":")
        parents[name] = [part.partition("+") for part in rest.split()]
    read = {p for name, edges in parents.items() for p, _, _ in edges if p != name}
    return Graph(
        BlockSpec(
            name,
            nn.Identity(),
            tuple(p for p, _, _ in edges),
            delays={p: int(d) for p, _, d in edges if d},
            loss=None if name in read else mse,
            state=name not in read and state,
            shape=(1,) if name == cut else None,
        )
        for name, edges in parents.items()
    )


def bare_chain(length: int, *, delay: int = 1, state: bool = False) -> Graph:
    lines = ["b0: u"] + [f"b{i}: b{i - 1}+{delay}" for i in range(1, length)]
    return bare(*lines, state=state)


def edge(graph: Graph, name: str):
    return next(e for e in graph.edges if e.name == name)


# -- drawn tables --------------------------------------------------------------------------------


def rows(drawing: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Blocks and (tick, cells) of a table such as

    tick | b0 | b1
    0    | F0 |
    1    | F1 | FB0
    """
    lines = [line for line in drawing.splitlines() if line.strip()]
    cut = [[cell.strip() for cell in line.split("|")] for line in lines]
    for cells in cut:
        assert len(cells) == len(cut[0]), f"a ragged row: {cells}"
    assert [int(cells[0]) for cells in cut[1:]] == list(range(len(cut) - 1)), "a tick is missing"
    return cut[0][1:], [(int(cells[0]), cells[1:]) for cells in cut[1:]]


def drawn_events(drawing: str) -> dict[str, list[Event]]:
    """The events that a drawn pulse table shows, by block, in order."""
    names, body = rows(drawing)
    events: dict[str, list[Event]] = {name: [] for name in names}
    for tick, cells in body:
        for name, cell in zip(names, cells, strict=True):
            for phase, sample in re.findall(r"([A-Z]+)(\d+)", cell):
                events[name].append(Event(tick, Phase(phase), int(sample)))
    return events


def check_drawn(schedule: PulseSchedule, table: str) -> int:
    """Compare the events of every block with a table, from the beginning and from each tick on.

    Returns the last tick that is compared.
    """
    last = len(rows(table)[1]) - 1
    for block, events in drawn_events(table).items():
        assert until(schedule.events(block), last) == events
        for since in range(last):
            behind = [e for e in events if e.tick >= since]
            assert until(schedule.events(block, since), last) == behind, since
    return last


def until(events: Iterable[Event], tick: int) -> list[Event]:
    """The events up to and with `tick`."""
    return list(takewhile(lambda e: e.tick <= tick, events))


# -- networks with weights -----------------------------------------------------------------------


def linear(inputs: int, outputs: int, seed: int, *, bias: bool = True) -> nn.Linear:
    """A float64 Linear whose weights depend on `seed` alone."""
    made = nn.Linear(inputs, outputs, bias=bias, dtype=F64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=F64) / inputs**0.5)
    return made


def layer(inputs: int, outputs: int, seed: int) -> nn.Sequential:
    return nn.Sequential(linear(inputs, outputs, seed), nn.Tanh())


def mlp(sizes: list[int], seed: int = 0) -> nn.Sequential:
    """Linear, Tanh, Linear, ..., Linear."""
    children: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        children += [linear(inputs, outputs, seed + i), nn.Tanh()]
    return nn.Sequential(*children[:-1])


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def samples(count: int, batch: int, inputs: int, outputs: int, seed: int = 7) -> list:
    """(u, y) pairs of normal numbers."""
    u, y = noise(seed, count, batch, inputs), noise(seed + 1, count, batch, outputs)
    return list(zip(u, y, strict=True))


class Watched:
    """A node that calls `before` and `after` around each of its steps."""

    def __init__(
        self,
        node: PulseNode | HoldNode,
        before: Callable[[Watched, Event], None] | None,
        after: Callable[[Watched, Event], None] | None,
    ) -> None:
        self.inner = node
        self.name = node.name
        self.late = node.late
        self.block = node.block
        self._before = before
        self._after = after

    @property
    def tick(self) -> int | None:
        return self.inner.tick

    def start(self) -> None:
        self.inner.start()

    def step(self) -> None:
        event = self.inner.event
        if self._before is not None:
            self._before(self, event)
        self.inner.step()
        if self._after is not None:
            self._after(self, event)


class Network:
    """The nodes of a graph in one process, stepped like InProcessEngine does."""

    def __init__(self, graph: Graph, config: Settings, items: list) -> None:
        self.stream = from_iterable(items)
        self.graph = graph.copy()
        self.plan: Plan = make_plan(self.graph, config, self.stream.spec)
        self.mailbox = Mailbox({INPUT, *self.graph.blocks})
        self.nodes = {name: make_node(self.plan, name, self.mailbox) for name in self.graph.blocks}

    def run(
        self,
        before: Callable[[Watched, Event], None] | None = None,
        after: Callable[[Watched, Event], None] | None = None,
    ) -> Network:
        source = SourceNode(self.plan, self.stream, self.mailbox)
        run_loop([source, *(Watched(n, before, after) for n in self.nodes.values())])
        return self

    def theta(self, name: str) -> list[Tensor]:
        return self.nodes[name].block.weights.theta


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def relative(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """|found - expected| / |expected|, over all tensors together."""
    pairs = [
        (f.detach().double(), e.detach().double()) for f, e in zip(found, expected, strict=True)
    ]
    apart = sum(float((f - e).square().sum()) for f, e in pairs)
    size = sum(float(e.square().sum()) for _, e in pairs)
    return (apart / size) ** 0.5 if size else apart**0.5


def sgd(
    model: nn.Module,
    items: list,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    decay_over: int | None = None,
) -> nn.Module:
    """`model` after torch.optim.SGD on `items`, one step each (none without a target)."""
    model = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for n, (u, y) in enumerate(items):
        if y is None:
            continue
        if decay_over is not None:
            optimiser.param_groups[0]["lr"] = lr * (1 - n / decay_over)
        optimiser.zero_grad()
        loss(model(u), y).backward()
        optimiser.step()
    return model
