"""Networks of images and texts. Oracles: their formulas; torch.optim.SGD on the uncut and unsliced
network in float64; the in-process engine, to the bit."""

from __future__ import annotations

import math
import re
from importlib.resources import files
from itertools import islice

import pytest
import torch
from dynamics.helpers import F64, relative, settings, sgd
from fashion_files import write_fashion
from runtime.engines.test_engines_equal import assert_equal
from torch import nn
from torch.nn import functional

from hamdist.config import ModelKind, ModelSettings, Source, StreamSettings, parse_override
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.errors import SettingsError
from hamdist.models.build import make_model
from hamdist.models.networks import NETWORKS
from hamdist.runtime.train.train import train
from hamdist.streams import make_stream
from hamdist.streams.sample import SampleSpec
from hamdist.study.shared.recipes import load_settings

IMAGES = {"source": "digits"}
CHARACTERS = {"source": "characters", "characters": {"length": 6}}
SENTENCES = {"source": "sequences", "sequences": {"view": "sequences", "count": 40, "length": 7}}

# Small ones: model, stream, and the blocks that are sliced, of three blocks cut at CUTS.
SMALL = {
    "resnet": ({"width": 2, "depth": 4}, IMAGES, {"block0": 2, "block1": 2}),
    "convnet": ({"width": 2, "depth": 3}, IMAGES, {"block0": 2, "block1": 2}),
    "lenet": ({}, {**IMAGES, "canvas": {"side": 12}}, {"block0": 2, "block2": 2}),
    "vit": ({"width": 6, "depth": 3, "heads": 3, "patch": 4}, IMAGES, {"block*": 3}),
    "gpt": ({"width": 6, "depth": 3, "heads": 3}, CHARACTERS, {"block1": 2, "block2": 3}),
    "lstm-layers": ({"width": 5, "depth": 3}, SENTENCES, {"block1": 3, "block2": 2}),
}
CUTS = ["layer1", "layer2"]


def stream_of(kind, batch=3, dtype=F64):
    own = StreamSettings.model_validate({**SMALL[kind][1], "batch": batch})
    return make_stream(own, seed=2, dtype=dtype)


def build(kind, seed=1, dtype=F64, **fields):
    own = ModelSettings.model_validate({**SMALL[kind][0], "kind": kind, **fields})
    return make_model(own, stream_of(kind, dtype=dtype).spec, seed=seed, dtype=dtype)


def shaken(model):
    """With biases, so that a forgotten one shows."""
    for n, p in enumerate(model.parameters()):
        if not p.any():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(n))
    return model


# -- formulas --------------------------------------------------------------------------------------


def normed(h, axes):
    mean = h.mean(axes, keepdim=True)
    return (h - mean) / torch.sqrt((h - mean).square().mean(axes, keepdim=True) + 1e-3)


def resnet(p, u):
    image = (1, 2, 3)
    h = functional.conv2d(
        u.reshape(-1, 1, 8, 8), p["stem.conv.weight"], p["stem.conv.bias"], stride=2, padding=1
    )
    for i in range(4):
        w = {k.removeprefix(f"layer{i}."): v for k, v in p.items() if k.startswith(f"layer{i}.")}
        stride = 2 if i else 1
        a = functional.conv2d(
            normed(h, image).relu(), w["conv1.weight"], w["conv1.bias"], stride, padding=1
        )
        b = functional.conv2d(a.relu(), w["conv2.weight"], w["conv2.bias"], padding=1)
        skip = functional.conv2d(h, w["skip.weight"], w["skip.bias"], stride) if i else h
        h = skip + b / math.sqrt(4)
    return normed(h, image).mean((2, 3)) @ p["head.linear.weight"].T + p["head.linear.bias"]


def convnet(p, u):
    h = functional.conv2d(
        u.reshape(-1, 1, 8, 8), p["stem.conv.weight"], p["stem.conv.bias"], stride=2, padding=1
    ).relu()
    for i in range(3):
        w = {k.removeprefix(f"layer{i}."): v for k, v in p.items() if k.startswith(f"layer{i}.")}
        stride = 1 if i else 2
        a = functional.conv2d(
            normed(h, (1, 2, 3)), w["conv.weight"], w["conv.bias"], stride, padding=1
        )
        skip = h if i else functional.conv2d(h, w["skip.weight"], w["skip.bias"], stride)
        h = skip + a.relu() / math.sqrt(5)
    rows = normed(h, (1, 2, 3)).flatten(1)
    return rows @ p["head.linear.weight"].T + p["head.linear.bias"]


