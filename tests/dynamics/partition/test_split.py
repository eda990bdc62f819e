"""Oracle: cuts by hand, brute force over all partitions, the original's own state_dict."""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import combinations

import pytest
import torch
from dynamics.helpers import F64, linear, noise
from torch import nn

import hamdist
from hamdist.config import Grouping, PartitionSettings, Settings
from hamdist.dynamics.graph.merged import merged_module
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.partition.cuts import balanced
from hamdist.dynamics.partition.split import split_module
from hamdist.errors import GraphError
from hamdist.runtime.train.prepare import as_graph
from hamdist.streams.sample import SampleSpec


def five_layers():
    """Children 0-9 in five units: (0 1 2) (3 4) (5 6) (7) (8 9)."""
    return nn.Sequential(
        nn.Flatten(),  # without parameters at the front: belongs to the first unit
        linear(6, 4, 0),
        nn.Tanh(),
        linear(4, 8, 1),
        nn.ReLU(),
        linear(8, 4, 2),
        nn.Tanh(),
        linear(4, 4, 3),
        linear(4, 2, 4),
        nn.Identity(),
    )


def split(model, grouping="layer", example=None, **partition):
    return split_module(
        model,
        mse,
        PartitionSettings.model_validate(partition),
        Grouping(grouping),
        example=torch.zeros(1, 6, dtype=F64) if example is None else example,
    )


def children(graph):
    """The names of the original's children, block by block."""
    return [" ".join(name for name, _ in b.module.named_children()) for b in graph.blocks.values()]


@pytest.mark.parametrize(
    ("asked", "blocks"),
    [
        ({"grouping": "layer"}, ["0 1 2", "3 4", "5 6", "7", "8 9"]),
        ({"grouping": "group"}, ["0 1 2 3 4", "5 6 7", "8 9"]),
        ({"grouping": "network"}, ["0 1 2 3 4 5 6 7 8 9"]),
        ({"cuts": ["3", "7"]}, ["0 1 2", "3 4 5 6", "7 8 9"]),
        ({"cuts": ["7", "3", "7"]}, ["0 1 2", "3 4 5 6", "7 8 9"]),  # in any order
        ({"cuts": ["0", "4"]}, ["0 1 2 3", "4 5 6 7 8 9"]),  # inside a unit, if asked
        ({"cuts": []}, ["0 1 2 3 4 5 6 7 8 9"]),
        ({"blocks": 1}, ["0 1 2 3 4 5 6 7 8 9"]),
        # parameters of the units: 28, 40, 36, 20, 10
        ({"blocks": 2}, ["0 1 2 3 4", "5 6 7 8 9"]),  # 68 | 66
        ({"blocks": 3}, ["0 1 2", "3 4", "5 6 7 8 9"]),  # 28 | 40 | 66; all others have 68 or more
        ({"blocks": 5}, ["0 1 2", "3 4", "5 6", "7", "8 9"]),
        # grouping is what happens without blocks and cuts
        ({"blocks": 5, "grouping": "network"}, ["0 1 2", "3 4", "5 6", "7", "8 9"]),
        # more blocks than units: children are cut, too
        ({"blocks": 10}, ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]),
    ],
)
def test_cuts(asked, blocks):
    graph = split(five_layers(), **asked)
    assert children(graph) == blocks
    assert list(graph.blocks) == [f"block{i}" for i in range(len(blocks))]
    specs = list(graph.blocks.values())
    assert [b.parents for b in specs] == [("u",), *((b.name,) for b in specs[:-1])]
    assert [b.loss is mse for b in specs] == [False] * (len(specs) - 1) + [True]


def test_delay_of_the_edges_between_blocks():
    graph = split(five_layers(), delay=3)
    assert [e.delay for e in graph.edges] == [1, 3, 3, 3, 3]  # not of the input's


def test_state_readout():
    graph = split_module(
        five_layers(),
        mse,
        PartitionSettings(),
        Grouping.LAYER,
        example=torch.zeros(1, 6, dtype=F64),
        state_readout=True,
    )
    assert [b.state for b in graph.blocks.values()] == [False] * 4 + [True]


