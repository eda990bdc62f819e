"""Oracle: the documented contract of each error; shapes and depths by hand; torch."""

from __future__ import annotations

import pytest
import torch
from dynamics.helpers import F64, bare, layer, linear, noise
from torch import nn

from hamdist.dynamics.graph.graph import BlockSpec, Combine, Graph, combined
from hamdist.dynamics.graph.merged import merged_module
from hamdist.dynamics.objective.losses import mse
from hamdist.errors import GraphError


def spec(name, *parents, module=None, **rest):
    return BlockSpec(name, nn.Identity() if module is None else module, parents, **rest)


def readout(name, *parents, **rest):
    return spec(name, *parents, loss=mse, **rest)


# -- what cannot run ---------------------------------------------------------------------------


TWIN = nn.Linear(2, 2)
NORM = nn.BatchNorm1d(2)
WRONG = {
    "empty": ([], r"the graph has no blocks"),
    "twice": ([spec("a", "u"), readout("a", "a")], r"two blocks are named 'a'"),
    "named u": ([readout("u", "u")], r"block 'u': a name is not"),
    "named with an arrow": ([readout("a->b", "u")], r"block 'a->b'.*'->'"),
    "named with a dot": ([readout("a.b", "u")], r"block 'a.b'.*'\.'"),
    "nameless": ([readout("", "u")], r"block ''"),
    "no parents": ([spec("a"), readout("b", "a")], r"block 'a' has no parents.*'u'"),
    "unknown parent": (
        [spec("a", "u"), readout("b", "x")],
        r"block 'b' has the unknown parent 'x'; known: u, a, b",
    ),
    "delay for a stranger": (
        [spec("a", "u"), readout("b", "a", delays={"u": 2})],
        r"block 'b' has a delay for 'u', which is not its parent",
    ),
    "delay for an unknown block": (
        [spec("a", "u"), readout("b", "a", delays={"x": 2})],
        r"block 'b' has the unknown parent 'x'",
    ),
    "doubled parent": (
        [spec("a", "u"), readout("b", "a", "a")],
        r"block 'b' names its parent 'a' twice",
    ),
    "fractional delay": (
        [spec("a", "u"), readout("b", "a", delays={"a": 1.5})],
        r"edge a->b: delay 1.5 is no whole number",
    ),
    "boolean delay": (
        [spec("a", "u"), readout("b", "a", delays={"a": True})],
        r"edge a->b: delay True is no whole number",
    ),
    "zero delay": (
        [spec("a", "u"), readout("b", "a", delays={"a": 0})],
        r"edge a->b has delay 0: a signal needs at least one tick.*one block$",
    ),
    "negative delay": (
        [spec("a", "u"), readout("b", "a", delays={"a": -1})],
        r"edge a->b has delay -1",
    ),
    "zero-delay cycle": (
        [
            spec("a", "u", "c", delays={"c": 0}),
            spec("b", "a", delays={"a": 0}),
            spec("c", "b", delays={"b": 0}),
            readout("r", "c"),
        ],
        r"zero-delay cycle a -> b -> c -> a:",
    ),
    "zero-delay self-edge": (
        [spec("a", "u", "a", delays={"a": 0}), readout("r", "a")],
        r"edge a->a has delay 0; it lies on the zero-delay cycle a -> a:",
    ),
    "no readout": ([spec("a", "u"), spec("b", "a")], r"no block has a loss"),
    "no path to a readout": (
        [spec("a", "u"), spec("b", "a"), spec("c", "b"), readout("r", "a")],
        r"no path leads from blocks 'b', 'c' to a readout",
    ),
    "a child of an output net": (
        [readout("a", "u"), readout("b", "a")],
        r"block 'b' reads 'a', an output net, which has no state.*state=True",
    ),
    "output of a plain block": (
        [spec("a", "u", output=nn.Identity()), readout("r", "a")],
        r"block 'a' has an output module but is no readout with a state",
    ),
    "output of an output net": (
        [readout("a", "u", output=nn.Identity())],
        r"block 'a' has an output module but is no readout with a state",
    ),
    "shared buffer": (
        [spec("a", "u", module=NORM), readout("b", "a", module=nn.Sequential(NORM))],
        r"blocks 'a' and 'b' share a buffer \('running_mean' and '0.running_mean'\)",
    ),
    "parameter shared with an output module": (
        [spec("a", "u", module=TWIN), readout("b", "a", state=True, output=TWIN)],
        r"blocks 'a' and 'b' share a parameter",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_graph_is_refused_by_name(case):
    blocks, message = WRONG[case]
    with pytest.raises(GraphError, match=message):
        Graph(blocks)


def test_what_is_allowed():
    tied = nn.Linear(2, 2)
    Graph([spec("a", "u", module=nn.Sequential(tied, tied)), readout("r", "a")])  # in one block
    Graph([spec("a", "u", "a"), readout("r", "a", "u")])  # a self-edge, a skip from the input
    Graph([spec("a", "u", "b"), spec("b", "a"), readout("r", "b")])
    Graph([readout("r", "u", state=True), readout("q", "r")])  # a readout with a state has children


# -- structure ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "depths", "deepest"),
    [
        (("a: u",), {"a": 0}, 0),
        (("a: u", "b: a", "c: b"), {"a": 0, "b": 1, "c": 2}, 2),
        (("a: u+2", "b: a+2", "c: b+3"), {"a": 1, "b": 3, "c": 6}, 6),
        (("a: u", "b: a", "c: a b"), {"a": 0, "b": 1, "c": 2}, 2),  # the longest way counts
        (("a: u", "b: a", "c: a+5 b"), {"a": 0, "b": 1, "c": 5}, 5),  # in ticks, not in edges
        (("a: u", "b: a", "c: a", "d: b c+2"), {"a": 0, "b": 1, "c": 1, "d": 3}, 3),
        (("d: b a", "b: a", "a: u"), {"d": 2, "b": 1, "a": 0}, 2),  # in any order
        # cycles: the shortest way
        (("a: u b", "b: a", "r: b"), {"a": 0, "b": 1, "r": 2}, 2),
        (("a: u b", "b: a", "r: b a"), {"a": 0, "b": 1, "r": 1}, 1),
        (("a: u a", "r: a"), {"a": 0, "r": 1}, 1),
        (("a: a", "r: a u"), {"a": 0, "r": 0}, 0),  # a clock of its own, which no input reaches
    ],
)
def test_depths(lines, depths, deepest):
    graph = bare(*lines)
    assert graph.depths == depths
    assert graph.depth == deepest


def test_edges_in_the_order_of_the_parents():
    graph = bare("b: a u+4", "a: u", "r: b a+2")
    assert [(e.name, e.delay) for e in graph.edges] == [
        ("a->b", 1), ("u->b", 4), ("u->a", 1), ("b->r", 1), ("a->r", 2),
    ]  # fmt: skip
    assert [e.index for e in graph.edges] == list(range(5))
    assert [e.name for e in graph.into["r"]] == ["b->r", "a->r"]
    assert [e.name for e in graph.out_of["a"]] == ["a->b", "a->r"]
    assert [e.name for e in graph.out_of["u"]] == ["u->b", "u->a"]
    assert graph.into["a"][0].from_input
    assert not graph.into["b"][0].from_input


def test_cycles_and_what_lies_behind_them():
    graph = bare("a: u", "b: a c", "c: b", "d: c", "r: a d")
    assert not graph.acyclic
    assert graph.cycle() == ["b", "c", "d", "r"]
    assert bare("a: u", "r: a").cycle() == []
    assert bare("a: a", "r: a u").unreached() == ["a"]
    assert bare("a: u", "n: a", "f: a").readouts == ["n", "f"]


def test_combined():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])
    assert torch.equal(combined(Combine.CONCAT, [a, b])[0], torch.tensor([[1.0, 2, 10, 20]]))
    assert torch.equal(combined(Combine.SUM, [a, b])[0], torch.tensor([[11.0, 22]]))
    assert [t is s for t, s in zip(combined(Combine.ARGUMENTS, [a, b]), [a, b], strict=True)]
    for way in Combine:
        assert combined(way, [a])[0] is a