def lenet(p, u):
    h = u.reshape(-1, 1, 12, 12)
    for name, padding in (("stem", 2), ("layer0", 0)):
        h = functional.conv2d(h, p[f"{name}.conv.weight"], p[f"{name}.conv.bias"], padding=padding)
        b, c, side, _ = h.shape
        h = h.relu().reshape(b, c, side // 2, 2, side // 2, 2).amax((3, 5))
    whole = p["layer1.conv.weight"]
    h = (h.flatten(1) @ whole.flatten(1).T + p["layer1.conv.bias"]).relu()
    h = h @ p["layer2.weight"].T + p["layer2.bias"]
    return h @ p["head.weight"].T + p["head.bias"]


def attention(w, h, heads, causal):
    """By head, row by row of the scores."""
    qkv = h @ w["mix.qkv.weight"].T + w["mix.qkv.bias"]
    size = h.shape[2]
    d = size // heads
    found = torch.zeros_like(h)
    for a in range(heads):
        q, k, v = (qkv[..., n * size + a * d : n * size + (a + 1) * d] for n in range(3))
        for t in range(h.shape[1]):
            seen = t + 1 if causal else h.shape[1]
            scores = (k[:, :seen] * q[:, t : t + 1]).sum(2) / math.sqrt(d)
            shares = (scores.exp() / scores.exp().sum(1, keepdim=True)).unsqueeze(2)
            found[:, t, a * d : (a + 1) * d] = (shares * v[:, :seen]).sum(1)
    return found @ w["mix.project.weight"].T + w["mix.project.bias"]


def recurrence(w, h):
    """Token by token."""
    cell = nn.LSTMCell(5, 5, dtype=F64)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(cell, name).data.copy_(w[f"mix.lstm.{name}_l0"])
    state, found = None, []
    for t in range(h.shape[1]):
        state = cell(h[:, t], state)
        found.append(state[0])
    return torch.stack(found, 1)


def tokens(p, h, mix):
    alpha = 1 / math.sqrt(2 * 3)
    for i in range(3):
        w = {k.removeprefix(f"layer{i}."): v for k, v in p.items() if k.startswith(f"layer{i}.")}
        h = h + alpha * mix(w, normed(h, (2,)))
        inner = normed(h, (2,)) @ w["up.weight"].T + w["up.bias"]
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        h = h + alpha * (inner @ w["down.weight"].T + w["down.bias"])
    return normed(h, (2,))


def vit(p, u):
    tiles = [
        u.reshape(-1, 8, 8)[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].reshape(-1, 16)
        for i in range(2)
        for j in range(2)
    ]
    h = torch.stack(tiles, 1) @ p["patches.project.weight"].reshape(6, 16).T
    h = h + p["patches.project.bias"] + p["patches.place"]
    h = tokens(p, h, lambda w, h: attention(w, h, 3, causal=False)).mean(1)
    return h @ p["head.linear.weight"].T + p["head.linear.bias"]


def gpt(p, u):
    h = p["embedding.embedding.weight"][u] + p["embedding.place"]
    h = tokens(p, h, lambda w, h: attention(w, h, 3, causal=True))
    return h @ p["head.linear.weight"].T + p["head.linear.bias"]


def lstm_layers(p, u):
    h = tokens(p, p["embedding.weight"][u], recurrence)[:, -1]
    return h @ p["head.linear.weight"].T + p["head.linear.bias"]


FORMULAS = {
    "resnet": resnet,
    "convnet": convnet,
    "lenet": lenet,
    "vit": vit,
    "gpt": gpt,
    "lstm-layers": lstm_layers,
}


@pytest.mark.parametrize("kind", SMALL)
def test_formulas(kind):
    assert {k.value for k in NETWORKS} == set(SMALL)
    model = shaken(build(kind))
    u = next(stream_of(kind).samples()).u
    expected = FORMULAS[kind](model.state_dict(), u)
    torch.testing.assert_close(model(u), expected, rtol=1e-12, atol=1e-12)


def test_a_sequence_of_rows_of_numbers():
    spec = SampleSpec((3, 7, 2), F64, (3,), torch.int64, classes=4)
    own = ModelSettings(kind=ModelKind.LSTM_LAYERS, width=5, depth=3)
    model = shaken(make_model(own, spec, seed=1, dtype=F64))
    u = torch.randn(3, 7, 2, dtype=F64, generator=torch.Generator().manual_seed(2))
    p = model.state_dict()
    h = tokens(p, u @ p["embedding.weight"].T + p["embedding.bias"], recurrence)[:, -1]
    expected = h @ p["head.linear.weight"].T + p["head.linear.bias"]
    torch.testing.assert_close(model(u), expected, rtol=1e-12, atol=1e-12)


def test_targets_at_every_token_or_at_the_last_one():
    last = SampleSpec((3, 6), torch.int64, (3,), torch.int64, classes=4, tokens=97)
    each = SampleSpec((3, 6), torch.int64, (3, 6), torch.int64, classes=4, tokens=97)
    for kind in (ModelKind.GPT, ModelKind.LSTM_LAYERS):
        own = ModelSettings(kind=kind, width=8, depth=1)
        one, many = (make_model(own, s, seed=0, dtype=F64) for s in (last, each))
        u = torch.arange(18).reshape(3, 6)
        torch.testing.assert_close(one(u), many(u)[:, -1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SMALL)
def test_the_seed_decides(kind):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    models = [build(kind, seed) for seed in (0, 0, 1)]
    single = build(kind, 0, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (nn.utils.parameters_to_vector(m.parameters()) for m in models)
    assert torch.equal(first, same)
    assert relative([first], [other]) > 0.1
    assert torch.equal(nn.utils.parameters_to_vector(single.parameters()), first.float())


def test_variances():
    spec = SampleSpec((1, 784), torch.float32, (1,), torch.int64, classes=300)
    own = ModelSettings(kind=ModelKind.RESNET, width=32, depth=4)
    found = dict(make_model(own, spec, seed=3, dtype=F64).named_parameters())
    gains = {"layer1.conv2": 2.0, "layer2.skip": 1.0, "layer3.conv1": 2.0, "head.linear": 1.0}
    for name, gain in gains.items():
        weight = found[f"{name}.weight"].detach()
        # the variance of n normal draws has the relative spread sqrt(2/n); 5 of them
        tolerance = 5 * math.sqrt(2 / weight.numel())
        assert float(weight.var()) * weight[0].numel() / gain == pytest.approx(1, abs=tolerance)


def test_weights_of_lenet_are_those_of_its_source():
    """Glorot and Bengio 2010, Eq. 16: uniform between -a and a, a^2 = 6 / (fan_in + fan_out)."""
    spec = SampleSpec((1, 784), torch.float32, (1,), torch.int64, classes=10)
    model = make_model(ModelSettings(kind=ModelKind.LENET), spec, seed=3, dtype=F64)
    fans = {"stem.conv": 175, "layer0.conv": 550, "layer1.conv": 3400, "layer2": 204, "head": 94}
    for name, fan in fans.items():
        weight = model.get_parameter(f"{name}.weight")
        limit = math.sqrt(6 / fan)
        assert 0.9 * limit < float(weight.abs().max()) <= limit
        assert float(weight.square().mean()) == pytest.approx(limit**2 / 3, rel=0.3)
        assert not model.get_parameter(f"{name}.bias").any()


def test_resnet_is_resnet_18_like():
    """Two layers by stage, channels times 1, 2, 4, 8."""
    spec = SampleSpec((1, 784), torch.float32, (1,), torch.int64, classes=10)
    own = ModelSettings(kind=ModelKind.RESNET, width=4, depth=8)
    model = make_model(own, spec, seed=0, dtype=F64)
    sides, h = [], torch.zeros(1, 784, dtype=F64)
    for child in list(model)[:-1]:
        h = child(h)
        sides.append(tuple(h.shape[1:]))
    stages = [(4, 14, 14), (8, 7, 7), (16, 4, 4), (32, 2, 2)]
    assert sides == [stages[0], *(s for s in stages for _ in range(2))]


# -- blocks and slices -----------------------------------------------------------------------------


def run(kind, level="backprop", steps=6, **sections):
    own = settings(level, steps=steps, learning={"lr": 0.1}, **sections)
    return train(build(kind), stream_of(kind), own)


@pytest.mark.parametrize("kind", SMALL)
def test_three_blocks_and_slices_are_sgd(kind):
    model, slices = build(kind), SMALL[kind][2]
    items = [(s.u, s.y) for s in islice(stream_of(kind).samples(), 6)]
    expected = sgd(model, items, cross_entropy, lr=0.1)
    assert relative(model.parameters(), expected.parameters()) > 1e-3, "nothing was learned"
    whole = run(kind, partition={"cuts": CUTS})
    assert list(whole.blocks) == ["block0", "block1", "block2"]
    spread = run(kind, partition={"cuts": CUTS, "slices": slices})
    assert len(spread.blocks) >= 5
    for result in (whole, spread):
        assert list(result.model.state_dict()) == list(expected.state_dict())
        assert relative(result.model.parameters(), expected.parameters()) <= 1e-12


@pytest.mark.ray
@pytest.mark.parametrize(  # (all of them on Ray: test_any_network_engines.py)
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] * (k in ("convnet", "lenet", "vit"))) for k in SMALL],
)
def test_engines_are_equal_with_slices_under_trace(session, kind):
    sections = {
        "level": "trace",
        "partition": {"cuts": CUTS, "slices": SMALL[kind][2]},
        "locality": {"compensation": "delay-scaled", "delay_power": 0.25},
    }
    alone = run(kind, **sections)
    spread = run(kind, engine={"kind": "ray", "actors": 2}, **sections)
    assert alone.staleness > 0
    assert_equal(alone, spread)


