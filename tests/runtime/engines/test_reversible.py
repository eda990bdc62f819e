"""Level `reversible`. Oracles: autograd with every activation stored, torch's SGD, level
`backprop`, an exact count of the bytes alive, numpy by the equations, the in-process engine."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from dynamics.helpers import F64, layer, linear, noise, relative, sgd
from harness.live_bytes import LiveBytes
from runtime.engines.test_engines_equal import assert_equal, both, learned
from runtime.networks import BATCH, CLASSES, FEATURES, PortableStream, seeded
from study.verify.oracles import leapfrog
from torch import nn

from hamdist.config import ModelKind, ModelSettings, Settings
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.modules.pairs import MeanHalf, SecondHalf, ToPair
from hamdist.dynamics.modules.reversible import Coupling, Midpoint, MidpointStart, Squeeze
from hamdist.dynamics.objective.losses import mse
from hamdist.errors import LevelError
from hamdist.models.build import make_model
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable
from hamdist.study.verify.topics import reversible as verify

N = 4


def midpoint(depth: int, tau: float = 0.05) -> nn.Sequential:
    """All steps with one f, in one block."""
    return nn.Sequential(
        linear(2, N, 0), Midpoint(layer(N, N, 1), depth, tau), SecondHalf(), linear(N, 3, 2)
    )


def steps(depth: int, tau: float = 0.05) -> nn.Sequential:
    """Each step a child of its own."""
    first = MidpointStart(layer(N, N, 1), tau)
    others = [Coupling(layer(N, N, k), 2 * tau) for k in range(2, depth + 1)]
    return nn.Sequential(linear(2, N, 0), first, *others, MeanHalf(), linear(N, 3, 99))


def couplings(depth: int) -> nn.Sequential:
    stem = nn.Sequential(linear(2, N, 0), ToPair())
    parts = [
        Coupling(nn.Sequential(nn.LayerNorm(N, dtype=F64), *layer(N, N, k)), 0.3)
        for k in range(depth)
    ]
    return nn.Sequential(stem, *parts, linear(2 * N, 3, 99))


def images(depth: int) -> nn.Sequential:
    """A small RevNet: halves of its channels are coupled by convolutions; half-way a squeeze."""

    def conv(channels, seed):
        made = nn.Conv2d(channels, channels, 3, padding=1, dtype=F64)
        made.weight.data = noise(seed, *made.weight.shape) / (3 * channels**0.5)
        made.bias.data = noise(seed + 500, channels) / 5
        norm = nn.GroupNorm(1, channels, dtype=F64)
        return Coupling(nn.Sequential(norm, nn.ReLU(inplace=True), made), 0.3)

    stem = nn.Sequential(linear(2, 32, 0), nn.Unflatten(1, (2, 4, 4)))
    half = depth // 2
    parts = [conv(1, k) for k in range(half)]
    parts += [Squeeze(), *(conv(4, k) for k in range(half, depth))]
    return nn.Sequential(stem, *parts, nn.Flatten(), linear(32, 3, 99))


MODELS = {"midpoint": midpoint, "steps": steps, "couplings": couplings, "images": images}


def items(count, batch=3):
    return list(zip(noise(7, count, batch, 2), noise(8, count, batch, 3), strict=True))


def run(model, data, level="reversible", **fields):
    settings = {"level": level, "loss": "mse", "dtype": "float64", **fields}
    stream = from_iterable(copy.deepcopy(data))
    return train(model, stream, Settings.model_validate(settings))


def gradients(result) -> dict:
    return {k: g for block in result.blocks.values() for k, g in block.omega.items()}


# -- gradients and weights ------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_gradients_at_depth_100_are_those_of_autograd(name):
    model = MODELS[name](100)
    ((u, y),) = data = items(1)
    found = gradients(run(model, data, learning={"lr": 0.0}))
    mse(model(u), y).backward()
    exact = {key: p.grad for key, p in model.named_parameters()}
    assert found.keys() == exact.keys()
    for key, grad in exact.items():
        assert relative([found[key]], [grad]) <= 1e-10, key
        assert float(grad.norm()) > 1e-4, key


@pytest.mark.filterwarnings("ignore:.*has invertible parts but keeps")
@pytest.mark.parametrize(
    ("partition", "blocks"), [({}, 42), ({"blocks": 5}, 5), ({"cuts": ["1", "41"]}, 3)]
)
def test_training_is_that_of_sgd_in_any_cut(partition, blocks):
    """A block per step; five blocks; one block of forty steps."""
    model = steps(40)
    data = [*items(20), (noise(9, 3, 2), None), *items(2)]
    fields = {
        "learning": {"lr": 0.05, "momentum": 0.4, "decay": "linear"},
        "steps": len(data),
        "partition": partition,
    }
    found = run(model, data, **fields)
    stored = run(model, data, "backprop", **fields)
    exact = sgd(model, data, mse, lr=0.05, momentum=0.4, decay_over=len(data))
    assert found.blocks.keys() == stored.blocks.keys()
    assert len(found.blocks) == blocks
    for key, weight in exact.named_parameters():
        for result in (found, stored):
            apart = (result.model.get_parameter(key) - weight).abs().max()
            assert float(apart.detach()) <= 1e-10, key
    assert relative(exact.parameters(), model.parameters()) > 0.05
    assert [w.loss for w in found.windows[next(reversed(found.blocks))]] == pytest.approx(
        [w.loss for w in stored.windows[next(reversed(stored.blocks))]], rel=1e-12
    )
    assert {name: block.updates for name, block in found.blocks.items()} == {
        name: len(data) for name in found.blocks
    }


def test_other_constants_than_those_of_gradient_descent():
    """tau and c beside 1, phi, eta of a run, at both levels."""
    dynamics = {"tau": 0.3, "c": 1 / 0.3, "phi": 0.7, "eta_omega": 0.5, "beta": 0.2}
    model, data = steps(10), items(6)
    found, stored = (
        run(model, data, level, dynamics=dynamics) for level in ("reversible", "backprop")
    )
    for name, block in stored.blocks.items():
        for part in ("theta", "omega"):
            pairs = getattr(found.blocks[name], part), getattr(block, part)
            assert relative(*(p.values() for p in pairs)) <= 1e-12 or not pairs[0], (name, part)


def test_the_costate_of_the_first_state():
    """dL/dh_0 stands in the block in front, which is a mere entrance here."""
    chain = Midpoint(layer(2, 2, 1), 30, 0.1)
    graph = Graph(
        [
            BlockSpec("start", nn.Identity(), ("u",)),
            BlockSpec("chain", chain, ("start",)),
            BlockSpec("end", nn.Sequential(SecondHalf(), linear(2, 3, 2)), ("chain",), loss=mse),
        ]
    )
    ((u, y),) = data = items(1)
    result = run(graph, data)
    h_0 = u.clone().requires_grad_()
    mse(graph.blocks["end"].module(chain(h_0)), y).backward()
    assert relative([result.blocks["start"].z], [h_0.grad]) <= 1e-12
    # A reversible block keeps neither.
    assert result.blocks["chain"].h is None
    assert result.blocks["chain"].z is None


def test_a_reversible_block_that_reads_the_input():
    def model():
        return nn.Sequential(Midpoint(layer(2, 2, 1), 10, 0.1), SecondHalf(), linear(2, 3, 2))

    data = items(5)
    found = run(model(), data, learning={"lr": 0.1})
    exact = sgd(model(), data, mse, lr=0.1)
    assert relative(found.model.parameters(), exact.parameters()) <= 1e-12


def test_several_readouts_and_rows():
    """Two rows of reversible blocks from one stem; one readout reads both, one reads one."""
    rows = [Coupling(layer(N, N, k)) for k in range(3)]

    def graph(parts):
        a, b, c = parts
        return Graph(
            [
                BlockSpec("s", linear(2, 2 * N, 9), ("u",)),
                BlockSpec("a", a, ("s",)),
                BlockSpec("b", b, ("a",), delays={"a": 3}),
                BlockSpec("c", c, ("s",)),
                BlockSpec("y", linear(4 * N, 3, 10), ("b", "c"), loss=mse),
                BlockSpec("w", linear(2, 3, 11), ("u",), loss=mse),
            ]
        )

    data = items(6)
    found = run(graph(rows), data, learning={"lr": 0.3})
    stored = run(graph(rows), data, "backprop", learning={"lr": 0.3})
    for name, block in stored.blocks.items():
        pairs = found.blocks[name].theta.values(), block.theta.values()
        assert relative(*pairs) <= 1e-13, name


# -- memory ---------------------------------------------------------------------------------------


def peak(model, level, **fields):
    live = LiveBytes(p.shape for p in model.parameters())
    with live:
        run(model, items(2, batch=5), level, **fields)
    return live.peak


@pytest.mark.parametrize("form", ["one block", "a block per step"])
def test_memory_does_not_grow_with_the_depth(form):
    def model(depth):
        return midpoint(depth) if form == "one block" else steps(depth)

    peak(model(5), "reversible")  # (the first run of a process looks at its arithmetic)
    few, many = peak(model(5), "reversible"), peak(model(60), "reversible")
    assert few == many
    state = 2 * N * 5 * 8
    # The ends of the network are not reversible: they keep a record for use again, one state more;
    # and the metrics keep guesses and targets that they have not counted yet. The first sample, on
    # which the model was tried, is kept. The C code of the ends fills what it keeps of a pass, the
    # costates twice, up to 64 bytes of the smaller type (16 numbers).
    first_frame, filled = 5 * (2 + 3) * 8, 2 * 2 * 15 * 8
    assert many <= 11 * state + first_frame + filled
    # What is stored otherwise: at least the state of every step.
    assert peak(model(60), "backprop") - peak(model(5), "backprop") >= 55 * state


def test_a_block_keeps_nothing_between_its_passes():
    """Neither a tensor nor a saved activation, while the sample is further on."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        stream = from_iterable([(u, None) for u, _ in items(3)], outputs=3)  # forward alone
        train(midpoint(50), stream, Settings(level="reversible", loss="mse", dtype="float64"))
    steps_of_f = [t for t in saved if t.shape == (N, N)]
    assert not steps_of_f
    assert saved  # the stem and the head do save


