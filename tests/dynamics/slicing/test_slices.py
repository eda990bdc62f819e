"""Oracle: torch.optim.SGD on the unsliced model, float64: at level `backprop` slices change nothing
but the order of sums. And, at other levels, hamdist's own run of the unsliced block where only one
reads it."""

from __future__ import annotations

import pytest
import torch
from dynamics.helpers import layer, linear, mlp, noise, relative, samples, settings, sgd
from dynamics.tracing.test_any_network import learned
from torch import nn
from torch.nn import functional

from hamdist.dynamics.graph.graph import BlockSpec, Combine, Graph
from hamdist.dynamics.modules.recurrent import Reads, RecurrentCell
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.slicing.sliced_layers import Share, heads_of
from hamdist.errors import GraphError, LevelError
from hamdist.runtime.train.train import train
from hamdist.streams import Sample, from_iterable

ROUND_OFF = 1e-12
STEPS = 20
E, HEADS = 8, 4


def compared(model, items, slices, **partition):
    """The run with slices; its weights and buffers are those of SGD without them."""
    config = settings(
        "backprop",
        loss="mse",
        partition={"slices": slices, **partition},
        learning={"lr": 0.05, "momentum": 0.5},
    )
    result = train(model, from_iterable(items), config)
    expected = sgd(model, items, mse, lr=0.05, momentum=0.5)
    assert relative(model.parameters(), expected.parameters()) > 1e-3, "nothing was learned"
    assert type(result.model) is type(model)
    found, wanted = result.model.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    assert relative(found.values(), wanted.values()) <= ROUND_OFF
    u = items[0][0]
    found_y, wanted_y = result.model.eval()(u), expected.eval()(u)
    assert relative([found_y], [wanted_y]) <= ROUND_OFF
    return result


# -- linear layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("many", [2, 3, 7])
def test_linear_of_seven_neurons(many):
    result = compared(mlp([5, 7, 6, 3]), samples(STEPS, 4, 5, 3), {"block0": many})
    names = [f"block0_{i}" for i in range(many)]
    assert list(result.blocks) == [*names, "block1", "block2"]
    rows = [len(result.blocks[n].theta["0.weight"]) for n in names]
    assert sum(rows) == 7
    assert max(rows) - min(rows) <= 1


def test_every_block_sliced_and_the_readout():
    result = compared(mlp([5, 7, 6, 3]), samples(STEPS, 4, 5, 3), {"block1": 2, "block*": 3})
    assert [n for n in result.blocks if n.startswith("block1")] == ["block1_0", "block1_1"]
    assert set(result.windows) == {"block2"}  # the readout keeps its name


def test_a_slice_sends_its_own_neurons_alone():
    """Forward and backward, 20 samples of batch 4 in float64."""
    items = samples(STEPS, 4, 5, 3)
    result = compared(mlp([5, 7, 6, 3]), items, {"block0": 3, "block1": 2})
    sizes = {"block0_0": 3, "block0_1": 2, "block0_2": 2}
    for name, neurons in sizes.items():
        for child in ("block1_0", "block1_1"):
            assert result.bytes_per_edge[f"{name}->{child}"] == 2 * STEPS * 4 * neurons * 8


def test_halves_of_an_mlp():
    """Hidden neurons are shared out, the second layer by its columns: one hop, a sum."""
    items = samples(STEPS, 4, 5, 3)
    model = nn.Sequential(
        linear(5, 4, 0), linear(4, 9, 1), nn.GELU(), linear(9, 4, 2), layer(4, 3, 3)
    )
    result = compared(model, items, {"block1": 4}, cuts=["1", "4"])
    assert [n for n in result.blocks if n.startswith("block1")] == [f"block1_{i}" for i in range(4)]
    assert [s.theta["3.weight"].shape[1] for n, s in result.blocks.items() if "_" in n] == [
        3,
        2,
        2,
        2,
    ]
    biases = ["3.bias" in s.theta for n, s in result.blocks.items() if "_" in n]
    assert biases == [True, False, False, False]