def test_named_children():
    named = OrderedDict(first=linear(6, 4, 0), act=nn.Tanh(), second=linear(4, 2, 1))
    model = nn.Sequential(named)
    graph = split(model, cuts=["second"])
    assert children(graph) == ["first act", "second"]
    weights = {n: b.module.state_dict() for n, b in graph.blocks.items()}
    assert list(merged_module(graph, weights).state_dict()) == [
        "first.weight", "first.bias", "second.weight", "second.bias",
    ]  # fmt: skip


@pytest.mark.parametrize("asked", [{}, {"grouping": "group"}, {"blocks": 10}, {"cuts": ["4"]}])
def test_merge_gives_the_original_keys_and_values(asked):
    model = five_layers()
    graph = split(copy.deepcopy(model), **asked)
    merged = merged_module(graph, {n: b.module.state_dict() for n, b in graph.blocks.items()})
    assert isinstance(merged, nn.Sequential)
    original = model.state_dict()
    assert list(merged.state_dict()) == list(original)
    assert all(torch.equal(t, original[k]) for k, t in merged.state_dict().items())
    u = noise(0, 3, 6)
    assert torch.equal(merged(u), model(u))


def test_merge_puts_changed_weights_at_their_keys():
    """Every weight becomes a number of its own; it must be found under its original key."""
    model = nn.Sequential(
        linear(6, 4, 0), nn.BatchNorm1d(4, dtype=F64), nn.Tanh(), linear(4, 4, 1), linear(4, 2, 2)
    )
    keys = list(model.state_dict())
    number = {key: float(i + 1) for i, key in enumerate(keys)}
    graph = split(model)
    weights = {
        name: {k: torch.full_like(t, number[k]) for k, t in block.module.state_dict().items()}
        for name, block in graph.blocks.items()
    }
    before = {k: t.clone() for k, t in model.state_dict().items()}
    state = merged_module(graph, weights).state_dict()
    assert list(state) == keys
    for key in keys:
        assert torch.equal(state[key], torch.full_like(state[key], number[key])), key
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())  # a copy


def test_a_child_with_buffers_that_comes_twice_stays_in_one_block():
    """Its running statistics are those of torch, which moves them twice a sample."""
    norm = nn.BatchNorm1d(6, dtype=F64)
    model = nn.Sequential(linear(6, 6, 0), norm, linear(6, 6, 1), norm, linear(6, 2, 2))
    expected = copy.deepcopy(model)
    stream = [(noise(n, 4, 6), noise(n + 9, 4, 2)) for n in range(5)]
    result = hamdist.train(
        model, stream, loss="mse", level="backprop", dtype="float64", learning={"lr": 0.1}
    )
    sgd = torch.optim.SGD(expected.parameters(), 0.1)
    for u, y in stream:
        sgd.zero_grad()
        mse(expected(u), y).backward()
        sgd.step()
    assert list(result.blocks) == ["block0", "block1", "block2"]
    for name, value in result.model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-12, atol=1e-12)
    with pytest.raises(GraphError, match=r"no block can begin at '2': the weight '1.running_mean'"):
        split(model, cuts=["2"])


# -- balance -----------------------------------------------------------------------------------


def partitions(costs, parts):
    """All ways of cutting `costs` into `parts` runs, as first indices."""
    for cuts in combinations(range(1, len(costs)), parts - 1):
        yield [0, *cuts]


def largest(costs, starts):
    return max(sum(costs[a:b]) for a, b in zip(starts, [*starts[1:], len(costs)], strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_balanced_against_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 9, (), generator=generator))
    costs = torch.randint(0, 20, (n,), generator=generator).double().tolist()
    for parts in range(1, n + 1):
        starts = balanced(costs, parts)
        every = list(partitions(costs, parts))
        assert starts in every
        assert largest(costs, starts) == min(largest(costs, s) for s in every)


def test_balanced_takes_the_earliest_cut_among_equals():
    assert balanced([1, 1, 1], 2) == [0, 1]
    assert balanced([0, 0, 5], 2) == [0, 1]
    assert balanced([2, 2, 2, 2], 2) == [0, 2]


def test_balance_by_parameters_counts_weights():
    """28, 20, 20, 2000, 401: the wide layer decides."""
    model = nn.Sequential(
        linear(6, 4, 0), linear(4, 4, 1), linear(4, 4, 2), linear(4, 400, 3), linear(400, 1, 4)
    )
    assert children(split(model, blocks=2)) == ["0 1 2 3", "4"]
    assert children(split(model, blocks=3)) == ["0 1 2", "3", "4"]


