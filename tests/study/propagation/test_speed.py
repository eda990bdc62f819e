"""From local to backpropagation. Oracles: autograd on the whole module, closed forms, an implicit
solve at the fixed point of a cycle, binomial sums, power laws that are known."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.config import Order, TargetOf
from hamdist.dynamics.graph.graph import BlockSpec, Combine, Graph
from hamdist.dynamics.objective.losses import cross_entropy, mse
from hamdist.errors import GraphError, SettingsError
from hamdist.study.propagation import streams as speed_streams
from hamdist.study.propagation.gradients import (
    Backprop,
    as_network,
    exact_gradients,
    flat,
    frozen,
    local_gradients,
    not_through,
    omegas,
    one_minus_cos,
    relative_error,
    ticks_to_settle,
    watch,
)
from hamdist.study.propagation.report import (
    curves,
    fit,
    fits,
    save_speed,
    speed_figures,
    speed_tables,
)
from hamdist.study.propagation.settling import (
    backprop_states,
    is_chain,
    relax,
    settling_tick,
    tick_counts,
)
from hamdist.study.propagation.streams import (
    PERIOD,
    StreamKind,
    StreamShapes,
    TimedStream,
    timed_stream,
)
from hamdist.study.propagation.study import (
    SpeedRow,
    SpeedStudy,
    cut_chain,
    own_network,
    parse_study,
    run_study,
    tanh_network,
)
from hamdist.study.report.files import versions
from hamdist.study.verify.topics.speed import checks

F64 = torch.float64
ROUND_OFF = 1e-12


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def dense(inputs, outputs, seed, activation=nn.Tanh):
    linear = nn.Linear(inputs, outputs, dtype=F64)
    with torch.no_grad():
        linear.weight.copy_(noise(seed, outputs, inputs) / inputs**0.5)
        linear.bias.copy_(0.1 * noise(seed + 100, outputs))
    return nn.Sequential(linear, activation())


def static(u, y, seconds=1.0):
    """u and y, switched on `seconds` before they are looked at."""
    return TimedStream(lambda _: u, lambda _: y, [seconds], begins=0.0, forgotten=1e-18)


# -- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", StreamKind)
def test_streams_are_functions_of_seed_and_time(kind):
    values = StreamShapes((2, 5), (2, 3))
    one, same, other = (timed_stream(kind, values, seed) for seed in (1, 1, 2))
    assert one.looks == same.looks
    for t in (0.3, -2.0, 7.7, 0.3):
        assert torch.equal(one.u(t), same.u(t))
        assert not torch.equal(one.u(t), other.u(t))
        assert one.u(t).shape == (2, 5)
        assert one.y(t).shape == (2, 3)
    assert not torch.equal(one.u(0.3)[:, :3], one.y(0.3))


def test_how_the_streams_move():
    values = StreamShapes((4, 50), (4, 50))
    still = timed_stream(StreamKind.STATIC, values, 0)
    assert torch.equal(still.u(0.0), still.u(9.0))
    assert still.begins == 0.0
    smooth = timed_stream(StreamKind.SMOOTH, values, 0)
    t = [0.01 * k for k in range(4000)]
    course = torch.stack([smooth.u(x) for x in t])
    speeds = course.diff(dim=0).square().mean().sqrt() / 0.01
    assert course.square().mean().sqrt() == pytest.approx(1, abs=0.05)
    assert speeds == pytest.approx(math.sqrt(1 + 1 / 12), abs=0.05)  # rms of w in [0.5, 1.5]
    assert course.diff(dim=0).abs().max() < 0.01 * 1.5 * math.sqrt(6) + 1e-12
    jumpy = timed_stream(StreamKind.RANDOM, values, 0)
    assert torch.equal(jumpy.u(3.01 * PERIOD), jumpy.u(3.99 * PERIOD))
    assert abs((jumpy.u(3.5 * PERIOD) * jumpy.u(4.5 * PERIOD)).mean()) < 0.3
    assert torch.equal(jumpy.u(-0.5 * PERIOD), jumpy.u(-0.1 * PERIOD))


def test_looks_at_random_streams_spread_over_the_period_and_over_samples():
    looks = timed_stream(StreamKind.RANDOM, StreamShapes((1, 1), (1, 1)), 3).looks
    number = [math.floor(t / PERIOD) for t in looks]
    share = [t / PERIOD - n for t, n in zip(looks, number, strict=True)]
    assert number == list(range(len(looks)))
    n = len(looks)
    assert [math.floor(s * n) for s in share] == list(range(n))


@pytest.mark.parametrize("kind", StreamKind)
def test_class_targets(kind):
    stream = timed_stream(kind, StreamShapes((50, 2), (50,), classes=3), 0)
    y = stream.y(0.2)
    assert y.dtype == torch.int64
    assert set(y.tolist()) == {0, 1, 2}
    moved = not torch.equal(y, stream.y(0.2 + 3 * PERIOD))
    assert moved == (kind is StreamKind.RANDOM)


# -- how long it takes to settle ---------------------------------------------------------------


@pytest.mark.parametrize("a", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("hops", [1, 4, 7])
def test_binomial_tail(hops, a):
    for k in (0, 1, hops - 1, hops, 30, 200):
        exact = sum(math.comb(k, i) * a**i * (1 - a) ** (k - i) for i in range(min(hops, k + 1)))
        assert not_through(k, hops, a) == pytest.approx(exact, rel=1e-9, abs=1e-300)
    k = ticks_to_settle(hops, a, 1e-6)
    assert not_through(k, hops, a) <= 1e-6
    assert not_through(k - 1, hops, a) > 1e-6


def test_settled():
    assert settling_tick([1.0, 0.1, 0.3, 0.1, 0.0], 0.2) == 3
    assert settling_tick([0.1, 0.1], 0.2) == 0
    assert settling_tick([0.1, 0.3], 0.2) is None
    assert settling_tick([0.1, math.nan, 0.1], 0.2) == 2


# -- the oracle ----------------------------------------------------------------------------------


def test_backprop_is_autograd():
    model = nn.Sequential(dense(5, 7, 0), dense(7, 6, 1), dense(6, 3, 2, nn.Identity))
    network = cut_chain(model, (5,), batch=2)
    assert [len(own) for own in network.backprop(*self_made(2)).values()] == [2, 2, 2]
    u, y = self_made(2)
    exact = torch.autograd.grad(0.5 * (model(u) - y).square().sum(1).mean(), model.parameters())  # type: ignore[call-overload]
    found = [g for own in network.backprop(u, y).values() for g in own]
    assert max(float((f - e).abs().max()) for f, e in zip(found, exact, strict=True)) < ROUND_OFF


def self_made(batch):
    return noise(5, batch, 5), noise(6, batch, 3)


def test_backprop_of_a_graph_by_hand_with_what_does_not_learn():
    a, c, out = dense(4, 3, 0), dense(7, 2, 1), dense(2, 2, 2, nn.Identity)
    a[0].bias.requires_grad_(False)
    graph = Graph(
        [
            BlockSpec("a", a, ("u",)),
            BlockSpec("c", c, ("u", "a"), loss=mse, state=True, output=out),
            BlockSpec("d", dense(3, 2, 4), ("a",), loss=mse),
        ]
    )
    u, y = noise(1, 3, 4), noise(2, 3, 2)
    d = graph.blocks["d"].module
    h = a(u)
    loss = mse(out(c(torch.cat([u, h], -1))), y) + mse(d(h), y)
    parts = {"a": [a[0].weight], "c": [*c.parameters(), *out.parameters()], "d": [*d.parameters()]}
    for name, theta in parts.items():
        exact = torch.autograd.grad(loss, theta, retain_graph=True)
        found = Backprop(graph)(u, y)[name]
        assert relative_error([flat(found)], [flat(exact)]) < ROUND_OFF, name


# -- the local gradient ------------------------------------------------------------------------


@pytest.mark.parametrize("target", TargetOf)
def test_what_is_compared_belongs_to_one_moment(target):
    """One linear state block at c tau = 1: what it knows of the input, of the target and what it
    meets are of known ticks, so its gradient has a closed form."""
    network = cut_chain(nn.Sequential(dense(4, 3, 0, nn.Identity)), (4,), batch=2)
    linear = network.graph.blocks["block0"].module[0][0]
    stream = timed_stream(StreamKind.SMOOTH, network.values, 0)
    tau = 0.01
    found, ticks = local_gradients(network, stream, 1 / tau, 1.0, target)
    assert ticks == len(stream.looks) * (2 + 1)
    late = {TargetOf.CURRENT: 0, TargetOf.SAMPLE: 1}[target]
    for g, t in zip(found, stream.looks, strict=True):
        # z_k = tau phi (h_{k-1} - target)/B with h_{k-1} = f(u_{k-2}); omega_{k+1} meets u_k.
        h = linear(stream.u(t - 2 * tau))
        delta = (h - stream.y(t - tau - late * tau)) / 2
        exact = flat([delta.T @ stream.u(t), delta.sum(0)])
        assert relative_error([g], [exact]) < 1e-11


def chain(readout):
    layers = [dense(5, 7, 0), dense(7, 6, 1), dense(6, 3, 2, nn.Identity)]
    names = ["x", "y", "z"]
    return Graph(
        BlockSpec(
            name,
            module,
            (parent,),
            loss=readout.get("loss", mse) if name == "z" else None,
            state=name == "z" and readout.get("state", False),
            output=readout.get("output") if name == "z" else None,
        )
        for name, parent, module in zip(names, ["u", *names], layers, strict=False)
    )


SETTLED = {
    "state": (chain({"state": True}), (5,)),
    "output net": (chain({}), (5,)),
    "output module": (chain({"state": True, "output": dense(3, 2, 9)}), (5,)),
    "classes": (chain({"loss": cross_entropy}), (5,)),
    "skips, delays, arguments": (
        Graph(
            [
                BlockSpec("a", dense(4, 3, 0), ("u",)),
                BlockSpec("b", dense(3, 5, 1), ("a",), delays={"a": 3}),
                BlockSpec("c", nn.Bilinear(5, 3, 2, dtype=F64), ("b", "a"), Combine.ARGUMENTS),
                BlockSpec("d", dense(7, 2, 2), ("b", "c"), loss=mse, state=True),
            ]
        ),
        (4,),
    ),
    "pictures, float32": (
        Graph(
            [
                BlockSpec("a", nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh()), ("u",)),
                BlockSpec("b", nn.Sequential(nn.Flatten(), nn.Linear(18, 4)), ("a",), loss=mse),
            ]
        ),
        (1, 5, 5),
    ),
}


@pytest.mark.parametrize("a", [1.0, 0.4])
@pytest.mark.parametrize("case", SETTLED)
def test_a_static_input_ends_at_backpropagation(case, a):
    graph, shape = SETTLED[case]
    network = as_network(graph, shape, batch=2)
    stream = timed_stream(StreamKind.STATIC, network.values, 1)
    (found,), _ = local_gradients(network, stream, 200.0, a)
    (exact,) = exact_gradients(network, stream)
    assert exact.norm() > 1e-3
    assert relative_error([found], [exact]) < ROUND_OFF


def test_a_network_is_left_as_it_was():
    graph, _ = SETTLED["pictures, float32"]
    before = [p.clone() for b in graph.blocks.values() for p in b.module.parameters()]
    network = as_network(graph, (1, 5, 5))
    local_gradients(network, timed_stream(StreamKind.SMOOTH, network.values, 0), 10.0, 1.0)
    after = [p for b in graph.blocks.values() for p in b.module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {p.dtype for p in after} == {torch.float32}
    assert all(b.module.training for b in graph.blocks.values())


def test_a_static_input_is_looked_at_before_all_is_settled_when_it_was_switched_on_late():
    network = tanh_network().make(0)
    stream = timed_stream(StreamKind.STATIC, network.values, 0)
    late = static(stream.u(0.0), stream.y(0.0), seconds=0.5)
    found, ticks = local_gradients(network, late, 10.0, 1.0)
    assert ticks == 6  # t = 0, 0.1, ..., 0.5: tick 5, one too early
    assert relative_error(found, exact_gradients(network, late)) > 1e-3
    on_time = static(stream.u(0.0), stream.y(0.0), seconds=0.6)
    found, ticks = local_gradients(network, on_time, 10.0, 1.0)
    assert ticks == 7
    assert relative_error(found, exact_gradients(network, on_time)) < ROUND_OFF


def test_random_streams_stay_wrong_until_c_is_large_against_the_period():
    network = tanh_network().make(0)
    stream = timed_stream(StreamKind.RANDOM, network.values, 0)
    exact = exact_gradients(network, stream)
    errors = [
        relative_error(local_gradients(network, stream, hops / PERIOD, 1.0)[0], exact)
        for hops in (0.5, 2, 1000)
    ]
    assert min(errors[:2]) > 0.7
    assert errors[2] < 0.3


def test_readouts_that_cannot_share_a_target():
    graph = Graph(
        [
            BlockSpec("a", dense(4, 3, 0), ("u",), loss=mse),
            BlockSpec("b", dense(4, 2, 0), ("u",), loss=mse),
        ]
    )
    with pytest.raises(GraphError, match="a, b differ in shape or loss"):
        as_network(graph, (4,))


def test_error_and_angle():
    e = [torch.tensor([3.0, 4.0], dtype=F64), torch.tensor([0.0, 2.0], dtype=F64)]
    assert relative_error([1.5 * v for v in e], e) == pytest.approx(0.5)
    assert one_minus_cos([1.5 * v for v in e], e) == pytest.approx(0)
    turned = [torch.tensor([-4.0, 3.0], dtype=F64), -e[1]]
    assert one_minus_cos(turned, e) == pytest.approx((1 + 2) / 2)
    assert one_minus_cos([0 * e[0], e[1]], e) == pytest.approx(1 / 2)
    tiny = [torch.tensor([1.0, 1e-9], dtype=F64)], [torch.tensor([1.0, 0.0], dtype=F64)]
    assert one_minus_cos(*tiny) == pytest.approx(0.5e-18, rel=1e-6)


# -- verify, ticks, fixed points, cycles ---------------------------------------------------------


@pytest.mark.parametrize("check", list(checks(False)), ids=lambda check: check.name)
def test_checks_of_verify(check):
    assert check.measure() <= check.bound


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_exact_ticks(depth):
    network = tanh_network(depth=depth, width=4).make(0)
    rows = tick_counts(network, (1.0,), seed=0)
    found = {(r.order, r.quantity, r.layer): r.ticks for r in rows}
    expected = {}
    for layer in range(1, depth + 1):
        expected["simultaneous", "h", layer] = expected["sequential", "h", layer] = layer
        expected["simultaneous", "z", layer] = 2 * depth + 1 - layer
        expected["sequential", "z", layer] = 2 * depth - layer
    expected["simultaneous", "omega", 0] = 2 * depth
    expected["sequential", "omega", 0] = 2 * depth - 2
    assert found == expected
    assert all(r.ticks == r.expected for r in rows)


def test_gradients_of_upper_layers_are_exact_earlier():
    network = tanh_network(depth=3).make(0)
    found = relax(network, Order.SIMULTANEOUS, 1.0, 12, seed=0)
    assert [settling_tick(by_tick, ROUND_OFF) for by_tick in found.omega] == [6, 5, 4]


def test_decay_is_the_binomial_tail():
    network = tanh_network().make(0)
    hops = 2 * len(network.graph.blocks)
    for a, k in ((0.5, 60), (0.2, 160)):
        differences = relax(network, Order.SIMULTANEOUS, a, k + 1, seed=0).gradient
        slope = math.log(differences[k] / differences[k - 5]) / 5
        exact = math.log(not_through(k, hops, a) / not_through(k - 5, hops, a)) / 5
        assert slope == pytest.approx(exact, rel=0.03)


def test_chains():
    graph, shape = SETTLED["skips, delays, arguments"]
    assert not is_chain(as_network(graph, shape))
    assert not is_chain(as_network(chain({}), (5,)))
    assert is_chain(as_network(chain({"state": True}), (5,)))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_fixed_point_for_either_sign(sign, eta):
    """-s (phi dL/dh + z^T dh'/dh) - eta z = 0 has c z_l/phi = (c/(c - s eta))^(nu + 1 - l) delta_l;
    with s = +1 it repels, so the run begins there and must stay for some ticks."""
    nu, c, tau = 3, 2.0, 0.25
    network = tanh_network(depth=nu).make(0)
    still = timed_stream(StreamKind.STATIC, network.values, 0)
    u, y = still.u(0.0), still.y(0.0)
    states, deltas = backprop_states(network, u, y)
    names = list(network.graph.blocks)
    z = {name: (c / (c - sign * eta)) ** (nu - i) * deltas[i] / c for i, name in enumerate(names)}
    apart = []

    def prepare(name, block):
        block.h, block.z = states[names.index(name)].detach(), z[name].clone()

    def look(name, k, block):
        if k < 5:  # then the end comes along the edges
            apart.append(relative_error([block.z], [z[name]]))

    settings = frozen(tau, c, eta_z=eta, sign=sign)
    watch(network.graph, settings, [(u, y)] * 5, look, prepare=prepare)
    assert len(apart) == 15
    assert max(apart) < ROUND_OFF


def test_with_dissipation_costates_and_gradients_are_discounted():
    """c z_l/phi -> (c/(c + eta))^(nu + 1 - l) delta_l, eta omega_l/phi -> the same of G_l."""
    nu, c, tau, eta, ticks = 4, 2.0, 0.25, 0.7, 150
    network = tanh_network(depth=nu).make(0)
    still = timed_stream(StreamKind.STATIC, network.values, 0)
    u, y = still.u(0.0), still.y(0.0)
    z, omega = {}, {}

    def look(name, k, block):
        if k == ticks - 1:
            z[name], omega[name] = block.z, flat(omegas(block))

    settings = frozen(tau, c, eta_z=eta, eta_omega=eta)
    watch(network.graph, settings, itertools.repeat((u, y), ticks), look)
    _, deltas = backprop_states(network, u, y)
    gradients = network.backprop(u, y)
    for i, name in enumerate(network.graph.blocks):
        discount = (c / (c + eta)) ** (nu - i)
        assert relative_error([c * z[name]], [discount * deltas[i]]) < 1e-10
        assert relative_error([eta * omega[name]], [discount * flat(gradients[name])]) < 1e-10


def cyclic_graph(gain=0.6):
    """a reads u and c, b reads a and itself, c reads b and a; c is the readout."""
    made = Graph(
        [
            BlockSpec("a", dense(6, 5, 0), ("u", "c"), shape=(5,)),
            BlockSpec("b", dense(9, 4, 1), ("a", "b"), shape=(4,)),
            BlockSpec("c", dense(9, 3, 2), ("b", "a"), loss=mse, state=True, shape=(3,)),
        ]
    )
    for spec in made.blocks.values():
        for parameter in spec.module.parameters():
            parameter.data *= gain
    return made


def implicit(graph, u, y):
    """(I - J^T)^-1 dL/dh by block at h = f(h), and the gradient of the weights with it."""
    names, specs = list(graph.blocks), graph.blocks
    sizes = [u.shape[0] * specs[n].shape[0] for n in names]

    def split(x):
        return {n: part.view(u.shape[0], -1) for n, part in zip(names, x.split(sizes), strict=True)}

    def f(x):
        h = {"u": u, **split(x)}
        return torch.cat(
            [
                specs[n].module(torch.cat([h[p] for p in specs[n].parents], -1)).flatten()
                for n in names
            ]
        )

    x = torch.zeros(sum(sizes), dtype=F64)
    with torch.no_grad():
        for _ in range(500):
            x = f(x)
    x.requires_grad_()
    (g,) = torch.autograd.grad(mse(split(x)["c"], y), x)
    J = torch.autograd.functional.jacobian(f, x)
    z = torch.linalg.solve(torch.eye(len(g), dtype=F64) - J.T, g)
    assert (J.T @ z).norm() > 0.2 * z.norm()  # the cycle counts
    theta = {n: list(specs[n].module.parameters()) for n in names}
    found = iter(torch.autograd.grad(f(x), [t for own in theta.values() for t in own], z))
    return split(z), {n: flat([next(found) for _ in own]) for n, own in theta.items()}


@pytest.mark.parametrize("a", [1.0, 0.1])
def test_around_cycles_the_gradient_is_that_of_the_fixed_point(a):
    graph, c, tau = cyclic_graph(), 3.0, a / 3.0
    u, y, ticks = noise(3, 2, 3), noise(4, 2, 3), int(60 / a)
    z, omega = {}, {}

    def look(name, k, block):
        if k == ticks - 1:
            z[name], omega[name] = block.z, flat(omegas(block))

    watch(graph, frozen(tau, c), itertools.repeat((u, y), ticks), look)
    exact_z, exact_gradient = implicit(graph, u, y)
    for name in graph.blocks:
        assert relative_error([c * z[name]], [exact_z[name]]) < 1e-10
        assert relative_error([omega[name] / tau], [exact_gradient[name]]) < 1e-10


def test_a_study_of_a_cycle():
    network = as_network(cyclic_graph(), (3,), batch=2)
    stream = timed_stream(StreamKind.SMOOTH, network.values, 0)
    stream = dataclasses.replace(stream, looks=stream.looks[:2])
    exact = exact_gradients(network, stream)
    _, by_solve = implicit(network.graph, stream.u(stream.looks[0]), stream.y(stream.looks[0]))
    assert relative_error([exact[0]], [torch.cat(list(by_solve.values()))]) < 1e-10
    slow, fast = (
        relative_error(local_gradients(network, stream, c, 1.0)[0], exact) for c in (1e3, 1e4)
    )
    assert slow / fast == pytest.approx(10, rel=0.02)


# -- the whole study ---------------------------------------------------------------------------


def test_fit():
    speeds = [10.0, 30.0, 100.0, 300.0, 1000.0]
    law = fit(speeds, [5 * c**-1.5 for c in speeds])
    assert (law.exponent, law.factor) == (pytest.approx(-1.5), pytest.approx(5))
    assert law.spread == pytest.approx(0, abs=1e-7)
    bent = fit(speeds, [5 / c + 1e6 * (c < 100) for c in speeds])  # only the upper range counts
    assert bent.exponent == pytest.approx(-1)
    wide = fit([1.0, 100.0, 1e4], [1.0, 1e-2, 1e-4])  # a decade holds one: the fastest three
    assert wide.exponent == pytest.approx(-1)
    assert fit([10.0, 20.0], [1.0, 0.5]).spread is None
    assert fit([10.0], [1.0]) is None
    assert fit(speeds, [1.0, 1.0, 0.0, 1.0, 1.0]) is None


def test_spread_is_the_standard_error_of_the_slope():
    x = torch.log(torch.tensor([100.0, 300.0, 1000.0], dtype=F64))
    y = torch.tensor([0.1, -0.2, 0.1], dtype=F64) - x
    X = torch.stack([x, torch.ones(3, dtype=F64)], 1)
    theta = torch.linalg.solve(X.T @ X, X.T @ y)
    variance = ((y - X @ theta) ** 2).sum() * torch.linalg.inv(X.T @ X)
    found = fit([100.0, 300.0, 1000.0], torch.exp(y).tolist())
    assert found.exponent == pytest.approx(float(theta[0]))
    assert found.spread == pytest.approx(float(variance[0, 0].sqrt()))


def test_curves_are_over_seeds():
    rows = [
        SpeedRow("smooth", 1.0, c, seed, error=(seed + 1) / c, one_minus_cos=seed / c, ticks=1)
        for seed in (0, 1)
        for c in (20.0, 10.0)
    ]
    (curve,) = curves(rows)
    assert curve.speeds == [10.0, 20.0]
    assert curve.error == pytest.approx([math.sqrt(2.5) / 10, math.sqrt(2.5) / 20])
    assert curve.one_minus_cos == pytest.approx([0.05, 0.025])
    assert fits([curve])[0].error.exponent == pytest.approx(-1)
    assert fits(curves([SpeedRow("random", 1.0, c, 0, 1 / c, 1 / c, 1) for c in (1.0, 2.0)])) == []


@pytest.fixture(scope="module")
def small():
    study = SpeedStudy((100.0, 1000.0), (1.0, 0.5), (StreamKind.STATIC, StreamKind.SMOOTH), 1)
    told = []
    result = run_study(study, tanh_network(2, 5), "the command", lambda *p: told.append(p))
    assert [(done, total) for done, total, _ in told] == [(i + 1, 8) for i in range(8)]
    return result


def test_study(small):
    assert small.network == "tanh network 8-5-4, 2 blocks, 69 weights"
    assert [(r.stream, r.c_tau, r.c) for r in small.rows] == list(
        itertools.product(("static", "smooth"), (1.0, 0.5), (100.0, 1000.0))
    )
    assert max(r.error for r in small.rows if r.stream == "static") < ROUND_OFF
    assert [f.error.exponent for f in fits(curves(small.rows))] == [
        pytest.approx(-1, abs=0.05),
        pytest.approx(-1, abs=0.05),
    ]
    assert {r.c_tau for r in small.counts} == {1.0, 0.5}


def test_tables(small):
    error, angle, ticks = speed_tables(small).values()
    assert error.titles == ["stream", "c τ", "c = 100", "c = 1000", "exponent"]
    assert error.rows[0] == ["static", "1", "0", "0", "–"]
    assert re.fullmatch(r"-(1\.0|0\.9)\d+", error.rows[2][-1])
    assert re.fullmatch(r"-(2\.0|1\.9)\d+", angle.rows[2][-1])
    assert ["simultaneous", "gradient, all layers", "1", "exact", "4", "4", "0"] in ticks.rows


def test_files(small, tmp_path):
    save_speed(tmp_path, small)
    names = {"speed.csv", "speed.json", "speed.md", "speed.html"}
    assert {p.name for p in tmp_path.iterdir()} == names
    rows = list(csv.DictReader((tmp_path / "speed.csv").open()))
    assert [float(r["error"]) for r in rows] == [r.error for r in small.rows]
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["command"] == "the command"
    assert record["study"]["streams"] == ["static", "smooth"]
    assert len(record["rows"]) == 8
    assert [f["c_tau"] for f in record["fits"]] == [1.0, 0.5]
    assert record["versions"] == versions()
    assert "Relative error of the gradient" in (tmp_path / "speed.html").read_text()
    figures = speed_figures(curves(small.rows), None)
    smooth = [r.error for r in small.rows if (r.stream, r.c_tau) == ("smooth", 1.0)]
    drawn = next(c for c in figures[0].curves if c.label == "smooth, c τ = 1")
    assert list(drawn.y) == smooth
    text = (tmp_path / "speed.md").read_text()
    assert "`the command`" in text
    assert "| static | 1 | 0 | 0 | – |" in text


def test_a_picture_without_static_inputs():
    rows = [SpeedRow("random", 0.3, 10.0, 0, math.nan, 1.0, 1)]
    assert len(speed_figures(curves(rows), None)) == 2


def residual():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, u):
            return u + torch.tanh(self.linear(u))

    return Net()


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.Tanh(),
        nn.BatchNorm2d(2),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


@pytest.mark.parametrize(
    ("factory", "shape", "blocks"), [(residual, (6,), 1), (convolutional, (1, 4, 4), 3)]
)
def test_any_model(factory, shape, blocks):
    network = own_network(factory, "x", shape).make(0)
    assert len(network.graph.blocks) == blocks
    stream = timed_stream(StreamKind.SMOOTH, network.values, 0)
    exact = exact_gradients(network, stream)
    errors = [
        relative_error(local_gradients(network, stream, c, 1.0)[0], exact) for c in (1e3, 1e4)
    ]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"speeds": "10,x"}, "--speeds '10,x': give numbers"),
        ({"speeds": "10,-1"}, "--speeds: c = -1: a speed is above 0"),
        ({"speeds": "10,inf"}, "--speeds: c = inf"),
        ({"speeds": "10,10"}, "--speeds: give at least one value, and none twice"),
        ({"steps-ratio": "1.5"}, "--steps-ratio: c tau = 1.5 is not in"),
        ({"steps-ratio": "0"}, "--steps-ratio: c tau = 0 is not in"),
        ({"streams": "smooth,wild"}, "'wild' is no stream; streams: static, smooth, random"),
    ],
)
def test_what_cannot_be_studied(asked, told):
    with pytest.raises(SettingsError, match=re.escape(told)):
        parse_study(asked, 1)


def test_parse():
    study = parse_study({"speeds": "10, 1e3", "streams": "random"}, 5)
    assert study == SpeedStudy((10.0, 1000.0), SpeedStudy().steps, (StreamKind.RANDOM,), 5)
    assert parse_study({}, 2) == SpeedStudy()


def hamdist(*words):
    return CliRunner().invoke(app, ["study", "speed", *words])


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_streams, "LOOKS", 2)
    out = tmp_path / "made" / "here"
    result = hamdist(
        *("--speeds", "10,100", "--steps-ratio", "1", "--seeds", "1", "--out", str(out)),
        *("--depth", "2", "--width", "4"),
    )
    assert result.exit_code == 0, result.output
    assert "tanh network 8-4-4, 2 blocks, 56 weights" in (out / "speed.md").read_text()
    assert "Relative error of local gradients" in result.stdout
    assert "[6/6] seed 0, random, c tau 1, c 100" in result.stderr


def test_an_existing_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_streams, "LOOKS", 2)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("speed.md", "mine.txt"):
        (out / name).write_text("before")
    few = ("--speeds", "100", "--steps-ratio", "1", "--streams", "smooth", "--seeds", "1")
    few += ("--depth", "2", "--width", "4", "--out", str(out))
    result = hamdist(*few)
    assert result.exit_code == 0, result.output
    assert (out / "speed.md").read_text() == "before"
    assert "tanh network" in (tmp_path / "out-2" / "speed.md").read_text()
    assert "out-2" in result.stderr
    assert hamdist(*few, "--overwrite").exit_code == 0
    assert "tanh network" in (out / "speed.md").read_text()
    assert (out / "mine.txt").read_text() == "before"
    assert not (tmp_path / "out-3").exists()
    grid = hamdist("speed", "--overwrite")
    assert (grid.exit_code, "--overwrite belongs to" in grid.stderr) == (2, True)


def test_command_with_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_streams, "LOOKS", 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), "
        "nn.Linear(5, 2))\n"
    )
    few = ("--speeds", "100", "--steps-ratio", "1", "--streams", "smooth", "--seeds", "1")
    result = hamdist("--model", "mine:net", "--input-shape", "6", *few)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "results" / "speed" / "speed.json").read_text())
    assert record["network"] == "mine:net, 2 blocks, 47 weights"
    assert record["fits"] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model", "torch.nn:Identity"), "--model goes with --input-shape"),
        (("--input-shape", "3"), "--input-shape belongs to --model"),
        (("--model", "torch.nn:Identity", "--input-shape", "3", "--depth", "2"), "--depth"),
        (("--steps-ratio", "2"), "c tau = 2 is not in (0, 1]"),
    ],
)
def test_wrong_usage(words, told, tmp_path):
    result = hamdist(*words, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert told in result.stderr