def test_initial_weights_are_slices_of_the_original():
    model = mlp([5, 7, 3])
    config = settings("trace", loss="mse", partition={"slices": {"block0": 3}}, learning={"lr": 0})
    result = train(model, from_iterable(samples(2, 4, 5, 3)), config)
    pieces = [result.blocks[f"block0_{i}"].theta["0.weight"] for i in range(3)]
    assert torch.equal(torch.cat(pieces), model[0].weight)


def test_frozen_and_uneven_batches():
    model = mlp([5, 7, 6, 3])
    model[2].bias.requires_grad_(False)
    items = [(u[: 4 - n % 2], y[: 4 - n % 2]) for n, (u, y) in enumerate(samples(STEPS, 4, 5, 3))]
    compared(model, items, {"block0": 3, "block1": 4})


@pytest.mark.parametrize(("units", "m"), [(7, 3), (10, 4), (4, 4), (5, 1)])
def test_shares_are_a_partition(units, m):
    shares = [Share(units, 2, i, m).places(4 * units) for i in range(m)]
    assert sorted(torch.cat(shares).tolist()) == list(range(4 * units))
    assert max(map(len, shares)) - min(map(len, shares)) <= 4  # a unit of two places, twice


# -- convolutions ----------------------------------------------------------------------------------


def images(outputs):
    return list(zip(noise(0, STEPS, 4, 1, 8, 8), noise(1, STEPS, 4, outputs), strict=True))