# -- refusals and warnings ------------------------------------------------------------------------


def test_an_ordinary_network_is_refused():
    model = nn.Sequential(*layer(2, 4, 0), *layer(4, 4, 1), linear(4, 3, 2))
    with pytest.raises(LevelError, match=r"'block1' \(Linear, Tanh\) is h' = f\(h\) \(HL Eq. 9\)"):
        run(model, items(1))
    with pytest.raises(LevelError, match="presentation 'hold': .*when a message comes back"):
        run(steps(3), items(1), locality={"presentation": "hold", "memory": "reversible"})


def petra(model, data, lr):
    """PETRA (Rivaud et al. 2024) by hand: stem, couplings, head, a sample a tick. A coupling keeps
    nothing: it takes its output back and undoes its map with the weights of then."""
    stem, *maps, head = (copy.deepcopy(part) for part in model)
    D = len(maps) + 1
    h, kept, back = {}, {}, {}

    def step(part, x, output, z):
        weights = list(part.parameters())
        dx, *g = torch.autograd.grad(output, [x, *weights], z)
        with torch.no_grad():
            for w, slope in zip(weights, g, strict=True):
                w -= lr * slope
        return dx

    for k in range(len(data) + 2 * D + 1):
        for depth, part in enumerate([stem, *maps, head]):
            n, m = k - depth, k - 2 * D + depth
            if 0 <= n < len(data):
                x = (data[n][0] if depth == 0 else h[depth - 1, n]).detach().requires_grad_()
                output = part(x)
                h[depth, n] = output.detach()
                if depth == 0:
                    kept[n] = x, output  # (autograd's graph meets today's weights)
                if depth == D:
                    loss = mse(output, data[n][1])
                    (z,) = torch.autograd.grad(loss, output, retain_graph=True)
                    back[depth - 1, n] = x.detach(), step(part, x, output, z)
            if 0 <= m < len(data) and depth < D:
                y, z = back[depth, m]
                if depth == 0:
                    x, _ = kept.pop(m)
                    step(part, x, part(x), z)
                    continue
                b, c = y.chunk(2, 1)
                x = torch.cat([c - part.scale * part.f(b), b], 1).detach().requires_grad_()
                back[depth - 1, m] = x.detach(), step(part, x, part(x), z)
    return nn.Sequential(stem, *maps, head)


