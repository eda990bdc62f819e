"""Compressed signals in a run. Oracles: autograd with a rounding of our own between the layers; the
in-process engine; hand-written tables of what is compressed."""

from __future__ import annotations

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal
from runtime.networks import PortableStream, batches, chain, cycle_graph, skip_graph, stream
from torch import nn

import hamdist
from hamdist.config import Compress, EngineSettings, Settings, read_settings
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.schedule.events import Kind
from hamdist.errors import SettingsError
from hamdist.models.build import make_model
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.train.prepare import as_graph
from hamdist.runtime.train.train import train

F64 = torch.float64


def settings(items=40, level="trace", compress="int8", feedback="messages", **fields):
    engine = {"compress": compress, "feedback": feedback, **fields.pop("engine", {})}
    return Settings.model_validate({"steps": items, "level": level, "engine": engine, **fields})


def codecs(model, wanted, source=None):
    """What is compressed: 'fp16', 'int8', or 'int8+' with feedback, by edge and direction."""
    spec = (source or stream(2)).spec
    plan = make_plan(as_graph(model, wanted, spec, cross_entropy), wanted, spec)
    return {
        (c.edge, {Kind.STATE: "h", Kind.MESSAGE: "m"}.get(c.kind, c.kind)): c.codec.name.value
        + "+" * c.codec.feedback
        for c in plan.channels.all()
        if c.codec is not None
    }


class _Rounded(torch.autograd.Function):
    """int8 by rows, written down once more: on the way forward h, on the way back the message, to
    which the last message's error is added."""

    @staticmethod
    def rounded(x):
        scale = x.abs().max(dim=1, keepdim=True).values / 127
        return torch.round(x / scale) * scale

    @staticmethod
    def forward(ctx, x, owed):
        ctx.owed = owed
        return _Rounded.rounded(x)

    @staticmethod
    def backward(ctx, message):
        if ctx.owed is None:
            return _Rounded.rounded(message), None
        v = message + ctx.owed.get("e", 0)
        sent = _Rounded.rounded(v)
        ctx.owed["e"] = v - sent
        return sent, None


@pytest.mark.parametrize("feedback", ["off", "messages"])
def test_backprop_equals_autograd_with_rounding_between_the_layers(feedback):
    items = [(u.double(), y) for u, y in batches(20)]
    start = chain().double()
    found = train(
        chain().double(),
        stream_of(items),
        settings(20, "backprop", feedback=feedback, learning={"lr": 0.1}, dtype="float64"),
    )
    layers = [nn.Sequential(*list(start)[i : i + 2]) for i in range(0, 9, 2)]
    optimiser = torch.optim.SGD(start.parameters(), lr=0.1)
    owed = [{} if feedback == "messages" else None for _ in layers]
    for u, y in items:
        h = u
        for i, layer in enumerate(layers):
            h = layer(h if i == 0 else _Rounded.apply(h, owed[i]))
        optimiser.zero_grad()
        cross_entropy(h, y).backward()
        optimiser.step()
    plain = train(chain().double(), stream_of(items), settings(20, "backprop", "none"))
    for key, value in start.state_dict().items():
        assert (found.model.state_dict()[key] - value).abs().max() < 1e-12
        assert (found.model.state_dict()[key] - plain.model.state_dict()[key]).abs().max() > 1e-6


def stream_of(items):
    from hamdist.streams import from_iterable

    return from_iterable(items, classes=3)


@pytest.mark.parametrize("level", ["trace", "local"])
def test_none_is_no_setting(level):
    def run(engine):
        wanted = Settings.model_validate({"steps": 30, "level": level, "engine": engine})
        return train(chain(), stream(30), wanted)

    plain = run({})
    for engine in ({"compress": "none"}, {"compress": {"*": "none"}, "feedback": "on"}):
        assert_equal(plain, run(engine))
    assert plain.compression == {}


