"""Rules of held blocks. Oracles: the minimum of the energy, found by Newton's method with autograd;
backpropagation, which equilibrium propagation estimates."""

from __future__ import annotations

import pytest
import torch
from dynamics.helpers import Network, clones, relative, settings
from dynamics.rules.test_rules import B, chain, items
from torch.nn import functional

import hamdist
from hamdist.dynamics.rules.predictive_coding import (
    AugmentedLagrangian,
    EquilibriumPropagation,
    PredictiveCoding,
)
from hamdist.errors import LevelError

LR = 0.1


def held(rule, ticks, many, **more):
    fields = {
        "locality": {"speed": ticks, "update": "last-tick"},
        "learning": {"lr": LR},
        **more,
    }
    return Network(chain(rule, rule, None), settings("local", **fields), items(many))


def theta(net):
    return {name: clones(net.theta(name)) for name in "abr"}


def energy(states, weights, u, y):
    """F of the module's docstring, written out for the chain."""
    (W0, b0), (W1, b1), (W2, b2) = weights
    h0, h1 = states
    apart = (h0 - torch.tanh(u @ W0.T + b0)).square().sum()
    apart = apart + (h1 - torch.tanh(h0 @ W1.T + b1)).square().sum()
    return functional.cross_entropy(h1 @ W2.T + b2, y) + apart / (2 * B)


def minimum(weights, u, y):
    """The states of least energy, by Newton's method."""
    (W0, b0), (W1, b1), _ = weights
    h0 = torch.tanh(u @ W0.T + b0)
    x = torch.cat([h0.flatten(), torch.tanh(h0 @ W1.T + b1).flatten()])

    def f(x):
        return energy((x[: h0.numel()].view_as(h0), x[h0.numel() :].view(B, -1)), weights, u, y)

    for _ in range(8):
        H, g = torch.autograd.functional.hessian(f, x), torch.autograd.functional.jacobian(f, x)
        x = x - torch.linalg.solve(H, g)
    assert float(torch.autograd.functional.jacobian(f, x).norm()) < 1e-13
    return x[: h0.numel()].view_as(h0), x[h0.numel() :].view(B, -1)


def test_predictive_coding_steps_at_the_minimum_of_the_energy():
    net = held(PredictiveCoding(0.15), 300, 1)
    before = theta(net)
    net.run()
    weights = [tuple(t.requires_grad_() for t in before[name]) for name in "abr"]
    for u, y in items(1):
        states = minimum([tuple(t.detach() for t in pair) for pair in weights], u, y)
        leaves = [t for pair in weights for t in pair]
        steps = torch.autograd.grad(energy(states, weights, u, y), leaves)
        with torch.no_grad():
            for t, g in zip(leaves, steps, strict=True):
                t -= LR * g
    expected = [t for pair in weights for t in pair]
    assert relative([t for name in "abr" for t in net.theta(name)], expected) <= 1e-5