# -- shapes ------------------------------------------------------------------------------------


class Product(nn.Module):
    def forward(self, a, b):
        return a * b


class Peeks(nn.Module):
    """Branches on a value, which a meta tensor does not have."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.how == "item":
            positive = x.sum().item() >= 0
        elif self.how == "bool":
            positive = bool(x.sum() >= 0)
        else:
            positive = x.numpy().sum() >= 0
        return x[:, :2] if positive else x


def _shape(graph, shape, dtype=F64):
    return {name: tuple(s) for name, (s, _) in graph.shapes(shape, dtype).items()}


def test_shapes_concat_sum_arguments():
    graph = Graph(
        [
            spec("a", "u", module=linear(5, 3, 0)),
            spec("b", "u", module=linear(5, 3, 1)),
            spec("joined", "a", "b", "u", module=linear(11, 4, 2)),
            spec("summed", "a", "b", module=linear(3, 6, 3), combine=Combine.SUM),
            spec("times", "b", "a", module=Product(), combine=Combine.ARGUMENTS),
            readout("r", "joined", "summed", "times", module=linear(13, 2, 4)),
        ]
    )
    shapes = {"a": 3, "b": 3, "joined": 4, "summed": 6, "times": 3, "r": 2}
    assert _shape(graph, (7, 5)) == {name: (7, n) for name, n in shapes.items()}


def test_shapes_of_a_conv_net_and_of_tokens():
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4 * 3 * 3, 2))
    graph = Graph([spec("a", "u", module=conv), readout("r", "a", module=flat)])
    assert _shape(graph, (5, 1, 8, 8), torch.float32) == {"a": (5, 4, 3, 3), "r": (5, 2)}
    words = nn.Sequential(nn.Embedding(10, 6, dtype=F64), nn.Flatten())
    graph = Graph([spec("a", "u", module=words), readout("r", "a", module=linear(24, 2, 0))])
    assert graph.shapes((3, 4), torch.int64) == {"a": ((3, 24), F64), "r": ((3, 2), F64)}


def test_shapes_of_a_cycle_with_a_declared_shape():
    graph = Graph(
        [
            spec("a", "u", "b", module=layer(3 + 4, 5, 0)),
            spec("b", "a", module=layer(5, 4, 1), shape=(4,)),
            readout("r", "a", module=linear(5, 2, 2)),
        ]
    )
    assert _shape(graph, (6, 3)) == {"a": (6, 5), "b": (6, 4), "r": (6, 2)}


@pytest.mark.parametrize("how", ["item", "bool", "numpy"])
def test_a_module_that_reads_values_is_run_on_zeros(how):
    graph = Graph([spec("a", "u", module=Peeks(how)), readout("r", "a", module=linear(2, 1, 0))])
    assert _shape(graph, (3, 4)) == {"a": (3, 2), "r": (3, 1)}


def test_a_dry_run_draws_no_random_numbers_and_changes_no_buffer():
    norm = nn.BatchNorm1d(4, dtype=F64)
    graph = Graph(
        [spec("a", "u", module=nn.Sequential(norm, nn.Dropout(), Peeks("item"))), readout("r", "a")]
    )
    before = torch.get_rng_state()
    graph.shapes((3, 4), F64)
    assert torch.equal(torch.get_rng_state(), before)
    assert norm.num_batches_tracked == 0


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Whole(nn.Module):
    def forward(self, x):
        return x.sum()


class Turned(nn.Module):
    def forward(self, x):
        return x.T


WRONG_SHAPES = {
    "too wide": (
        [spec("a", "u", module=linear(3, 5, 0)), readout("r", "a", module=linear(4, 2, 0))],
        r"block 'r' \(Linear\) does not take its input a \(7, 5\)",
    ),
    "concat": (
        [spec("a", "u", module=linear(3, 5, 0)), readout("r", "a", "u", module=linear(5, 2, 0))],
        r"block 'r' \(Linear\) does not take its input a \(7, 5\), u \(7, 3\)",
    ),
    "sum of unlike shapes": (
        [
            spec("a", "u", module=linear(3, 5, 0)),
            readout("r", "a", "u", module=linear(5, 2, 0), combine=Combine.SUM),
        ],
        r"block 'r' \(Linear\) does not take its input a \(7, 5\), u \(7, 3\)",
    ),
    "too many arguments": (
        [
            spec("a", "u", module=linear(3, 5, 0)),
            readout("r", "a", "u", module=linear(5, 2, 0), combine=Combine.ARGUMENTS),
        ],
        r"block 'r' \(Linear\) does not take",
    ),
    "another dtype": (
        [spec("a", "u", module=nn.Linear(3, 5)), readout("r", "a")],
        r"block 'a' \(Linear\) does not take its input u \(7, 3\): .*dtype"
        r".*its weights are float32, the input is float64: set dtype",
    ),
    "a pair": (
        [spec("a", "u", module=Pair()), readout("r", "a")],
        r"block 'a' returned tuple, not a tensor",
    ),
    "no batch": (
        [spec("a", "u", module=Whole()), readout("r", "a")],
        r"block 'a' turns u \(7, 3\) into \(\): the batch must stay in front",
    ),
    "the batch elsewhere": (
        [spec("a", "u", module=Turned()), readout("r", "a")],
        r"block 'a' turns u \(7, 3\) into \(3, 7\): the batch must stay in front",
    ),
    "an output module": (
        [readout("r", "u", module=linear(3, 5, 0), state=True, output=linear(4, 2, 0))],
        r"block 'r' \(Linear\) does not take its input its own h \(7, 5\)",
    ),
    "a cycle without a shape": (
        [spec("a", "u", "b", module=linear(5, 3, 0)), spec("b", "a"), readout("r", "b")],
        r"the shapes of blocks 'a', 'b', 'r' depend on each other.*shape=",
    ),
    "a cycle with a wrong shape": (
        [
            spec("a", "u", "b", module=linear(7, 3, 0)),
            spec("b", "a", shape=(4,)),
            readout("r", "b"),
        ],
        r"block 'b' gives h of shape \(7, 3\), but shape=\(4,\) was declared \(batch 7",
    ),
    "a module that fails on values": (
        [spec("a", "u", module=nn.Sequential(Peeks("item"), linear(3, 2, 0))), readout("r", "a")],
        r"block 'a' \(Sequential\) does not take its input u \(7, 3\)",
    ),
}


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_a_wrong_shape_is_found_and_names_the_block(case):
    blocks, message = WRONG_SHAPES[case]
    with pytest.raises(GraphError, match=message):
        Graph(blocks).shapes((7, 3), F64)


# -- merged module -----------------------------------------------------------------------------


def _weights(graph, scale=1.0):
    """Every block's tensors, by the keys that a run hands to `merge`."""
    made = {}
    for name, block in graph.blocks.items():
        made[name] = {k: t * scale for k, t in block.module.state_dict().items()}
        if block.output is not None:
            output = block.output.state_dict()
            made[name] |= {f"output:{k}": t * scale for k, t in output.items()}
    return made