def test_petra_is_memory_reversible_at_speed_1():
    data = items(12)
    expected = petra(couplings(3), data, 0.05).state_dict()
    found = run(couplings(3), data, locality={"speed": 1}, learning={"lr": 0.05}).model.state_dict()
    assert relative(found.values(), expected.values()) <= 1e-12
    exact = run(couplings(3), data, learning={"lr": 0.05}).model.state_dict()
    assert relative(exact.values(), expected.values()) > 1e-4


def drifting(steps_: int) -> nn.Sequential:
    f = nn.Linear(2, 2, bias=False)
    f.weight.data = -0.5 * torch.eye(2)
    return nn.Sequential(Midpoint(f, steps_, 0.1), SecondHalf(), nn.Linear(2, 3))


def test_drift_is_warned_of_before_the_run_and_in_its_result():
    settings = Settings.model_validate(
        {"level": "reversible", "loss": "mse", "learning": {"lr": 1e-12}}
    )

    def go(steps_):
        stream = from_iterable([(u.float(), y.float()) for u, y in items(3)])
        return train(seeded(lambda: drifting(steps_)), stream, settings)

    text = r"block 'block0' recover .* relative error of \d\.\de-0[23] \(float32"
    with pytest.warns(UserWarning, match=text) as seen:
        result = go(200)
    assert result.warnings[0] == str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=text):  # it came before the run
            go(200)
        assert go(50).warnings == []
    with pytest.raises(LevelError, match="their gradients would mean nothing"):
        go(320)