@pytest.mark.ray
@pytest.mark.parametrize(
    ("fields", "engine"),
    [
        ({"level": "trace"}, {"compress": "int8", "feedback": "on", "actors": 3}),
        (
            {"level": "local"},
            {
                "compress": "int8",
                "feedback": "on",
                "placement": [["block0", "block3"], ["block1", "block4"], ["block2"]],
            },
        ),
        (
            {"level": "trace", "partition": {"delay": 3}},
            {"compress": "int8", "actors": 2, "transport": "tcp"},
        ),
        (
            {"level": "local"},
            {
                "compress": {
                    "block0->*": "topk",
                    "block2->*": "int4",
                    "block3->*": "codebook",
                    "*": "delta",
                },
                "topk_share": 0.3,
                "actors": 2,
            },
        ),
        ({"level": "backprop"}, {"compress": {"*": "fp16", "block0->block1": "bf16"}, "actors": 2}),
        (
            {
                "level": "pipeline",
                "locality": {"microbatches": 3},
                "partition": {"delay": 2, "slices": {"block2": 2}},
            },
            {
                "compress": {"block0->*": "codebook", "*": "delta"},
                "feedback": "on",
                "actors": 3,
            },
        ),
    ],
    ids=["pulse", "hold", "bundles", "below a byte", "halves", "micro-batches"],
)
def test_chain(session, leaves_no_socket, fields, engine):
    """A missing target, and where a pulse passes an uneven last batch."""
    last = 4 if fields["level"] == "local" else 2
    alone, spread = both(chain, lambda: PortableStream(41, missing={3}, last=last), engine, fields)
    assert_equal(alone, spread)
    assert alone.compression == spread.compression != {}
    plain: dict[str, object] = {}
    exact = run_of(chain, PortableStream(41, missing={3}, last=last), plain, fields)
    assert not torch.equal(
        exact.blocks["block0"].theta["0.weight"], alone.blocks["block0"].theta["0.weight"]
    )


def both(model, source, engine, fields):
    """The same run in one process and on Ray."""
    alone = run_of(model, source(), {**engine, "kind": "inprocess", "actors": "auto"}, fields)
    return alone, run_of(model, source(), {**engine, "kind": "ray"}, fields)


def run_of(model, source, engine, fields):
    return train(
        model(),
        source,
        Settings.model_validate({"steps": 41, "seed": 5, "engine": engine, **fields}),
    )


def narrow():
    """A chain whose states leave the first three layers in 3 dimensions of 8."""
    layers = list(chain())
    ends = [hamdist.Subspace(8, 3, seed=1) if i in (1, 3, 5) else nn.Identity() for i in range(9)]
    return nn.Sequential(*(m for pair in zip(layers, ends, strict=True) for m in pair))


@pytest.mark.ray
def test_subspaces(session):
    compress = {"block0->*": "subspace", "block1->*": "delta", "*": "int4"}
    alone, spread = both(
        narrow,
        lambda: PortableStream(41, missing={3}, last=2),
        {"compress": compress, "actors": 2},
        {"level": "trace"},
    )
    assert_equal(alone, spread)
    # rows of 8 float32: 3 coefficients of 4 bytes; 3 of half a byte, rounded up, and a scale; 8
    sent = {e: [w.sent for w in ways.values()] for e, ways in spread.compression.items()}
    rows = 40 * 4 + 2
    assert sent["block0->block1"] == [12 * rows, 12 * (rows - 4)]
    assert sent["block1->block2"] == [4 * rows, 4 * (rows - 4)]
    assert sent["block3->block4"] == [6 * rows, 6 * (rows - 4)]


@pytest.mark.ray
@pytest.mark.parametrize("model", [skip_graph, cycle_graph])
def test_graphs(session, model):
    engine = {"compress": "int8", "feedback": "on", "actors": 2}
    alone, spread = both(model, lambda: PortableStream(41), engine, {"level": "local"})
    assert_equal(alone, spread)
    assert alone.compression == spread.compression != {}


