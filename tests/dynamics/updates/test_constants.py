"""Oracle: hand-written tables, and a plain simulation of the whole network with autograd.

The simulation keeps every state and message with the tick in which it was sent, and applies the
equations of equations.md literally, with constants of each block, steps of uneven length, resets
and delays.
"""

from __future__ import annotations

import itertools
import re
import warnings

import pytest
import torch
from dynamics.helpers import F64, Network, knobs, layer, linear, noise, settings

from hamdist.config import CourseSettings, DynamicsSettings, LearningSettings
from hamdist.dynamics.blocks.energy import hamiltonian, lagrangian, robust_hamiltonian
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.updates.constants import Constant, check_names, make_dynamics
from hamdist.errors import LevelError, StreamError
from hamdist.runtime.train.prepare import as_graph
from hamdist.runtime.train.train import train
from hamdist.streams import Sample, from_iterable


def dynamics(level="local", learning=None, **given):
    return make_dynamics(
        DynamicsSettings.model_validate(given),
        LearningSettings.model_validate(learning or {}),
        knobs(level),
    )


# -- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("course", "expected"),
    [
        (Constant(2.0), [2, 2, 2, 2, 2]),
        (CourseSettings(values=(1.0, 0.5)), [1, 0.5, 0.5, 0.5, 0.5]),
        (CourseSettings(values=(1.0, 0.5, 3.0), cycle=True), [1, 0.5, 3, 1, 0.5]),
    ],
)
def test_courses(course, expected):
    assert [course(k) for k in range(5)] == expected


@pytest.mark.parametrize(
    ("learning", "first", "later"),
    [  # PyTorch: no dampening without momentum, and none in the first step
        ({"momentum": 0.0, "dampening": 0.6}, None, 2.0),
        ({"momentum": 0.1, "dampening": 0.0}, None, 2.0),
        ({"momentum": 0.1, "dampening": 0.6}, 2.0, 0.8),
        ({"momentum": 0.1, "dampening": 0.6, "first_step": "dampened"}, None, 0.8),
        ({"momentum": 0.0, "dampening": 0.6, "first_step": "dampened"}, None, 0.8),
    ],
)
def test_the_first_step(learning, first, later):
    d = dynamics(learning=learning, tau=0.5)
    assert d.first_phi == first
    assert d.phi(0) == d.phi(9) == pytest.approx(later, rel=1e-15)


def test_constants_of_a_block():
    d = dynamics(
        tau=0.5,
        c=1.0,
        eta=0.1,
        blocks={
            "a*": {"c": 0.3, "eta_z": 0.7},
            "b": {"beta": {"0.weight": 0.4, "*": 0.1}, "eta": 0.2},
        },
    )
    a, b, other = d.of("a1"), d.of("b"), d.of("c")
    assert (a.c, a.eta_z, a.eta_omega) == (0.3, 0.7, 0.1)
    assert (b.c, b.eta_z, b.eta_omega) == (1.0, 0.2, 0.2)
    assert (other.c, other.eta_z, other.eta_omega) == (1.0, 0.1, 0.1)
    assert b.rates(["0.weight", "0.bias"]) == [0.4, 0.1]
    assert other.rates(["0.weight"]) == [0.2]  # lr / tau


def test_a_name_goes_before_patterns():
    """So that an override of one block or parameter holds, wherever it is listed."""
    d = dynamics(
        blocks={"*": {"c": 0.5, "beta": {"*": 0.3, "0.weight": 0.0}}, "b": {"c": 0.2}}, tau=1.0
    )
    assert (d.of("a").c, d.of("b").c) == (0.5, 0.2)
    assert d.of("a").rates(["0.weight", "0.bias"]) == [0.0, 0.3]