@pytest.mark.parametrize("name", ["resnet", "vit", "gpt", "lstm"])
def test_recipes_are_sliced_as_their_comments_say(name, tmp_path):
    text = (files("hamdist") / "recipes" / f"{name}.yaml").read_text("utf-8")
    (given,) = re.findall(r"^# .*--set (partition\.slices\.block\d=2)$", text, re.MULTILINE)
    few = {"stream": {"batch": 1}, "steps": 1, "engine": {"kind": "inprocess"}}
    own = load_settings(name, [few, parse_override(given)])
    if own.stream.source is Source.FASHION_MNIST:
        write_fashion(tmp_path)
        own = load_settings(name, [few, parse_override(given), {"stream": {"path": tmp_path}}])
    stream = make_stream(own.stream, seed=0, dtype=torch.float32)
    model = make_model(own.model, stream.spec, seed=0, dtype=torch.float32)
    result = train(model, stream, own)
    many = [n for n in result.blocks if "_" in n]
    assert {re.match(r"block\d", n)[0] for n in many} == {given[-8:-2]}
    known = {f"block{i}" for i in range(len(own.partition.cuts) + 1)}
    assert {re.match(r"block\d", n)[0] for n in result.blocks} == known


# -- what does not fit -----------------------------------------------------------------------------