def test_every_child_has_errors_of_its_own():
    """Two edges of one parent: each codec's numbers, and bytes, stand for themselves."""
    wanted = settings(10, "trace", {"a->b": "fp16", "a->c": "int8"})
    done = train(skip_graph(), stream(10), wanted).compression
    assert {e: {w: c.codec for w, c in ways.items()} for e, ways in done.items()} == {
        "a->b": {"h": "fp16", "m": "fp16"},
        "a->c": {"h": "int8", "m": "int8"},
    }
    # batches of 4 rows of 5 float32: 20 bytes a row, as fp16 10, as int8 and a scale 9
    assert [(c.sent, c.saved) for c in done["a->b"].values()] == [(400, 400)] * 2
    assert [(c.sent, c.saved) for c in done["a->c"].values()] == [(360, 440)] * 2


def test_bytes_of_an_edge_are_those_that_were_sent():
    done = train(chain(), stream(10), settings(10))
    for edge, ways in done.compression.items():
        assert done.bytes_per_edge[edge] == sum(c.sent for c in ways.values())
    plain = train(chain(), stream(10), settings(10, compress="none"))
    for edge, ways in done.compression.items():
        assert plain.bytes_per_edge[edge] == sum(c.sent + c.saved for c in ways.values())


BETWEEN = [f"block{i}->block{i + 1}" for i in range(4)]


@pytest.mark.parametrize(
    ("compress", "feedback", "expected"),
    [
        ("none", "on", {}),
        ("fp16", "on", {(e, w): "fp16" for e in BETWEEN for w in "hm"}),
        ("int8", "off", {(e, w): "int8" for e in BETWEEN for w in "hm"}),
        ("int8", "on", {(e, w): "int8+" for e in BETWEEN for w in "hm"}),
        ("int8", "states", {(e, w): f"int8{'+' * (w == 'h')}" for e in BETWEEN for w in "hm"}),
        ("int8", "messages", {(e, w): f"int8{'+' * (w == 'm')}" for e in BETWEEN for w in "hm"}),
        (
            {"block[12]->*": "bf16", "block2->block3": "fp16", "u->*": "int8"},
            "off",
            {
                ("u->block0", "h"): "int8",
                ("block1->block2", "h"): "bf16",
                ("block1->block2", "m"): "bf16",
                ("block2->block3", "h"): "fp16",
                ("block2->block3", "m"): "fp16",
            },
        ),
    ],
)
def test_names_go_before_patterns(compress, feedback, expected):
    assert codecs(chain(), settings(compress=compress, feedback=feedback)) == expected


@pytest.mark.parametrize(
    ("compress", "words"),
    [
        (
            {"block0->block2": "int8"},
            "engine.compress.block0->block2: no such edge; known: u->block0, block0->block1",
        ),
        ({"block9*": "fp16", "*": "int8"}, "block9\\*: no such edge"),
        ({"*": "fp16", "u->*": "none"}, "u->\\*: every edge that it fits .* list it earlier"),
    ],
)
def test_wrong_edges(compress, words):
    with pytest.raises(SettingsError, match=words):
        train(chain(), stream(2), settings(2, compress=compress))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("engine: {compress: int2}", "engine.compress: .*'none', 'fp16', .* or 'subspace'.*'int2'"),
        ("engine: {topk_share: 0}", "engine.topk_share"),
        ("engine: {compress: {a->b: zip}}", "'zip'"),
        (
            "model: {subspace: 200, kind: gpt}",
            "'subspace' is 200 with .* width 128",
        ),
        ("model: {subspace: {1: 9}, kind: residual-mlp, width: 8}", "'subspace' is .*9.* width 8"),
        ("model: {subspace: {}, kind: gpt}", "'subspace' is {}"),
        ("model: {subspace: 2, kind: lstm}", "model: 'subspace' is 2 with kind 'lstm'"),
        ("engine: {feedback: some}", "engine.feedback: .*'some'"),
    ],
)
def test_wrong_words(text, words):
    with pytest.raises(SettingsError, match=words):
        read_settings(text, "here")