# -- golden files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "steps_", "tau", "leak"),
    [("tanh", 1, 0.3, 0.0), ("anti", 2, 0.1, 0.0), ("tanh", 33, 0.02, 0.5)],
)
def test_unseen_golden_files(kind, steps_, tau, leak):
    data = leapfrog(kind, steps=steps_, tau=tau, size=5, seed=steps_, leak=leak)
    for check in verify.checks_of(data, "unseen.npz"):
        assert check.measure().difference <= check.bound, check.name
    wrong = {**data, "dh0": data["dh0"] * (1 + 1e-7), "h": data["h"] + 1e-7}
    for check in verify.checks_of(wrong, "wrong.npz"):
        assert check.measure().difference > check.bound, check.name


# -- engines --------------------------------------------------------------------------------------


def portable(kind: str, depth: int = 6) -> nn.Sequential:
    spec = PortableStream(1).spec
    if kind == "one f":
        return seeded(
            lambda: nn.Sequential(
                nn.Linear(FEATURES, 5),
                Midpoint(nn.Sequential(nn.Linear(5, 5), nn.Tanh()), 9, 0.1),
                Midpoint(nn.Sequential(nn.Linear(5, 5), nn.Tanh()), 7, 0.1, start=False),
                SecondHalf(),
                nn.Linear(5, CLASSES),
            )
        )
    settings = ModelSettings(kind=ModelKind(kind), width=7, depth=depth)
    return make_model(settings, spec, seed=1, dtype=torch.float32)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("kind", "actors", "fields"),
    [
        ("reversible-mlp", 4, {}),
        ("midpoint", 2, {"learning": {"lr": 0.05, "momentum": 0.5, "decay": "linear"}}),
        ("midpoint", 3, {"partition": {"delay": 2}, "engine": {"transport": "tcp"}}),
        ("one f", 3, {}),
    ],
)
def test_engines_are_equal(session, leaves_no_socket, kind, actors, fields):
    fields = dict(fields)
    engine = {"actors": actors, **fields.pop("engine", {})}
    source = partial(PortableStream, 30, missing={3, 4}, last=2)
    model = partial(portable, kind)
    alone, spread = both(model, source, engine, 30, level="reversible", **fields)
    assert learned(alone, model)
    assert_equal(alone, spread)


def test_both_halves_of_a_message_are_counted():
    """A state goes forward, a message and a state come back: three of them per sample and edge."""
    result = run(steps(5), items(4, batch=BATCH))
    state = BATCH * 2 * N * 8
    assert result.bytes_per_edge["block1->block2"] == 4 * 3 * state
    assert result.bytes_per_edge["block5->block6"] == 4 * 3 * state
    assert result.bytes_per_edge["block0->block1"] == 4 * state  # of one state each way
