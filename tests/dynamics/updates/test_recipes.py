"""Oracle: torch.optim and torch.nn.utils, and means written out, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamics.helpers import F64, Network, clones, mlp, noise, relative, samples, settings
from torch import nn

from hamdist.config import AverageSettings
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.updates.average import Average
from hamdist.dynamics.vjp.gradient import Column, Outer, TableRows, norm_of
from hamdist.errors import LevelError
from hamdist.runtime.train.prepare import as_graph
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable

SIZES = [4, 5, 6, 2]


def run(level, items, **fields):
    config = settings(level, **fields)
    return train(mlp(SIZES), from_iterable(items, outputs=2), config, loss=mse)


def weighted_mean(course, decay):
    """sum_j r^(n-j) theta_j / sum_j r^(n-j), of theta_1 ... theta_n."""
    weights = [decay ** (len(course) - 1 - j) for j in range(len(course))]
    return [
        sum(w * t for w, t in zip(weights, tensors, strict=True)) / sum(weights)
        for tensors in zip(*course, strict=True)
    ]


@pytest.mark.parametrize("level", ["trace", "local", "heads", "backprop"])
@pytest.mark.parametrize(("decay", "every"), [(0.9, 1), (0.9, 3), (0.0, 1)])
def test_an_average_is_the_weighted_mean_of_a_blocks_own_weights(level, decay, every):
    items = samples(23, 3, 4, 2)
    config = settings(level, learning={"lr": 0.1, "average": {"decay": decay, "every": every}})
    graph = as_graph(mlp(SIZES), config, from_iterable(items).spec, mse)
    course = {f"block{i}": [] for i in range(3)}
    counts = dict.fromkeys(course, 0)

    def after(node, event):
        done = node.block.weights.updates
        if done > counts[node.name]:
            counts[node.name] = done
            course[node.name].append(clones(node.block.weights.theta))

    network = Network(graph, config, items).run(after=after)
    result = run(level, items, learning=config.learning.model_dump())
    for name, seen in course.items():
        looked = seen[every - 1 :: every]
        expected = weighted_mean(looked, decay**every)
        assert relative(network.nodes[name].block.weights.average.values, expected) <= 1e-12
        assert relative(result.blocks[name].average.values(), expected) <= 1e-12
        own = {k: v for k, v in result.model.state_dict().items() if k in result.blocks[name].theta}
        assert relative(own.values(), expected) <= 1e-12
        assert relative(result.blocks[name].theta.values(), seen[-1]) == 0


def test_the_average_moves_nothing_and_the_plain_weights_stay():
    items = samples(40, 3, 4, 2)
    without = run("trace", items, learning={"lr": 0.1})
    averaged = run("trace", items, learning={"lr": 0.1, "average": 0.9})
    assert without.plain is None
    assert relative(averaged.plain.parameters(), without.model.parameters()) == 0
    assert relative(averaged.model.parameters(), without.model.parameters()) > 1e-4
    assert averaged.windows == without.windows


def test_an_average_by_block():
    items = samples(40, 3, 4, 2)
    learning = {"lr": 0.1, "average": 0.9, "blocks": {"block1": {"average": "off"}}}
    result = run("trace", items, learning=learning)
    assert [bool(result.blocks[f"block{i}"].average) for i in range(3)] == [True, False, True]
    apart = dict(result.plain.named_parameters())
    same = {k: torch.equal(v, apart[k]) for k, v in result.model.named_parameters()}
    assert same == {k: k.startswith("2.") for k in same}


def test_an_average_of_short_numbers_is_kept_in_float32():
    theta = [torch.ones(3, dtype=torch.bfloat16)]
    average = Average(theta, AverageSettings(decay=0.999))
    for n in range(2000):
        theta[0].fill_(1 + (n % 2) / 64)
        average.update()
    (found,) = average.values
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.full_like(found, 1 + 1 / 128))


def by_hand(items, step_of, *, clip=None):
    """torch.optim on the whole model, with each layer's gradient clipped by its own norm."""
    model = copy.deepcopy(mlp(SIZES))
    optimiser = step_of(model.parameters())
    for u, y in items:
        optimiser.zero_grad()
        mse(model(u), y).backward()
        for i in (0, 2, 4):
            limit = clip[i // 2] if isinstance(clip, tuple) else clip
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(model[i].parameters(), limit, norm_type=2)
        optimiser.step()
    return model


SGD = {
    "plain": ({}, lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": ({"momentum": 0.7}, lambda p: torch.optim.SGD(p, 0.1, 0.7)),
    "adam": (
        {"momentum": 0.9, "adaptive": {}},
        lambda p: torch.optim.Adam(p, 0.1, (0.9, 0.999)),
    ),
}


@pytest.mark.parametrize("step", ["auto", "autograd"])
@pytest.mark.parametrize("rule", SGD)
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_clipping_by_block(rule, step, tau):
    own, optimiser = SGD[rule]
    items = samples(30, 3, 4, 2)
    learning = {"lr": 0.1, "clip": 0.3, "blocks": {"block1": {"clip": 0.05}}, **own}
    fields = {"engine": {"step": step}, "dynamics": {"tau": tau}}
    found = run("backprop", items, learning=learning, **fields).model
    # (torch adds 1e-6 to the norm)
    expected = by_hand(items, optimiser, clip=(0.3, 0.05, 0.3))
    assert relative(found.parameters(), expected.parameters()) <= 1e-5
    without = by_hand(items, optimiser)
    if rule != "adam":
        assert relative(without.parameters(), expected.parameters()) > 1e-2


def without_inputs(items, rule, *, lr, momentum, clip):
    """SGD on each layer's gradient freed of its inputs, with the formulas of whitening.py."""
    model = copy.deepcopy(mlp(SIZES))
    layers = [model[0], model[2], model[4]]
    mu, a, p = [None] * 3, [torch.eye(n, dtype=F64) for n in SIZES[:3]], [None] * 3
    v = [[torch.zeros_like(q) for q in layer.parameters()] for layer in layers]
    for k, (u, y) in enumerate(items):
        x = [u]
        for layer in layers[:2]:
            x.append(torch.tanh(layer(x[-1])))
        g = torch.autograd.grad(mse(layers[2](x[2]), y), list(model.parameters()))
        for i, layer in enumerate(layers):
            x_i, g_w, g_b = x[i].detach(), g[2 * i], g[2 * i + 1]
            mean = x_i.mean(0)
            mu[i] = mean if mu[i] is None else 0.8 * mu[i] + 0.2 * mean
            p[i] = torch.eye(SIZES[i], dtype=F64) if p[i] is None else p[i]
            if rule == "whitened" and k % 2 == 0:
                apart = x_i - mu[i]
                a[i] = 0.8**2 * a[i] + (1 - 0.8**2) * apart.T @ apart / len(x_i)
            if rule == "whitened" and k % 6 == 0:
                t = a[i].trace() / SIZES[i]
                p[i] = 1.3 * torch.linalg.inv(a[i] / t + 0.3 * torch.eye(SIZES[i], dtype=F64))
            new_w = (g_w - torch.outer(g_b, mu[i])) @ p[i]
            new_b = g_b - new_w @ mu[i]
            norm = (new_w.square().sum() + new_b.square().sum()).sqrt()
            shrink = min(1.0, clip / float(norm))
            with torch.no_grad():
                for j, (q, one) in enumerate(zip(layer.parameters(), (new_w, new_b), strict=True)):
                    v[i][j] = momentum * v[i][j] + shrink * one
                    q -= lr * v[i][j]
    return model


@pytest.mark.parametrize("rule", ["centred", "whitened"])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("step", ["auto", "closed", "autograd"])
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_freed_of_their_inputs(rule, momentum, step, batch):
    items = samples(30, batch, 4, 2)
    inputs = {"rule": rule, "memory": 0.8, "damping": 0.3, "look": 2, "refresh": 6}
    learning = {"lr": 0.1, "momentum": momentum, "inputs": inputs, "clip": 0.5}
    found = run("backprop", items, learning=learning, engine={"step": step}).model
    expected = without_inputs(items, rule, lr=0.1, momentum=momentum, clip=0.5)
    assert relative(found.parameters(), expected.parameters()) <= 1e-11
    plain = run("backprop", items, learning={**learning, "inputs": "off"}).model
    assert relative(plain.parameters(), expected.parameters()) > 1e-3


def test_inputs_that_are_not_known_are_told_of():
    learning = {"lr": 0.1, "inputs": "centred", "blocks": {"block1": {"inputs": "off"}}}
    bare = nn.Sequential(*(nn.Linear(4, 4, bias=False, dtype=F64) for _ in range(3)))
    items = from_iterable(samples(3, 3, 4, 4), outputs=4)
    with pytest.warns(UserWarning, match=r"learning\.inputs has no effect on block0, block2:"):
        train(bare, items, settings("trace", learning=learning), loss=mse)
    with pytest.raises(LevelError, match="learning.inputs with presentation 'sequence'"):
        run("bptt", samples(3, 3, 4, 2), learning=learning)


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_the_norm_of_factors(rows):
    z, x = noise(0, rows, 7), noise(1, rows, 9)
    index = torch.arange(rows) % 4
    found = norm_of([Outer(z, x), Column(z), TableRows(index, z, 5), noise(2, 3, 3)])
    table = torch.zeros(5, 7, dtype=F64)
    for i, row in zip(index, z, strict=True):
        table[i] += row
    parts = [z.T @ x, z.sum(0), table, noise(2, 3, 3)]
    expected = torch.cat([p.reshape(-1) for p in parts]).norm()
    assert found == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("step", ["auto", "autograd"])
@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_momentum_that_looks_ahead_is_nesterovs(step, tau):
    items = samples(40, 3, 4, 2)
    found = run(
        "backprop",
        items,
        learning={"lr": 0.05, "momentum": 0.8},
        locality={"compensation": "look-ahead"},
        engine={"step": step},
        dynamics={"tau": tau},
    ).model
    expected = by_hand(items, lambda p: torch.optim.SGD(p, 0.05, 0.8, nesterov=True))
    assert relative(found.parameters(), expected.parameters()) <= 1e-12
    plain = by_hand(items, lambda p: torch.optim.SGD(p, 0.05, 0.8))
    assert relative(plain.parameters(), expected.parameters()) > 1e-3


def test_a_rate_by_block():
    items = samples(30, 3, 4, 2)
    own = {"block1": {"lr": 0.02}, "block*": {"lr": 0.2}}
    found = run("backprop", items, learning={"lr": 0.1, "blocks": own}, dynamics={"tau": 0.5})

    def groups(parameters):
        p = list(parameters)
        rates = [0.2, 0.2, 0.02, 0.02, 0.2, 0.2]
        return torch.optim.SGD([{"params": [q], "lr": r} for q, r in zip(p, rates, strict=True)])

    expected = by_hand(items, groups)
    assert relative(found.model.parameters(), expected.parameters()) <= 1e-12


@pytest.mark.parametrize(
    ("level", "fields", "named"),
    [
        ("trace", {"locality": {"compensation": "look-ahead"}}, "without momentum"),
        (
            "trace",
            {
                "locality": {"compensation": "look-ahead"},
                "learning": {"adaptive": {}, "momentum": 0.9},
            },
            "'look-ahead' with learning.adaptive",
        ),
        (
            "trace",
            {
                "learning": {"blocks": {"block1": {"lr": 0.1}}},
                "dynamics": {"blocks": {"block*": {"beta": 0.2}}},
            },
            "both are the rate",
        ),
        ("trace", {"learning": {"blocks": {"nobody": {"clip": 1}}}}, "no such block"),
    ],
)
def test_what_does_not_fit_is_refused(level, fields, named):
    with pytest.raises(LevelError, match=named):
        run(level, samples(3, 3, 4, 2), **fields)