class Slow(nn.Module):
    """No parameters, and far more work than its neighbours."""

    def __init__(self):
        super().__init__()
        self.register_buffer("big", torch.eye(500, dtype=F64))

    def forward(self, x):
        return x + 0 * (self.big @ self.big @ self.big).sum()


def test_balance_by_time_measures():
    """The slow child has no parameters, so only a clock sees what it costs."""
    model = nn.Sequential(
        linear(6, 6, 0), Slow(), linear(6, 6, 1), linear(6, 6, 2), linear(6, 6, 3)
    )
    by_time = split(model, blocks=2, balance="time", example=noise(0, 2, 6))
    assert children(by_time) == ["0 1", "2 3 4"]
    assert children(split(model, blocks=2, balance="parameters")) in (
        ["0 1 2", "3 4"],
        ["0 1", "2 3 4"],
    )
    last = nn.Sequential(linear(6, 6, 0), linear(6, 6, 1), linear(6, 6, 2), linear(6, 6, 3), Slow())
    assert children(split(last, blocks=2, balance="time")) == ["0 1 2", "3 4"]
    assert children(split(last, blocks=2)) == ["0 1", "2 3 4"]


class SlowBack(torch.autograd.Function):
    """The identity, whose backward is far more work than anything beside it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, z):
        big = torch.eye(500, dtype=F64)
        return z + 0 * (big @ big @ big).sum()


def test_balance_by_time_measures_the_backward_too():
    class Slow(nn.Module):
        def forward(self, x):
            return SlowBack.apply(x)

    rest = [linear(6, 6, i) for i in range(1, 8)]
    by_time = split(nn.Sequential(linear(6, 6, 0), Slow(), *rest), blocks=2, balance="time",
                    example=noise(0, 2, 6))  # fmt: skip
    assert children(by_time) == ["0 1", "2 3 4 5 6 7 8"]


def test_balance_by_time_leaves_the_model_and_the_generator_alone():
    model = nn.Sequential(
        linear(6, 4, 0), nn.BatchNorm1d(4, dtype=F64), nn.Dropout(), linear(4, 1, 1)
    )
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    split(model, blocks=2, balance="time", example=noise(0, 3, 6))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_balance_by_time_of_tokens():
    words = nn.Sequential(nn.Embedding(9, 4, dtype=F64), nn.Flatten(), linear(12, 2, 0))
    graph = split(words, blocks=2, balance="time", example=torch.zeros(2, 3, dtype=torch.int64))
    assert children(graph) == ["0 1", "2"]


# -- errors ------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(GraphError, match="empty nn.Sequential"):
        split(nn.Sequential())
    with pytest.raises(GraphError, match="cut 'x' is no module of the model; known: 0, 1, 2"):
        split(five_layers(), cuts=["3", "x"])
    with pytest.raises(GraphError, match="cannot cut the model into 11 blocks; use at most 10"):
        split(five_layers(), blocks=11)
    with pytest.raises(ValueError, match="'blocks' or 'cuts', not both"):
        PartitionSettings(blocks=2, cuts=("1",))


SPEC = SampleSpec((2, 6), F64, (2, 2), F64)


def test_a_module_of_one_layer_is_one_block():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = linear(6, 2, 0)

        def forward(self, x):
            return self.a(x)

    with pytest.raises(GraphError, match="cannot cut the model into 2 blocks; use at most 1"):
        as_graph(Net(), Settings.model_validate({"partition": {"blocks": 2}}), SPEC, mse)
    whole = as_graph(Net(), Settings(), SPEC, mse)
    assert list(whole.blocks) == ["block0"]
    merged = merged_module(whole, {"block0": whole.blocks["block0"].module.state_dict()})
    assert list(merged.state_dict()) == ["a.weight", "a.bias"]


def test_the_users_model_is_left_alone():
    model = five_layers()
    graph = as_graph(model, Settings(), SPEC, mse)
    theirs = {p.data_ptr() for p in model.parameters()}
    ours = {p.data_ptr() for b in graph.blocks.values() for p in b.module.parameters()}
    assert not theirs & ours