def test_merged_skip_and_two_parents():
    a, b, r = layer(3, 4, 0), layer(4, 4, 1), linear(4 + 3, 2, 2)
    graph = Graph(
        [
            spec("a", "u", module=a),
            spec("b", "a", module=b),
            spec("s", "b", "a", combine=Combine.SUM),
            readout("r", "s", "u", module=r),
        ]
    )
    u = noise(0, 5, 3)
    expected = r(torch.cat([b(a(u)) + a(u), u], -1))
    assert torch.equal(merged_module(graph, _weights(graph))(u), expected)


def test_merged_blocks_in_any_order():
    a, r = layer(3, 4, 0), linear(4, 2, 2)
    graph = Graph([readout("r", "a", module=r), spec("a", "u", module=a)])
    u = noise(0, 5, 3)
    assert torch.equal(merged_module(graph, _weights(graph))(u), r(a(u)))


def test_merged_arguments_keep_the_order_of_the_parents():
    class Difference(nn.Module):
        def forward(self, x, y):
            return x - 2 * y

    a, b = layer(3, 4, 0), layer(3, 4, 1)
    graph = Graph(
        [
            spec("a", "u", module=a),
            spec("b", "u", module=b),
            readout("r", "b", "a", module=Difference(), combine=Combine.ARGUMENTS),
        ]
    )
    u = noise(0, 5, 3)
    assert torch.equal(merged_module(graph, _weights(graph))(u), b(u) - 2 * a(u))


