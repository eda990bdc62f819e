"""Oracles: tables drawn by hand, torch.optim.SGD on the uncut model (float64). Where nothing learns
in a block and before it, no message comes, no activation is kept, and samples follow sooner."""

from __future__ import annotations

import pytest
import torch
from dynamics.helpers import (
    F64,
    bare,
    bare_chain,
    drawn_events,
    edge,
    knobs,
    mlp,
    relative,
    rows,
    settings,
    sgd,
    until,
)
from dynamics.helpers import samples as drawn
from torch import nn
from torch.nn.functional import linear

from hamdist.dynamics.blocks.heads import FrozenBlock
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.schedule.events import Stamp
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.train.prepare import as_graph
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable
from hamdist.streams.sample import SampleSpec

ROUND_OFF = 1e-12
SIX = [5, 6, 7, 6, 7, 6, 3]
PAIRS = ["block0->block1", "block1->block2", "block2->block3", "block3->block4", "block4->block5"]


def frozen(*layers):
    """Six linear layers with a tanh between two, of which some are frozen."""
    model = mlp(SIX)
    for i in layers:
        model[2 * i].requires_grad_(False)
    return model


# -- when ----------------------------------------------------------------------------------------

# Four blocks, the first two frozen: D = 3, the first that learns at depth 2, so 2 (3 - 2) + 1 = 3
# ticks a sample at speed inf.
FINE_TUNED = {
    1: """
tick | b0 | b1 | b2    | b3
0    | F0 |    |       |
1    | F1 | F0 |       |
2    | F2 | F1 | F0    |
3    | F3 | F2 | F1    | FB0
4    | F4 | F3 | F2 B0 | FB1
5    | F5 | F4 | F3 B1 | FB2
""",
    "inf": """
tick | b0 | b1 | b2 | b3
0    | F0 |    |    |
1    |    | F0 |    |
2    |    |    | F0 |
3    | F1 |    |    | FB0
4    |    | F1 | B0 |
5    |    |    | F1 |
6    | F2 |    |    | FB1
7    |    | F2 | B1 |
""",
}


