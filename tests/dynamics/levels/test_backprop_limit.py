"""Oracle: torch.optim.SGD and autograd on the unsplit model, float64.

Level `backprop`, and the held presentation at speed inf, must be centralised gradient descent.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from dynamics.helpers import (
    Network,
    clones,
    layer,
    linear,
    mlp,
    noise,
    relative,
    samples,
    settings,
    sgd,
)
from torch import nn
from torch.nn import functional

from hamdist.dynamics.graph.graph import BlockSpec, Combine, Graph
from hamdist.dynamics.objective.losses import cross_entropy, mse
from hamdist.runtime.train.prepare import as_graph
from hamdist.runtime.train.train import train
from hamdist.streams import ArrayStream, from_iterable

ROUND_OFF = 1e-12
STEPS = 40
SIX = [5, 8, 7, 8, 6, 7, 3]  # six layers


def apart(model, items, config, loss=None, *, classes=None, steps=None, **oracle) -> float:
    """Relative difference of all weights after hamdist's run and after SGD's."""
    result = train(model, from_iterable(items, classes=classes), config, loss=loss)
    expected = sgd(
        model, items, loss or {True: cross_entropy}.get(classes is not None, mse), **oracle
    )
    assert result.samples == len(items)
    start, end = list(model.parameters()), list(expected.parameters())
    assert relative(start, end) > 1e-3, "nothing was learned: the comparison would be empty"
    assert list(result.model.state_dict()) == list(model.state_dict())
    return relative(result.model.parameters(), end)


def classes_of(count, batch, inputs, classes):
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, classes, (count, batch), generator=generator)
    return list(zip(noise(2, count, batch, inputs), y, strict=True))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_backprop_is_sgd(blocks, batch):
    config = settings(
        "backprop", loss="mse", partition={"blocks": blocks}, learning={"lr": 0.05, "momentum": 0.5}
    )
    items = samples(STEPS, batch, 5, 3)
    assert apart(mlp(SIX), items, config, lr=0.05, momentum=0.5) <= ROUND_OFF


VARIANTS = {
    "plain": {},
    "tau": {"dynamics": {"tau": 0.5}},
    "odd tau": {"dynamics": {"tau": 0.3}},
    "delays": {"partition": {"blocks": 3, "delay": 3}},
    "group": {"partition": {}, "locality": {"grouping": "group"}},
    "network": {"partition": {}, "locality": {"grouping": "network"}},
    "layers": {"partition": {}},
    "stash": {"locality": {"memory": "trace+weights"}},
    "slower than needed": {"locality": {"speed": 17}},
    "cuts": {"partition": {"cuts": ["3", "4", "8"]}},
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_same(variant, momentum):
    given = {"partition": {"blocks": 3}, **VARIANTS[variant]}
    config = settings("backprop", loss="mse", learning={"lr": 0.02, "momentum": momentum}, **given)
    items = samples(STEPS, 4, 5, 3)
    assert apart(mlp(SIX), items, config, lr=0.02, momentum=momentum) <= ROUND_OFF


def test_trace_at_speed_inf_is_backprop():
    config = settings(
        "trace",
        loss="mse",
        locality={"speed": "inf", "memory": "trace+weights"},
        learning={"lr": 0.05},
    )
    assert apart(mlp(SIX), samples(STEPS, 4, 5, 3), config, lr=0.05) <= ROUND_OFF


def test_linear_decay():
    config = settings(
        "backprop",
        loss="mse",
        steps=STEPS,
        learning={"lr": 0.1, "momentum": 0.3, "decay": "linear"},
    )
    items = samples(STEPS, 4, 5, 3)
    difference = apart(mlp(SIX), items, config, lr=0.1, momentum=0.3, decay_over=STEPS)
    assert difference <= ROUND_OFF


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_missing_targets_make_no_step(momentum):
    items = [(u, None if n % 3 == 1 else y) for n, (u, y) in enumerate(samples(STEPS, 4, 5, 3))]
    config = settings("backprop", loss="mse", learning={"lr": 0.05, "momentum": momentum})
    assert apart(mlp(SIX), items, config, lr=0.05, momentum=momentum) <= ROUND_OFF
    result = train(mlp(SIX), from_iterable(items), config)
    assert {b.updates for b in result.blocks.values()} == {STEPS}


def test_uneven_last_batch():
    x, y = noise(3, 30, 5), noise(4, 30, 3)
    stream = ArrayStream(x, y, 8, seed=1, uneven=True)
    drawn = [(s.u, s.y) for s, _ in zip(stream.samples(), range(STEPS), strict=False)]
    assert {len(u) for u, _ in drawn} == {8, 6}
    config = settings(
        "backprop", loss="mse", steps=STEPS, partition={"blocks": 3}, learning={"lr": 0.05}
    )
    result = train(mlp(SIX), stream, config)
    expected = sgd(mlp(SIX), drawn, mse, lr=0.05)
    assert relative(result.model.parameters(), expected.parameters()) <= ROUND_OFF


def test_cross_entropy():
    config = settings("backprop", partition={"blocks": 3}, learning={"lr": 0.1, "momentum": 0.5})
    items = classes_of(STEPS, 8, 5, 3)
    assert apart(mlp(SIX), items, config, classes=3, lr=0.1, momentum=0.5) <= ROUND_OFF


def test_a_users_loss():
    def huber(prediction, target):
        return (
            functional.smooth_l1_loss(prediction, target, beta=0.5) + 0.01 * prediction.abs().sum()
        )

    config = settings("backprop", partition={"blocks": 3}, learning={"lr": 0.1})
    items = samples(STEPS, 4, 5, 3)
    assert apart(mlp(SIX), items, config, loss=huber, lr=0.1) <= ROUND_OFF


@pytest.mark.parametrize("partition", [{"blocks": 2}, {"cuts": ["1", "3", "5"]}])
def test_conv_net(partition):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()
    u = noise(0, 40, 6, 1, 8, 8)
    y = torch.randint(0, 3, (40, 6), generator=torch.Generator().manual_seed(1))
    items = list(zip(u, y, strict=True))
    config = settings("backprop", partition=partition, learning={"lr": 0.05})
    result = train(model, from_iterable(items, classes=3), config)
    expected = sgd(model, items, cross_entropy, lr=0.05)
    found, wanted = result.model.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)  # running means and variances, too
    assert relative(found.values(), wanted.values()) <= ROUND_OFF


def test_frozen_layers_stay():
    model = mlp(SIX)
    model[2].requires_grad_(False)
    config = settings("backprop", loss="mse", learning={"lr": 0.05})
    items = samples(30, 4, 5, 3)
    assert apart(model, items, config, lr=0.05) <= ROUND_OFF


# -- held samples --------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_hold_at_speed_inf_is_sgd(blocks, momentum):
    """A sample that stays for a round trip, with one update in its last tick."""
    config = settings(
        "local",
        loss="mse",
        locality={"speed": "inf", "update": "last-tick"},
        partition={"blocks": blocks},
        learning={"lr": 0.05, "momentum": momentum},
    )
    items = samples(STEPS, 4, 5, 3)
    assert apart(mlp(SIX), items, config, lr=0.05, momentum=momentum) <= ROUND_OFF


@pytest.mark.parametrize("given", [{"dynamics": {"tau": 0.5}}, {"partition": {"delay": 2}}])
def test_hold_at_speed_inf_in_other_units(given):
    given = {"partition": {"blocks": 3, **given.get("partition", {})}, "dynamics": {}, **given}
    given["partition"].setdefault("blocks", 3)
    config = settings(
        "group",
        loss="mse",
        locality={"speed": "inf", "update": "last-tick"},
        learning={"lr": 0.05},
        **given,
    )
    assert apart(mlp(SIX), samples(50, 4, 5, 3), config, lr=0.05) <= ROUND_OFF


@pytest.mark.parametrize("order", ["omega-first", "sequential"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_hold_with_a_state_as_readout(blocks, order):
    items = samples(STEPS, 4, 5, 3)
    result = train(mlp(SIX), from_iterable(items), _held_to_the_end(blocks, order))
    expected = sgd(mlp(SIX), items, mse, lr=0.05)
    assert relative(result.model.parameters(), expected.parameters()) <= ROUND_OFF
    assert {b.updates for b in result.blocks.values()} == {STEPS}


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_sequential_order_up_to_the_last_sample(blocks):
    """The same without what the end of the stream does: block0, whose steps need all others."""
    items = samples(STEPS, 4, 5, 3)
    config = _held_to_the_end(blocks, "sequential")
    spec = from_iterable(items).spec
    network = Network(as_graph(mlp(SIX), config, spec, mse), config, items)
    expected = sgd(mlp(SIX), items[:-1], mse, lr=0.05)
    before_last = {}

    def after(node, event):
        if node.block.weights.updates == STEPS - 1:
            before_last[node.name] = clones(node.block.weights.theta)

    network.run(after=after)
    found = [t for name in network.nodes for t in before_last[name]]
    assert relative(found, [p.detach() for p in expected.parameters()]) <= ROUND_OFF


def _held_to_the_end(blocks, order):
    return settings(
        "local",
        loss="mse",
        locality={"speed": "inf", "update": "last-tick", "readout": "state", "order": order},
        partition={"blocks": blocks},
        learning={"lr": 0.05},
    )


# -- graphs --------------------------------------------------------------------------------------


class Branches(nn.Module):
    """The graph of `branches` as plain torch: a skip, two parents, two readouts."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = layer(5, 6, 0), layer(6, 6, 1), layer(12, 4, 2)
        self.near, self.far = linear(6, 3, 3), linear(4, 3, 4)

    def forward(self, u):
        a = self.a(u)
        b = self.b(a)
        c = self.c(torch.cat([b, a], -1))
        return self.near(a + b), self.far(c)