@pytest.mark.parametrize(
    ("level", "given", "message"),
    [
        ("trace", {"blocks": {"block[0]": {"c": 0.5}}}, "c tau = 0.5 with presentation 'pulse'"),
        ("local", {"tau": 0.5, "blocks": {"a": {"c": 3}}}, "dynamics.blocks.a: c tau = 1.5"),
        ("local", {"tau": {"values": [0.5, 2]}, "c": 1}, "c tau = 2 is above 1"),
        ("local", {"tau": {"values": [0.5, 0]}}, "every step of integration is above 0"),
        ("local", {"tau": "stamps"}, "give dynamics.c, dynamics.beta, dynamics.phi, dynamics.eta"),
        ("trace", {"tau": {"values": [0.5]}}, "changes from tick to tick.*use presentation 'hold'"),
        ("trace", {"reset": {"omega": "sample"}}, "reset with presentation 'pulse'"),
        ("trace", {"blocks": {"a": {"c": 0.5}}}, "c tau = 0.5 with presentation 'pulse'"),
    ],
)
def test_what_cannot_run_is_refused(level, given, message):
    with pytest.raises(LevelError, match=message):
        dynamics(level, **given)


def test_names_that_fit_nothing_are_refused():
    parameters = {"a": ["weight"], "b": ["weight", "bias"]}
    check_names(dynamics(blocks={"*": {"beta": {"bias": 0.1}}}), parameters)
    with pytest.raises(LevelError, match="dynamics.blocks.c: no such block; known: a, b"):
        check_names(dynamics(blocks={"c": {"c": 1}}), parameters)
    with pytest.raises(LevelError, match=r"blocks.b\*: every block that it fits \(b\) is taken by"):
        check_names(dynamics(blocks={"*": {"c": 1}, "b*": {"c": 1}}), parameters)
    with pytest.raises(LevelError, match="blocks.a.beta.bias: no such parameter; known: weight"):
        check_names(dynamics(blocks={"a": {"beta": {"bias": 0.1}}}), parameters)


# -- the simulation ------------------------------------------------------------------------------

TICKS = 24
SEQUENCES = {5, 6, 13}  # samples that end one


def graph(state):
    """a(u), b(a with delay 3, b), and the readout of b and u; `state`: a readout with a state."""
    return Graph(
        [
            BlockSpec("a", layer(3, 4, 0), ("u",)),
            BlockSpec("b", layer(4 + 5, 5, 1), ("a", "b"), delays={"a": 3}, shape=(5,)),
            BlockSpec("y", linear(5 + 3, 2, 2), ("b", "u"), loss=mse, state=state, shape=(2,)),
        ]
    )


C = {"a": 1.0, "b": 0.6, "y": 1.2}
ETA = {"a": 0.3, "b": 0.1, "y": 0.2}
BETA = {"a": [0.3, 0.1], "b": [0.2, 0.2], "y": [0.05, 0.4]}
COST = 0.05
PHI = [1.0, 0.4, 0.7]