@pytest.mark.parametrize("update", ["last-tick", "tick"])
def test_predictive_coding_after_few_ticks(update):
    """By hand, tick by tick: what a block knows of its neighbours is a tick old. With steps in
    every tick it is incremental (Salvatori et al. 2024)."""
    ticks, rate = 7, 0.4
    net = held(PredictiveCoding(rate), ticks, 1, locality={"speed": ticks, "update": update})
    (W0, b0), (W1, b1), (W2, b2) = theta(net).values()
    ((u, y),) = items(1)
    old = [t.clone() for t in (W0, b0, W1, b1, W2, b2)]
    net.run()
    f0 = torch.tanh(u @ W0.T + b0)
    h0, h1 = torch.zeros_like(f0), f0.new_zeros(B, 7)
    up0, up1 = 0 * h0, 0 * h1  # what a and b hear of in this tick
    for k in range(ticks + 2):  # the readout ends two ticks behind a
        f0, f1 = torch.tanh(u @ W0.T + b0), torch.tanh(h0 @ W1.T + b1)
        e = (torch.softmax(h1 @ W2.T + b2, 1) - functional.one_hot(y, 3)) / B
        d0, d1 = (h0 - f0) / B, (h1 - f1) / B
        new0 = f0 if k == 0 else h0 - rate * B * (d0 + (up0 if k > 1 else 0))
        new1 = f1 if k == 1 else h1 - rate * B * (d1 + (up1 if k > 2 else 0))
        up0 = -(d1 * (1 - f1**2)) @ W1 if k != 1 else 0 * h0
        # The readout compares with the target of a sample two ticks behind its presentation.
        up1 = e @ W2 if k >= 2 else 0 * h1
        if update == "tick" or k == ticks - 1:  # (a block that begins with a sample does not step)
            z0 = -d0 * (1 - f0**2) * (0 < k < ticks)
            z1 = -d1 * (1 - f1**2) * (k != 1 and k <= ticks)
            e = e * (k >= 2)
            moves = [z0.T @ u, z0.sum(0), z1.T @ h0, z1.sum(0), e.T @ h1, e.sum(0)]
            W0, b0, W1, b1, W2, b2 = (
                t - LR * g for t, g in zip([W0, b0, W1, b1, W2, b2], moves, strict=True)
            )
        h0, h1 = new0, new1
    expected = [W0, b0, W1, b1, W2, b2]
    found = [t for name in "abr" for t in net.theta(name)]
    assert relative(found, expected) <= 1e-14
    assert relative(found, old) > 1e-4


def gradient(before, u, y):
    """Backpropagation's, of the blocks a and b at the weights `before`."""
    (W0, b0), (W1, b1), (W2, b2) = ([t.requires_grad_() for t in pair] for pair in before.values())
    h1 = torch.tanh(torch.tanh(u @ W0.T + b0) @ W1.T + b1)
    leaves = [W0, b0, W1, b1]
    return torch.autograd.grad(functional.cross_entropy(h1 @ W2.T + b2, y), leaves)


def steps(net, before):
    return [
        (old - new) / LR
        for name in "ab"
        for old, new in zip(before[name], net.theta(name), strict=True)
    ]


def test_multipliers_make_predictive_coding_exact():
    """At rest, where predictive coding alone is off by a share of the errors."""
    ((u, y),) = items(1)
    off = []
    for rule in (AugmentedLagrangian(0.1, 0.1, 2.0), PredictiveCoding(0.1)):
        net = held(rule, 900, 1)
        before = theta(net)
        net.run()
        off.append(relative(steps(net, before), gradient(before, u, y)))
    assert off[0] <= 1e-6
    assert off[1] > 0.01