@pytest.mark.parametrize("speed", FINE_TUNED)
def test_silent_blocks_have_no_way_back(speed):
    drawing = FINE_TUNED[speed]
    graph, last = bare_chain(4), len(rows(drawing)[1]) - 1
    schedule = PulseSchedule(graph, knobs("trace", speed=speed), frozenset({"b0", "b1"}))
    for name, events in drawn_events(drawing).items():
        assert until(schedule.events(name), last) == events, name
        assert until(schedule.events(name, 4), last) == [e for e in events if e.tick >= 4]
    c = {1: 1, "inf": 3}[speed]
    assert schedule.c == c
    assert schedule.trip == 5  # ticks 0 to 4 in the tables
    assert [schedule.stored(f"b{i}") for i in range(4)] == [0, 0, 2 // c + 1, 1]
    forward = next(e for e in schedule.events("b2") if e.sample == 2)
    assert schedule.state(edge(graph, "b1->b2"), forward) == Stamp(2 * c + 1, 2, 0)


def test_who_is_silent():
    """A frozen block behind one that learns passes messages on."""

    def graph(*trained):
        made = bare("a: u", "b: a", "c: a b", "y: c")
        blocks = [
            BlockSpec(**{**vars(b), "module": nn.Linear(1, 1).requires_grad_(b.name in trained)})
            for b in made.blocks.values()
        ]
        return made.over(blocks)

    assert graph("y").silent() == {"a", "b", "c"}
    assert graph("b").silent() == {"a"}
    assert graph("a", "y").silent() == set()
    assert bare("a: u", "b: a").silent() == set()  # no weights, so none that are frozen


# -- what ----------------------------------------------------------------------------------------


def run(model, level, items, cuts=("2", "4", "6", "8", "10"), **sections):
    given = {"loss": "mse", "learning": {"lr": 0.05}, "partition": {"cuts": list(cuts)}}
    return train(model, from_iterable(items), settings(level, **{**given, **sections}))


@pytest.mark.parametrize("step", ["auto", "autograd"])
@pytest.mark.parametrize(
    ("still", "forward_only"), [((0, 1, 2, 3, 4), 5), ((0, 1), 2), ((1, 2), 0), ((0, 1, 3), 2)]
)
def test_backprop_is_sgd(still, forward_only, step):
    """Only edges behind the first block that learns carry messages."""
    items = drawn(20, 4, 5, 3)
    momentum = {"lr": 0.05, "momentum": 0.5}
    result = run(frozen(*still), "backprop", items, learning=momentum, engine={"step": step})
    expected = sgd(frozen(*still), items, half_square, lr=0.05, momentum=0.5)
    assert relative(result.model.parameters(), expected.parameters()) <= ROUND_OFF
    sizes = [4 * width * 8 * 20 for width in SIX[1:6]]  # numbers of 8 bytes, 20 samples
    ways = [1 if i < forward_only else 2 for i in range(5)]
    found = [result.bytes_per_edge[name] for name in PAIRS]
    assert found == [size * many for size, many in zip(sizes, ways, strict=True)]
    first = min({*range(6)} - {*still})
    assert result.ticks == 20 * (2 * (5 - first) + 1) + 5 + 1  # the readout hears of the end


def half_square(prediction, target):
    return 0.5 * (prediction - target).square().sum() / len(target)


LEVELS = {
    "trace": {},
    "trace+weights": {"locality": {"memory": "trace+weights"}},
    "trace, heads": {"learning": {"lr": 0.05, "heads": {"weight": 0.2}}},
    "heads": {},
    "local": {},
    "local, sequential": {"locality": {"order": "sequential"}},
    "group": {},
}


@pytest.mark.parametrize("name", LEVELS)
def test_what_is_before_does_not_change_what_is_learned(name, monkeypatch):
    """The same weights as with messages to everybody, of which nobody makes use."""
    items = drawn(30, 4, 5, 3)
    level = name.split(",")[0].split("+")[0]
    found = run(frozen(0, 1, 3), level, items, **LEVELS[name])
    monkeypatch.setattr(Graph, "silent", lambda graph: frozenset())
    expected = run(frozen(0, 1, 3), level, items, **LEVELS[name])
    before = frozen(0, 1, 3).state_dict()
    for key, value in found.model.state_dict().items():
        assert torch.equal(value, expected.model.state_dict()[key]), key
        still = key.split(".")[0] in {"0", "2", "6"}
        assert torch.equal(value, before[key]) == still, key
    if level != "heads":
        assert found.bytes_per_edge[PAIRS[0]] * 2 == expected.bytes_per_edge[PAIRS[0]]


def test_energies_are_those_of_all_blocks():
    """They need the costates, so all messages come."""
    items = drawn(5, 4, 5, 3)
    watched = run(frozen(0), "local", items, metrics={"record": "energy"}).bytes_per_edge[PAIRS[0]]
    alone = run(frozen(0), "local", items).bytes_per_edge[PAIRS[0]]
    assert watched > 1.5 * alone


def test_nothing_is_kept_before_the_first_block_that_learns():
    spec = SampleSpec((4, 5), F64, (4, 3), F64)
    given = settings("trace", loss="mse", partition={"cuts": ["2", "4", "6", "8", "10"]})
    plan = make_plan(as_graph(frozen(0, 1), given, spec, mse), given, spec)
    kept = [make_node(plan, name, Mailbox(set())).block for name in plan.graph.blocks]
    assert [isinstance(block, FrozenBlock) for block in kept] == [True, True, *[False] * 4]
    kept[0].forward(0, [torch.zeros(4, 5, dtype=F64)])  # type: ignore[call-arg]
    assert kept[0]._record is None


# -- low-rank adapters ---------------------------------------------------------------------------


class LoRA(nn.Module):
    """W x + b + B A x with W and b frozen (Hu et al. 2021)."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features, dtype=F64) / 3)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, dtype=F64))

    def forward(self, x):
        return self.layer(x) + linear(linear(x, self.down), self.up)


def adapted(*layers):
    """Six layers, all frozen, some with adapters."""
    model = frozen(*range(6))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for i in layers:
            model[2 * i] = LoRA(model[2 * i])
    return model


@pytest.mark.parametrize("layers", [(0, 2, 5), (3,), (2, 4)])
def test_adapters(layers):
    items = drawn(20, 4, 5, 3)
    result = run(adapted(*layers), "backprop", items)
    expected = sgd(adapted(*layers), items, half_square, lr=0.05)
    assert relative(result.model.parameters(), expected.parameters()) <= ROUND_OFF
    names = {f"{2 * i}.{part}" for i in layers for part in ("down", "up")}
    assert moved(result.model, adapted(*layers)) == names
    assert moved(run(adapted(*layers), "trace", items).model, adapted(*layers)) == names


def moved(model, before):
    """The names of the weights that are not what they were."""
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    return {name for (name, now), then in pairs if not torch.equal(now, then)}