def simulate(net, items, taus, order, state, resets, hold):
    """(h, z, omega, theta, H' and L by tick) with the equations written out."""
    modules = {b: spec.module for b, spec in net.blocks.items()}
    sizes = {"a": 4, "b": 5, "y": 2}
    B = items[0].u.shape[0]
    states = ["a", "b", *(["y"] if state else [])]
    h = {v: torch.zeros(B, sizes[v], dtype=F64) for v in states}
    z = {v: torch.zeros(B, sizes[v], dtype=F64) for v in states}
    theta = {v: [p.detach().clone() for p in modules[v].parameters()] for v in modules}
    omega = {v: [torch.zeros_like(t) for t in theta[v]] for v in modules}
    names = {v: [n for n, _ in modules[v].named_parameters()] for v in modules}
    sent, posted = {}, {}  # (parent, tick) -> h sent; (child, parent, tick) -> message
    cleared = {"h": -99, "z": -99}
    sequential = order == "sequential"
    pending = None  # the tick before, whose z (and weights) are not complete
    out = []
    delay = {("a", "b"): 3}

    def f(v, inputs, weights):
        named = dict(zip(names[v], weights, strict=True))
        return torch.func.functional_call(modules[v], named, (torch.cat(inputs, -1),))

    def read(p, v, k, ahead=0):
        d = delay.get((p, v), 1)
        at = k - d + ahead
        if at < 0 or at < cleared["h"]:
            return torch.zeros(B, sizes[p], dtype=F64)
        return sent[p, at]

    def step_weights(v, g, tau):
        g = [gi + COST * t for gi, t in zip(g, theta[v], strict=True)]
        later = [o + tau * (gi - ETA[v] * o) for o, gi in zip(omega[v], g, strict=True)]
        used = omega[v] if order == "simultaneous" else later
        theta[v] = [t - tau * b * o for t, o, b in zip(theta[v], used, BETA[v], strict=True)]
        omega[v] = later

    def loss_of(v, inputs, target, phi):
        leaves = [i.clone().requires_grad_() for i in inputs]
        weights = [t.clone().requires_grad_() for t in theta[v]]
        with torch.enable_grad():
            L = mse(f(v, leaves, weights), target)
        wrt = leaves + weights
        grads = torch.autograd.grad(phi * L, wrt)
        return float(L.detach()), grads[: len(leaves)], list(grads[len(leaves) :])

    for k in range(TICKS + 1):
        n = min(k // hold, len(items) - 1)
        if pending is not None:
            tau, arrived, own, waiting = pending
            for v in states:
                total = own.get(v, torch.zeros_like(z[v])).clone()
                for (child, parent), sent_at in arrived.get(v, []):
                    if sent_at >= 0 and sent_at >= cleared["z"]:
                        total = total + posted[child, parent, sent_at]
                z[v] = z[v] + tau * (total - C[v] * z[v] - ETA[v] * z[v])
            for v, (leaf_out, weights) in waiting.items():
                g = torch.autograd.grad(leaf_out, weights, C[v] * z[v])
                step_weights(v, list(g), tau)
        due = {q for q, when in resets.items() if when == "sample" and k and k % hold == 0}
        due |= {
            q
            for q, when in resets.items()
            if when == "sequence" and k % hold == 0 and k // hold - 1 in SEQUENCES
        }
        if k == TICKS:
            out.append((dict(h), dict(z), None, None))
            return out, theta, omega
        if "h" in due:
            h = {v: torch.zeros_like(x) for v, x in h.items()}
            cleared["h"] = k
        if "z" in due:
            z = {v: torch.zeros_like(x) for v, x in z.items()}
        if "omega" in due:
            omega = {v: [torch.zeros_like(o) for o in os] for v, os in omega.items()}
        tau, phi, u, target = taus[k], PHI[k % 3], items[n].u, items[n].y
        kinetic = sum(
            0.5 * b * float(o.square().sum())
            for v in modules
            for o, b in zip(omega[v], BETA[v], strict=True)
        )
        cost = 0.5 * COST * sum(float(t.square().sum()) for v in modules for t in theta[v])
        before_h, before_z = dict(h), dict(z)
        work, waiting, new_h, messages = 0.0, {}, {}, {}
        gs = {}
        parents = {"a": ["u"], "b": ["a", "b"], "y": ["b", "u"]}
        for v in states:
            inputs = [u if p == "u" else read(p, v, k) for p in parents[v]]
            leaves = [i.clone().requires_grad_() for i in inputs]
            weights = [t.clone().requires_grad_() for t in theta[v]]
            with torch.enable_grad():
                value = f(v, leaves, weights)
            work += C[v] * float((z[v] * (value.detach() - h[v])).sum())
            grads = torch.autograd.grad(value, leaves + weights, C[v] * z[v], retain_graph=True)
            for p, g in zip(parents[v], grads, strict=False):
                if p != "u":
                    messages[v, p] = g
            gs[v] = list(grads[len(leaves) :])
            waiting[v] = (value, weights)
            new_h[v] = h[v] + tau * C[v] * (value.detach() - h[v])
        own, L = {}, 0.0
        if state:
            at = new_h["y"] if sequential else h["y"]
            L = float(mse(at, target))
            own["y"] = phi * (at - target) / B
        else:
            for v in states:
                sent[v, k] = new_h[v]
            b = read("b", "y", k, ahead=int(sequential))
            L, (to_b, _), g = loss_of("y", [b, u], target, phi)
            messages["y", "b"] = to_b
            step_weights("y", g, tau)
        for v in states:
            sent[v, k] = new_h[v]
        for (child, parent), m in messages.items():
            posted[child, parent, k] = m
        if not sequential:
            for v in states:
                step_weights(v, gs[v], tau)
            waiting = {}
        h = new_h
        if "z" in due:
            cleared["z"] = k
        arrived = {}
        for child, parent in [("b", "a"), ("b", "b"), ("y", "b")]:
            arrives = k + 1 - delay.get((parent, child), 1)
            arrived.setdefault(parent, []).append(((child, parent), arrives))
        pending = (tau, arrived, own, waiting)
        energies = (
            phi * L + cost + work,
            phi * L + cost + kinetic,
            phi * L + cost + work - kinetic,
        )
        out.append((before_h, before_z, energies, L))
    raise AssertionError


RESETS = [
    {},
    {"h": "sample", "z": "sample"},
    {"h": "sequence", "z": "sequence", "omega": "sequence"},
    {"z": "sample", "omega": "sequence"},
    {"h": "sequence"},
]


ORDERS, CLOCKS = ["simultaneous", "omega-first", "sequential"], ["even", "uneven", "stamps"]
CASES = [  # every two of them meet
    (order, state, resets, CLOCKS[(i + k + state) % 3])
    for i, order in enumerate(ORDERS)
    for k, resets in enumerate(RESETS)
    for state in (True, False)
]


@pytest.mark.parametrize(("order", "state", "resets", "clock"), CASES, ids=str)
def test_against_the_simulation(order, state, resets, clock):
    hold = 2 if resets.get("h") == "sample" else 1
    count = TICKS // hold
    gaps = [0.5, 0.2, 0.4, 0.3] if clock != "even" else [0.5]
    per_sample = list(itertools.islice(itertools.cycle(gaps), count))
    times = [0.0, *itertools.accumulate(hold * g for g in per_sample)]
    items = [
        Sample(noise(n, 2, 3), noise(100 + n, 2, 2), n in SEQUENCES, times[n]) for n in range(count)
    ]
    taus = [per_sample[k // hold] for k in range(TICKS)]
    if clock == "stamps":
        taus = [(times[k // hold + 1] - times[k // hold]) / hold for k in range(TICKS)]
        taus[-hold:] = [taus[-hold - 1]] * hold  # the last step is as long as the one before
        tau = "stamps"
    else:
        tau = {"values": taus} if clock == "uneven" else 0.5
    config = settings(
        "local",
        locality={"order": order, "target": "current", "speed": hold},
        dynamics={
            "tau": tau,
            "c": 1.0,
            "eta": 0.3,
            "beta": 0.3,
            "phi": {"values": PHI, "cycle": True},
            "weight_cost": COST,
            "reset": resets,
            "blocks": {
                v: {
                    **({"c": C[v]} if state or v != "y" else {}),
                    "eta": ETA[v],
                    "beta": {"*weight": BETA[v][0], "*bias": BETA[v][1]},
                }
                for v in C
            },
        },
        metrics={"record": "trajectory"},
        loss="mse",
    )
    net = graph(state)
    expected, theta, _ = simulate(net, items, taus, order, state, resets, hold)
    network = Network(net, config, items).run()
    records = {name: node.records() for name, node in network.nodes.items()}
    states = ["a", "b", *(["y"] if state else [])]
    for k in range(TICKS):
        h, z, _, _ = expected[k]
        for v in states:
            torch.testing.assert_close(records[v].h[k], h[v], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(records[v].z[k], z[v], rtol=1e-10, atol=1e-12)
    sums = [robust_hamiltonian(records), lagrangian(records), hamiltonian(records)]
    for i, (ticks, found) in enumerate(sums):
        assert ticks[:TICKS].tolist() == list(range(TICKS))
        wanted = torch.tensor([e[2][i] for e in expected[:TICKS]], dtype=F64)
        torch.testing.assert_close(found[:TICKS], wanted, rtol=1e-10, atol=1e-12)
    if order == "sequential" or state:
        return  # what is left when the stream ends differs by a tick there
    for v in ("a",):
        for found, wanted in zip(network.theta(v), theta[v], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


# -- time stamps ---------------------------------------------------------------------------------

STAMPS = {"tau": "stamps", "c": 1.0, "beta": 0.1, "phi": 1.0, "eta": 0.5}


def stamped(times):
    return [Sample(noise(n, 2, 3), noise(n, 2, 2), time=t) for n, t in enumerate(times)]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.0, 0.5, None, 1.0], "sample 2 has no time stamp, but dynamics.tau is 'stamps'"),
        ([0.0, 0.5, 2.0], r"sample 1: a step of tau = 1.5 s .* makes c tau = 1.5"),
        ([0.0, 0.5, 0.5], "sample 2 has time stamp 0.5 s, .* time stamps have to increase"),
        ([0.0], r"sample 0: a step of tau = nan"),
    ],
)
def test_time_stamps_that_are_of_no_use(times, message):
    config = settings("local", dynamics=STAMPS, loss="mse")
    with pytest.raises(StreamError, match=message):
        train(linear(3, 2, 0), from_iterable(stamped(times)), config)


def test_states_that_are_cleared_before_a_prediction_are_refused():
    config = settings("local", dynamics={"reset": {"h": "sample"}}, loss="mse")
    model = torch.nn.Sequential(layer(3, 4, 0), linear(4, 2, 1))
    with pytest.raises(LevelError, match="speed 1: .*1 ticks later; use locality.speed 2 or more"):
        train(model, from_iterable(stamped([None] * 3)), config)
    with pytest.raises(LevelError, match="metrics.record 'energy' with presentation 'pulse'"):
        train(
            model,
            from_iterable(stamped([None] * 3)),
            settings("trace", metrics={"record": "energy"}, loss="mse"),
        )


def test_what_the_settings_do_not_do_is_said():
    items = stamped([None] * 8)
    model = torch.nn.Sequential(layer(3, 4, 0), linear(4, 2, 1))

    def told(level="local", **given):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return train(model, from_iterable(items), settings(level, loss="mse", **given)).warnings

    for given, text in [
        ({"dynamics": {"reset": {"h": "sequence"}}}, "of the last 1 sample.s. of a sequence"),
        ({"dynamics": {"reset": {"z": "sample"}}}, "costates are cleared before"),
        ({"dynamics": {"beta": 0.1}, "learning": {"lr": 3}}, "learning.lr 3 has no effect"),
    ]:
        assert any(re.search(text, line) for line in told(**given)), text
        others = told(locality={"speed": 3}) + told(learning={"lr": 0.1})
        assert not any(re.search(text, line) for line in others), text
    assert any("no feed-forward pass" in t for t in told("delay-free", dynamics={"c": 0.5}))
    with pytest.raises(LevelError, match="blocks.block1.c: 'block1' is an output net"):
        told(dynamics={"blocks": {"block1": {"c": 0.5}}})


@pytest.mark.parametrize("speed", ["inf", 12])
def test_the_first_step_of_held_samples(speed):
    """Oracle: torch.optim.SGD. The first phi lasts until the weights have moved."""
    items = [(noise(n, 2, 3), noise(100 + n, 2, 2)) for n in range(6)]
    model = torch.nn.Sequential(layer(3, 4, 0), layer(4, 4, 1), linear(4, 2, 2))
    learning = {"lr": 0.1, "momentum": 0.5, "dampening": 0.4}
    locality = {"speed": speed, "update": "last-tick"}
    config = settings("local", loss="mse", learning=learning, locality=locality)
    network = Network(as_graph(model, config, from_iterable(items).spec, mse), config, items).run()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5, dampening=0.4)
    for u, y in items:
        sgd.zero_grad()
        mse(model(u), y).backward()
        sgd.step()
    found = [t for name in network.nodes for t in network.theta(name)]
    for mine, theirs in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-14)


def test_recording_changes_nothing_and_thins_out():
    config = settings("local", loss="mse", learning={"momentum": 0.5})
    items = stamped([None] * 40)
    model = torch.nn.Sequential(layer(3, 4, 0), linear(4, 2, 1))
    plain = train(model, from_iterable(items), config)
    every = config.model_copy(
        update={"metrics": config.metrics.model_validate({"record": "energy", "record_every": 7})}
    )
    recorded = train(model, from_iterable(items), every)
    assert recorded.records["block0"].tick.tolist() == [0, 7, 14, 21, 28, 35]
    assert recorded.records["block0"].h is None
    assert not plain.records
    for key, weight in plain.model.state_dict().items():
        assert torch.equal(recorded.model.state_dict()[key], weight)