def test_multipliers_tick_by_tick():
    """By hand, over two samples: they begin anew with each."""
    rate, dual, penalty, ticks = 0.4, 0.3, 0.8, 7
    net = held(AugmentedLagrangian(rate, dual, penalty), ticks, 2)
    (W0, b0), (W1, b1), (W2, b2) = theta(net).values()
    net.run()
    h0, h1 = torch.zeros(B, 6, dtype=W0.dtype), torch.zeros(B, 7, dtype=W0.dtype)
    up0, up1, l0, l1, y = 0 * h0, 0 * h1, 0 * h0, 0 * h1, None
    data = items(2)
    for k in range(2 * ticks):
        u, age = data[k // ticks][0], k % ticks
        f0, f1 = torch.tanh(u @ W0.T + b0), torch.tanh(h0 @ W1.T + b1)
        # The readout compares with the target of a sample two ticks behind its presentation.
        y = data[(k - 2) // ticks][1] if k > 1 else None
        e = 0 if y is None else (torch.softmax(h1 @ W2.T + b2, 1) - functional.one_hot(y, 3)) / B
        l0, l1 = (0 * l0 if age <= 1 else l0), (0 * l1 if age <= 2 else l1)
        d0, d1 = (l0 + penalty * (h0 - f0)) / B, (l1 + penalty * (h1 - f1)) / B
        l0, l1 = l0 + dual * (h0 - f0), l1 + dual * (h1 - f1)
        new0 = f0 if age == 0 else h0 - rate * B * (d0 + (up0 if age > 1 else 0))
        new1 = f1 if age == 1 else h1 - rate * B * (d1 + (up1 if age != 2 else 0))
        below = -(d1 * (1 - f1**2)) @ W1 if age != 1 else 0 * h0
        up1 = e @ W2 if y is not None else 0 * h1
        if age == ticks - 1:
            z0, z1 = -d0 * (1 - f0**2), -d1 * (1 - f1**2)
            moves = [z0.T @ u, z0.sum(0), z1.T @ h0, z1.sum(0), e.T @ h1, e.sum(0)]
            W0, b0, W1, b1, W2, b2 = (
                t - LR * g for t, g in zip([W0, b0, W1, b1, W2, b2], moves, strict=True)
            )
        h0, h1, up0 = new0, new1, below
    found = [t for name in "abr" for t in net.theta(name)]
    assert relative(found, [W0, b0, W1, b1, W2, b2]) <= 1e-13


def test_equilibrium_propagation_estimates_the_gradient():
    """To second order in beta."""
    beta = 0.1
    ticks = 500
    phi = {"values": [-beta] * (ticks // 2) + [beta] * (ticks // 2), "cycle": True}
    net = held(EquilibriumPropagation(beta), ticks, 1, dynamics={"phi": phi})
    before = theta(net)
    ((u, y),) = items(1)
    net.run()
    assert relative(steps(net, before), gradient(before, u, y)) <= 2 * beta**2


def test_equilibrium_propagation_is_refused_without_its_phases():
    """Its updates are differences of both phases, over 2 beta."""

    def run(**phi):
        fields = {"level": "local", "locality": {"speed": 9, "update": "last-tick"}, "classes": 3}
        given = {**fields, "dtype": "float64", "engine": {"kind": "inprocess"}, **phi}
        rules = {"[ab]": "equilibrium-propagation"}
        return hamdist.train(chain(None, None, None), items(2), rules=rules, **given)

    said = r"'a' with rule EquilibriumPropagation: .* 4 times -0.1, then 5 times 0.1"
    for phi in ({}, {"values": [-0.1] * 4 + [0.1] * 5}, {"values": [-0.1] * 5 + [0.1] * 5}):
        with pytest.raises(LevelError, match=said):
            run(**({"dynamics": {"phi": phi}} if phi else {}))
    assert run(dynamics={"phi": {"values": [-0.1] * 4 + [0.1] * 5, "cycle": True}}).samples == 2


def test_energies_and_orders_are_not_those_of_hamilton():
    with pytest.raises(LevelError, match=r"metrics.record: its energy"):
        held(PredictiveCoding(), 9, 1, metrics={"record": "energy"})
    with pytest.raises(LevelError, match="order 'omega-first'"):
        held(PredictiveCoding(), 9, 1, locality={"speed": 9, "order": "simultaneous"})
    with pytest.raises(LevelError, match="the level of 'pulse'; use level local or group"):
        Network(chain(PredictiveCoding(), None, None), settings("trace"), items(1))


def test_held_rules_that_are_refused():
    class Keeps(hamdist.Rule):
        presentation = "hold"

        def relax(self, block, inputs, message):
            block.memory["drawn"] = block.generator
            return block.f(inputs), [None], {}

    class Deaf(Keeps):
        signals = hamdist.Signals(back="none")

    fields = {"level": "local", "classes": 3, "dtype": "float64", "engine": {"kind": "inprocess"}}
    cases = {Keeps: r"relax\(\) keeps no plain data", Deaf: "'none', .* which it may leave unused"}
    for rule, said in cases.items():
        with pytest.raises(hamdist.HamdistError, match=said):
            hamdist.train(chain(None, None, None), items(2), rules={"a": rule()}, **fields)