def test_merged_two_readouts():
    a, near, far = layer(3, 4, 0), linear(4, 2, 1), linear(4, 1, 2)
    graph = Graph(
        [
            spec("a", "u", module=a),
            readout("near", "a", module=near),
            readout("far", "a", module=far),
        ]
    )
    u = noise(0, 5, 3)
    merged = merged_module(graph, _weights(graph))(u)
    assert list(merged) == ["near", "far"]
    assert torch.equal(merged["near"], near(a(u)))
    assert torch.equal(merged["far"], far(a(u)))


def test_merged_readout_with_state_and_output():
    a, r, out = layer(3, 4, 0), layer(4, 3, 1), linear(3, 2, 2)
    graph = Graph([spec("a", "u", module=a), readout("r", "a", module=r, state=True, output=out)])
    merged = merged_module(graph, _weights(graph))
    u = noise(0, 5, 3)
    assert torch.equal(merged(u), out(r(a(u))))
    assert list(merged.state_dict()) == [
        "blocks.a.module.0.weight",
        "blocks.a.module.0.bias",
        "blocks.r.module.0.weight",
        "blocks.r.module.0.bias",
        "blocks.r.output.weight",
        "blocks.r.output.bias",
    ]


def test_merged_cycle_is_at_its_fixed_point():
    """a = tanh(A [u, b]), b = tanh(B a), with small weights: a contraction. Oracle: iterate."""
    a, b, r = layer(3 + 4, 5, 0), layer(5, 4, 1), linear(4, 2, 2)
    with torch.no_grad():
        for p in [*a.parameters(), *b.parameters()]:
            p.mul_(0.5)
    graph = Graph(
        [
            spec("a", "u", "b", module=a),
            spec("b", "a", module=b, shape=(4,)),
            readout("r", "b", module=r),
        ]
    )
    u = noise(0, 5, 3)
    h = torch.zeros(5, 4, dtype=F64)
    for _ in range(300):
        h = b(a(torch.cat([u, h], -1)))
    assert torch.allclose(b(a(torch.cat([u, h], -1))), h, atol=1e-14)  # it is fixed
    assert h.abs().max() > 0.1
    torch.testing.assert_close(
        merged_module(graph, _weights(graph))(u), r(h), rtol=1e-12, atol=1e-12
    )