def branches(delays=None):
    m, d = Branches(), delays or {}
    graph = Graph(
        [
            BlockSpec("a", m.a, ("u",)),
            BlockSpec("b", m.b, ("a",), delays=d.get("b", {})),
            BlockSpec("c", m.c, ("b", "a"), delays=d.get("c", {})),
            BlockSpec("near", m.near, ("a", "b"), combine=Combine.SUM, loss=mse),
            BlockSpec("far", m.far, ("c",), loss=cross_like, delays=d.get("far", {})),
        ]
    )
    return m, graph


def cross_like(prediction, target):
    """Another loss than that of the other readout."""
    return (prediction - 2 * target).abs().sum() / len(prediction)


LEVELS = {
    "backprop": ("backprop", {}),
    "hold": ("local", {"locality": {"speed": "inf", "update": "last-tick"}}),
}


@pytest.mark.parametrize(
    "delays", [None, {"c": {"b": 2}, "b": {"a": 3}}, {"c": {"a": 5}}, {"far": {"c": 4}}]
)
@pytest.mark.parametrize("case", LEVELS)
def test_a_graph_with_skip_and_two_readouts(case, delays):
    level, given = LEVELS[case]
    model, graph = branches(delays)
    items = samples(50, 4, 5, 3)
    result = train(graph, from_iterable(items), settings(level, learning={"lr": 0.03}, **given))

    def summed(predictions, target):
        near, far = predictions
        return mse(near, target) + cross_like(far, target)

    expected = sgd(model, items, summed, lr=0.03)
    for name in graph.blocks:
        found = result.blocks[name].theta
        wanted = getattr(expected, name).state_dict()
        assert list(found) == list(wanted)
        assert relative(found.values(), wanted.values()) <= ROUND_OFF, name
    u = noise(9, 4, 5)
    near, far = expected(u)
    merged = result.model(u)
    torch.testing.assert_close(merged["near"], near, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(merged["far"], far, rtol=1e-10, atol=1e-12)


# -- a static input ------------------------------------------------------------------------------


@pytest.mark.parametrize("nu", [1, 2, 3, 5])
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_static_convergence(nu, order):
    """equations.md, "What follows": eta = 0, c tau = 1, a chain of nu state blocks, beta = 0, from
    random h, z and omega. Block l = 1 ... nu: h exact from k = l, z from 2 nu + 1 - l, omega's
    increment tau phi times the gradient from tick 2 nu (sequential: z from 2 nu - l, omega from
    2 nu - 2). k counts times t_k, and ticks from 0."""
    sizes, tau, phi = [*[4, 5, 3, 6, 4][:nu], 2], 0.5, 0.7
    modules = [layer(i, o, n) for n, (i, o) in enumerate(pairwise(sizes))]
    graph = Graph(
        BlockSpec(
            f"b{n}",
            m,
            (f"b{n - 1}" if n else "u",),
            loss=mse if n == nu - 1 else None,
            state=n == nu - 1,
        )
        for n, m in enumerate(modules)
    )
    config = settings(
        "local",
        locality={"order": order, "readout": "state", "target": "current"},
        dynamics={"tau": tau, "eta": 0, "beta": 0, "phi": phi},
    )
    u, y = noise(1, 3, sizes[0]), noise(2, 3, 2)
    ticks = 2 * nu + 4
    network = Network(graph, config, [(u, y)] * ticks)
    for n, node in enumerate(network.nodes.values()):
        node.block.h = noise(20 + n, *node.block.h.shape)
        node.block.z = noise(40 + n, *node.block.z.shape)
        node.block.weights.omega = [noise(60 + n, *t.shape) for t in node.block.weights.theta]
    h_at, z_at, omega_at = {}, {}, {}
    for name, node in network.nodes.items():
        h_at[name, 0] = node.block.h
        omega_at[name, 0] = node.block.weights.omega
    late = 0 if order == "sequential" else 1  # there omega of k is complete when z of k is

    def after(node, event):
        k = event.tick
        h_at[node.name, k + 1] = node.block.h.clone()
        z_at[node.name, k] = node.block.z.clone()
        omega_at[node.name, k + late] = clones(node.block.weights.omega)

    network.run(after=after)

    # backpropagation
    states = [u]
    for m in modules:
        states.append(m(states[-1]))
        states[-1].retain_grad()
    mse(states[-1], y).backward()

    sequential = order == "sequential"
    z_from = {n: 2 * nu - n if sequential else 2 * nu + 1 - n for n in range(1, nu + 1)}
    omega_from = 2 * nu - 2 if sequential else 2 * nu
    for n, module in enumerate(modules, start=1):
        name = f"b{n - 1}"
        for k in range(n, ticks):
            torch.testing.assert_close(h_at[name, k], states[n].detach(), rtol=1e-12, atol=1e-13)
        delta = phi * tau * states[n].grad  # c z = phi delta, c = 1 / tau
        for k in range(z_from[n], ticks):
            torch.testing.assert_close(z_at[name, k], delta, rtol=1e-12, atol=1e-13)
        for k in range(omega_from, ticks - 1):
            pairs = zip(omega_at[name, k + 1], omega_at[name, k], strict=True)
            for p, (new, old) in zip(module.parameters(), pairs, strict=True):
                torch.testing.assert_close(new - old, tau * phi * p.grad, rtol=1e-11, atol=1e-13)
    # and not a tick earlier, or the statement would say less than it does
    assert not torch.allclose(h_at[f"b{nu - 1}", nu - 1], states[nu].detach())
    assert not torch.allclose(z_at["b0", z_from[1] - 1], phi * tau * states[1].grad)