def test_off_is_off_as_yaml_reads_it():
    read = read_settings("engine: {compress: {'*': int8}, feedback: off}", "here").engine
    assert (read.feedback.value, read.compress) == ("off", {"*": Compress.INT8})
    assert EngineSettings().compress is Compress.NONE


def test_states_that_are_handed_back_are_exact():
    def run(compress):
        wanted = Settings.model_validate(
            {
                "steps": 4,
                "level": "reversible",
                "model": {"kind": "reversible-mlp", "width": 8, "depth": 4},
                "engine": {"compress": compress},
            }
        )
        model = make_model(wanted.model, stream(4).spec, seed=0, dtype=torch.float32)
        return train(model, stream(4), wanted)

    with pytest.raises(SettingsError, match="'block1' back.*set this edge to 'none'"):
        run("int8")
    assert set(run({"block0->*": "int8"}).compression) == {"block0->block1"}


def test_integers_stay_as_they_are():
    tokens = [(torch.randint(9, (4, 5)), torch.zeros(4, dtype=torch.int64)) for _ in range(3)]
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(30, 3))
    found = codecs(model, settings(compress={"*": "int8"}), stream_of(tokens))
    assert found
    assert all(not edge.startswith("u->") for edge, _ in found)
    with pytest.raises(SettingsError, match="compress.u->block0: 'delta', but .* integers .int64"):
        codecs(model, settings(compress={"u->block0": "delta"}), stream_of(tokens))


def in_subspace(level="trace", dtype="float32", compress="subspace", rank=3, **fields):
    return settings(
        20,
        level,
        compress,
        dtype=dtype,
        model={"kind": "residual-mlp", "width": 8, "depth": 4, "subspace": rank},
        **fields,
    )


def made(wanted):
    dtype = getattr(torch, wanted.dtype)
    return make_model(wanted.model, stream(2).spec, seed=1, dtype=dtype)


def test_a_network_within_a_subspace_loses_nothing():
    """Weights as without compression, to round-off, for 3 numbers instead of 8 on each edge."""
    items = [(u.double(), y) for u, y in batches(20)]
    runs = [
        train(made(wanted), stream_of(items), wanted)
        for wanted in (in_subspace(dtype="float64", compress=c) for c in ("none", "subspace"))
    ]
    exact, sent = runs
    start = made(in_subspace(dtype="float64")).state_dict()
    for key, value in exact.model.state_dict().items():
        assert (sent.model.state_dict()[key] - value).abs().max() < 1e-12
        assert ("projection" in key) == torch.equal(value, start[key])
    for edge in ("block0->block1", "block2->block3"):
        assert 8 * sent.bytes_per_edge[edge] == 3 * exact.bytes_per_edge[edge]


def test_a_subspace_behind_one_layer():
    """Of four layers the second alone ends in it, whose edge has 3 numbers for 8."""
    compress = {"block1->block2": "subspace"}
    wanted = in_subspace(rank={1: 3}, compress=compress)
    model = made(wanted)
    found = [name for name, m in model.named_modules() if isinstance(m, hamdist.Subspace)]
    assert found == ["1.1"]
    whole = made(in_subspace(rank=None))
    assert torch.equal(model[1][0].linear.weight, whole[1].linear.weight)
    nbytes = train(model, stream_of(batches(20)), wanted).bytes_per_edge
    assert 8 * nbytes["block1->block2"] == 3 * nbytes["block0->block1"]
    assert nbytes["block0->block1"] == nbytes["block2->block3"]
    with pytest.raises(SettingsError, match=r"no layer '3' in front .* the layers are 0, 1, 2"):
        made(in_subspace(rank={3: 2}))


def test_a_block_that_ends_in_no_subspace():
    with pytest.raises(SettingsError, match="on block0->block1, but block 'block0' does not end"):
        train(chain(), stream(2), settings(2, compress="subspace"))


def test_nothing_to_compress_is_told():
    one = settings(2, partition={"blocks": 1})
    with pytest.warns(UserWarning, match="compresses nothing: no edge joins two blocks"):
        train(chain(), stream(2), one)