def test_ten_channels_over_four():
    """With what is channel by channel behind them, statistics included."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 10, 3, padding=1),
        nn.BatchNorm2d(10),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(10, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()
    cuts = ["4", "7"]
    result = compared(model, images(3), {"block0": 4}, cuts=cuts)
    sizes = [s.theta["0.weight"].shape[0] for n, s in result.blocks.items() if "_" in n]
    assert sizes == [3, 3, 2, 2]
    result = compared(model, images(3), {"block0": 4, "block1": 4}, cuts=cuts)
    assert len(result.blocks) == 9


class Residual(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x):
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(y + (x if self.down is None else self.down(x)))


def test_residual_blocks():
    torch.manual_seed(0)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), Residual(4, 4), Residual(4, 6), *pool).double()
    compared(model, images(3), {"block1": 3, "block2": 4}, cuts=["1", "2", "3"])


# -- attention -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Written as people do. fused: queries, keys and values are one layer."""

    def __init__(self, fused, plain):
        super().__init__()
        self.fused, self.plain = fused, plain
        if fused:
            self.qkv = nn.Linear(E, 3 * E)
        else:
            self.q, self.k, self.v = (nn.Linear(E, E) for _ in range(3))
        self.out = nn.Linear(E, E)
        self.register_buffer("mask", torch.ones(9, 9).tril())

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).split(c, dim=2) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (a.view(b, t, HEADS, c // HEADS).transpose(1, 2) for a in (q, k, v))
        if self.plain:
            a = q @ k.transpose(-2, -1) / (c // HEADS) ** 0.5
            y = a.masked_fill(self.mask[:t, :t] == 0, float("-inf")).softmax(-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


class Torch(nn.Module):
    """torch's own attention; first: the batch."""

    def __init__(self, first, bias):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=first, bias=bias)
        self.first = first

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        y, _ = self.attention(x, x, x, need_weights=False)
        return y if self.first else y.transpose(0, 1)


class Transformer(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(E), nn.LayerNorm(E)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(E, 11), nn.GELU(), nn.Linear(11, E))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(E, 3)

    def forward(self, x):
        return self.linear(x.mean(1))


def encoder(first):
    return nn.TransformerEncoderLayer(E, HEADS, 11, dropout=0.0, batch_first=True, norm_first=first)


MIDDLES = {
    "linear q, k, v": lambda: Attention(False, False),
    "scores by hand": lambda: Attention(False, True),
    "fused": lambda: Attention(True, False),
    "torch": lambda: Torch(True, True),
    "torch, tokens first": lambda: Torch(False, False),
    "transformer": lambda: Transformer(Attention(True, True)),
    "transformer, torch": lambda: Transformer(Torch(True, True)),
    "encoder, norm first": lambda: encoder(True),
    "encoder": lambda: encoder(False),
}


def token_model(middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, E), MIDDLES[middle](), Head()).double()


def tokens():
    return list(zip(noise(0, STEPS, 4, 6, 5), noise(1, STEPS, 4, 3), strict=True))


@pytest.mark.parametrize("many", [2, 3, 4])
@pytest.mark.parametrize("middle", MIDDLES)
def test_heads_and_halves(middle, many):
    compared(token_model(middle), tokens(), {"block1": many}, cuts=["1", "2"])


def test_torchs_attention_with_masks():
    """Against the attention itself."""
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(E, HEADS, batch_first=True).double()
    x, memory = noise(1, 2, 5, E), noise(2, 2, 6, E)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    for mask in (torch.ones(5, 6).tril().bool().logical_not(), noise(3, 5, 6)):
        given = {"key_padding_mask": padding, "attn_mask": mask}
        if mask.dtype is not torch.bool:
            given["key_padding_mask"] = torch.zeros(2, 6).double().masked_fill(padding, -torch.inf)
        parts = [heads_of(whole, Share(HEADS, 1, i, 3))[0] for i in range(3)]
        found = sum(part(x, memory, memory, **given)[0] for part in parts)
        torch.testing.assert_close(
            found, whole(x, memory, memory, **given)[0], rtol=1e-12, atol=1e-12
        )


# -- graphs and levels -----------------------------------------------------------------------------


def test_a_graph_by_hand_with_skips_and_delays():
    """Slices in the BlockSpec; two parents joined, summed and by argument; one edge of 3 ticks."""

    def graph(many):
        return Graph(
            [
                BlockSpec("a", layer(5, 6, 0), ("u",), slices=many),
                BlockSpec("b", layer(6, 6, 1), ("a",), delays={"a": 3}, slices=many),
                BlockSpec("c", layer(12, 4, 2), ("b", "a"), slices=many),
                BlockSpec("d", layer(6, 4, 4), ("a", "b"), combine=Combine.SUM),
                BlockSpec(
                    "e", nn.Bilinear(4, 4, 3).double(), ("c", "d"), Combine.ARGUMENTS, loss=mse
                ),
            ]
        )

    torch.manual_seed(0)
    plain, items = graph(1), samples(STEPS, 4, 5, 3)
    torch.manual_seed(0)
    spread = graph(2)
    config = settings("backprop", learning={"lr": 0.05})
    left, right = (train(g, from_iterable(items), config) for g in (plain, spread))
    found, wanted = right.model.state_dict(), left.model.state_dict()
    assert list(found) == list(wanted)
    assert relative(found.values(), wanted.values()) <= ROUND_OFF
    assert right.blocks.keys() > {"a_0", "a_1", "b_1", "c_0", "d", "e"}


@pytest.mark.parametrize("order", ["omega-first", "simultaneous"])
def test_a_cycle_of_sliced_states(order):
    """Presentation 'hold', a block that reads itself: a slice reads all slices of itself, and its
    neurons do what they did, tick by tick."""

    def graph(many):
        own = nn.Sequential(linear(8, 5, 1), nn.Tanh())
        return Graph(
            [
                BlockSpec("h", own, ("u", "h"), shape=(5,), slices=many),
                BlockSpec("y", linear(5, 2, 3), ("h",), loss=mse),
            ]
        )

    config = settings(
        "local", locality={"order": order}, dynamics={"tau": 0.5, "c": 1.2, "eta": 0.3}
    )
    items = samples(40, 4, 3, 2)
    left, right = (train(graph(m), from_iterable(items), config) for m in (1, 3))
    found, wanted = right.model.state_dict(), left.model.state_dict()
    assert relative(found.values(), wanted.values()) <= ROUND_OFF
    h = torch.cat([right.blocks[f"h_{i}"].h for i in range(3)], -1)
    assert relative([h], [left.blocks["h"].h]) <= ROUND_OFF


def test_trace_is_that_of_the_unsliced_chain():
    """Slices beside each other add no hop, so not only `backprop` keeps its numbers."""
    model, items = mlp([5, 7, 6, 3]), samples(60, 4, 5, 3)
    runs = [
        train(
            model,
            from_iterable(items),
            settings("trace", loss="mse", partition={"slices": s}, learning={"lr": 0.02}),
        )
        for s in ({}, {"block0": 3, "block1": 2})
    ]
    left, right = (r.model.state_dict().values() for r in runs)
    assert relative(right, left) <= ROUND_OFF
    assert runs[0].staleness == runs[1].staleness


def test_sequences():
    """Beside a recurrent cell, at level 'bptt'."""

    def graph(many):
        torch.manual_seed(0)
        cell = RecurrentCell(nn.GRUCell(5, 6)).double()
        return Graph(
            [
                BlockSpec("c", cell, ("u", "c"), Combine.ARGUMENTS, shape=(6,)),
                BlockSpec("m", layer(6, 7, 1), ("c",), slices=many),
                BlockSpec("y", Reads(linear(7, 3, 2), slice(0, 7)), ("m",), loss=mse),
            ]
        )

    items = [Sample(u, y, end=n % 5 == 4) for n, (u, y) in enumerate(samples(STEPS, 4, 5, 3))]
    config = settings("bptt", learning={"lr": 0.05})
    left, right = (train(graph(m), from_iterable(items), config) for m in (1, 3))
    found, wanted = right.model.state_dict(), left.model.state_dict()
    assert list(found) == list(wanted)
    assert relative(found.values(), wanted.values()) <= ROUND_OFF


# -- refusals --------------------------------------------------------------------------------------


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 6)

    def forward(self, x):
        y = self.linear(x)
        return y if y.sum() > 0 else -y


def refused(model, slices, match, error=GraphError, level="backprop", u=None, **partition):
    u = noise(0, 4, 5) if u is None else u
    config = settings(level, loss="mse", partition={"slices": slices, **partition})
    with pytest.raises(error, match=match) as caught:
        train(model, from_iterable([(u, noise(1, 4, 3))]), config)
    return str(caught.value)


def test_too_many_slices():
    text = refused(mlp([5, 7, 3]), {"block0": 8}, "block0.*8 slices.*'0' has 7 neurons")
    assert "use at most 7" in text
    u = noise(0, 4, 6, 5)
    refused(token_model("torch"), {"block1": 5}, "4 heads", u=u, cuts=["1", "2"])
    refused(token_model("fused"), {"block1": 5}, "has 4 heads", u=u, cuts=["1", "2"])


def test_an_unknown_block():
    refused(mlp([5, 7, 3]), {"block7": 2}, r"partition\.slices\.block7: no such block.*block0")
    refused(mlp([5, 7, 3]), {"b*": 2, "block*": 2}, r"partition\.slices\.block\*: .*earlier")


def test_what_cannot_be_sliced():
    bare = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    refused(bare, {"block1": 2}, "block1.*nothing in it.*LayerNorm", cuts=["1", "2"])
    odd = nn.Sequential(Reading(), nn.Linear(6, 3)).double()
    refused(odd, {"block0": 2}, r"block0.*a Reading. stays whole.*values of a tensor")
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3)).double()
    u = noise(0, 4, 2, 3, 3)
    refused(grouped, {"block0": 2}, "'0' is a Conv2d with groups=2", u=u, cuts=["2"])


def test_slices_need_memory():
    refused(
        mlp([5, 7, 3]), {"block0": 2}, "slices with memory 'reversible'", LevelError, "reversible"
    )


@pytest.mark.parametrize("many", [0, True, 1.5])
def test_slices_is_a_number(many):
    graph = Graph([BlockSpec("a", linear(5, 3, 0), ("u",), loss=mse, slices=many)])
    with pytest.raises(GraphError, match="block 'a': slices is"):
        train(graph, from_iterable(samples(2, 4, 5, 3)), settings("backprop"))


# -- models that were cut by the library -----------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "unet", "vit", "two by two"])
def test_pieces_of_any_module(name):
    """Blocks that the splitter made, with skips, buffers, several inputs and readouts."""
    result, apart = learned(name, partition={"blocks": 3, "slices": {"block1": 2}})
    assert apart <= ROUND_OFF
    assert any(block.startswith("block1") and block.endswith("_1") for block in result.blocks)