ROWS = SampleSpec((2, 12), F64, (2,), torch.int64, classes=3)
WIDE = SampleSpec((2, 1, 8, 4), F64, (2,), torch.int64, classes=3)
PIXELS = SampleSpec((2, 64), F64, (2,), torch.int64, classes=3)
IDS = SampleSpec((2, 64), torch.int64, (2,), torch.int64, classes=3)
TOKENS = SampleSpec((2, 5), torch.int64, (2, 5), torch.int64, classes=9, tokens=9)


@pytest.mark.parametrize(
    ("kind", "spec", "fields", "message"),
    [
        ("resnet", ROWS, {}, r"model.kind: resnet takes square images .*shape \(2, 12\)"),
        ("vit", WIDE, {}, r"model.kind: vit takes square images .*\(2, 1, 8, 4\).*fashion-mnist"),
        ("resnet", IDS, {}, "resnet takes square images .*torch.int64"),
        ("vit", PIXELS, {"patch": 3}, "model.patch: 3 does not divide .*, 8"),
        ("vit", PIXELS, {"patch": 4, "heads": 3}, "model.heads: 3 does not divide model.width, 8"),
        ("gpt", TOKENS, {"heads": 5}, "model.heads: 5 does not divide model.width, 8"),
        ("gpt", PIXELS, {}, r"gpt takes tokens \(B, T\).*torch.float64.*'characters'"),
        ("lstm-layers", IDS, {}, r"lstm-layers takes tokens .*SampleSpec.tokens"),
    ],
)
def test_what_does_not_fit(kind, spec, fields, message):
    own = ModelSettings.model_validate({"kind": kind, "width": 8, "depth": 2, **fields})
    with pytest.raises(SettingsError, match=message):
        make_model(own, spec, seed=0, dtype=F64)