def test_merged_cycle_behind_an_embedding():
    """The input's integers are no dtype for a state."""
    words = nn.Embedding(6, 3, dtype=F64)
    a, b, r = layer(3 + 4, 4, 0), layer(4, 4, 1), linear(4, 2, 2)
    graph = Graph(
        [
            spec("words", "u", module=words),
            spec("a", "words", "b", module=a),
            spec("b", "a", module=b, shape=(4,)),
            readout("r", "b", module=r),
        ]
    )
    out = merged_module(graph, _weights(graph))(torch.tensor([1, 2]))
    assert out.dtype is F64


def test_merge_puts_changed_weights_and_buffers_in_their_places():
    norm = nn.Sequential(linear(3, 4, 0), nn.BatchNorm1d(4, dtype=F64))
    graph = Graph([spec("a", "u", module=norm), readout("r", "a", module=linear(4, 2, 1))])
    weights = _weights(graph)
    weights["a"]["1.running_mean"] = torch.arange(4, dtype=F64)
    weights["r"]["bias"] = torch.full((2,), 7.0, dtype=F64)
    state = merged_module(graph, weights).state_dict()
    assert torch.equal(state["blocks.a.module.1.running_mean"], torch.arange(4, dtype=F64))
    assert torch.equal(state["blocks.r.module.bias"], torch.full((2,), 7.0, dtype=F64))
    assert torch.equal(state["blocks.r.module.weight"], weights["r"]["weight"])


def test_copy_shares_no_storage():
    graph = Graph(
        [
            spec("a", "u", module=nn.Sequential(linear(3, 4, 0), nn.BatchNorm1d(4, dtype=F64))),
            readout("r", "a", module=layer(4, 3, 1), state=True, output=linear(3, 2, 2)),
        ]
    )
    other = graph.copy()

    def tensors(g):
        parts = [m for b in g.blocks.values() for m in (b.module, b.output) if m is not None]
        return [t for m in parts for t in m.state_dict().values()]

    before = [t.clone() for t in tensors(graph)]
    assert not {t.data_ptr() for t in tensors(graph)} & {t.data_ptr() for t in tensors(other)}
    for mine, theirs in zip(tensors(graph), tensors(other), strict=True):
        assert torch.equal(mine, theirs)
        theirs.fill_(-1)
    assert all(torch.equal(t, b) for t, b in zip(tensors(graph), before, strict=True))
    # merging shares none either
    merged = merged_module(graph, _weights(graph))
    for t in merged.state_dict().values():
        t.fill_(-1)
    assert all(torch.equal(t, b) for t, b in zip(tensors(graph), before, strict=True))
    assert [e.name for e in other.edges] == [e.name for e in graph.edges]
