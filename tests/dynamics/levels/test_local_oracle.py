"""Oracle: the held presentation with an output net, written out with matrices (equations.md).

Every block is a list of Linear + tanh layers (the readout's last layer has no tanh). No autograd,
no schedule: what a block reads at tick k is what its neighbours sent at tick k - d.
"""

from __future__ import annotations

import pytest
import torch
from dynamics.helpers import Network, layer, linear, relative, samples, settings
from torch import nn

from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable


class Group:
    """Layers (W, b) of one block, its h, z and omega."""

    def __init__(self, module: nn.Sequential, batch: int, *, readout: bool) -> None:
        self.layers = [
            [m.weight.detach().clone(), m.bias.detach().clone()]
            for m in module.modules()
            if isinstance(m, nn.Linear)
        ]
        self.omega = [[torch.zeros_like(t) for t in pair] for pair in self.layers]
        self.readout = readout
        outputs = self.layers[-1][0].shape[0]
        self.z = torch.zeros(batch, outputs, dtype=torch.float64)
        self.h = [torch.zeros(batch, outputs, dtype=torch.float64)]  # h_0, h_1, ...
        self.sent: list = []  # M_0, M_1, ...

    def f(self, x):
        """f(x), and the input of every layer and its output."""
        passed = []
        for i, (w, b) in enumerate(self.layers):
            y = x @ w.T + b
            if not (self.readout and i == len(self.layers) - 1):
                y = torch.tanh(y)
            passed.append((x, y))
            x = y
        return x, passed

    def products(self, passed, cotangent):
        """cotangent^T df/dx and, per layer, cotangent^T df/d(W, b)."""
        g = []
        for i in reversed(range(len(self.layers))):
            x, y = passed[i]
            linear_last = self.readout and i == len(self.layers) - 1
            delta = cotangent if linear_last else cotangent * (1 - y**2)
            g.append([delta.T @ x, delta.sum(0)])
            cotangent = delta @ self.layers[i][0]
        return cotangent, g[::-1]


def simulate(modules, items, delays, *, hold=1, order="omega-first", tau=1.0, c=None, lr=0.1,
             phi=None, eta_z=0.0, eta_omega=None, current=False):  # fmt: skip
    """The groups after all samples. delays[i]: of the edge into block i (the first: 1)."""
    c = 1 / tau if c is None else c
    phi = 1 / tau if phi is None else phi
    eta_omega = 1 / tau if eta_omega is None else eta_omega
    beta = lr / tau
    batch = len(items[0][0])
    last = len(modules) - 1
    groups = [Group(m, batch, readout=i == last) for i, m in enumerate(modules)]
    depths = [sum(delays[: i + 1]) - 1 for i in range(len(modules))]

    def update(group, g):
        for pair, omegas, gradients in zip(group.layers, group.omega, g, strict=True):
            for j in range(2):
                old = omegas[j]
                gradient = 0 if gradients is None else gradients[j]
                omegas[j] = old + tau * (gradient - eta_omega * old)
                by = old if order == "simultaneous" else omegas[j]
                pair[j] = pair[j] - tau * beta * by

    def complete(i, k):
        """z_k of group i from z_{k-1} and M_{k-1}."""
        at = k - delays[i + 1]
        arrived = groups[i + 1].sent[at] if at >= 0 else None
        if k > 0:
            groups[i].z = (1 - c * tau - tau * eta_z) * groups[i].z
            if arrived is not None:
                groups[i].z = groups[i].z + tau * arrived

    for k in range(len(items) * hold + depths[-1]):
        for i, group in enumerate(groups):
            if k >= len(items) * hold + depths[i]:
                continue  # the end of the stream has reached it
            sent = max(0, k - delays[i] + 1)  # in tick k - d a parent sent its h_{k - d + 1}
            x = groups[i - 1].h[sent] if i else items[k // hold][0]
            nothing = [None] * len(group.layers)
            if group.readout:
                since = k - (0 if current else depths[i])  # since its sample entered
                target = None
                if since >= 0 and since // hold < len(items):
                    target = items[since // hold][1]
                if target is None:
                    group.sent.append(None)
                    update(group, nothing)
                    continue
                y, passed = group.f(x)
                message, g = group.products(passed, phi * (y - target) / batch)
                group.sent.append(message)
                update(group, g)
                continue
            complete(i, k)
            f, passed = group.f(x)
            message, g = group.products(passed, c * group.z)
            group.sent.append(message)
            update(group, g)
            group.h.append(group.h[-1] + c * tau * (f - group.h[-1]))
    for i in range(last):  # the end has come: every state block is left with h_K and z_K
        complete(i, len(items) * hold + depths[i])
    return groups


def delay_free(modules, items, *, lr):
    """HL Eq. 10, sample by sample: the forward is that of the sample, block after block with the
    weights of today; every block meets the message that its child sent in the sample before."""
    batch = len(items[0][0])
    last = len(modules) - 1
    groups = [Group(m, batch, readout=i == last) for i, m in enumerate(modules)]
    sent = [None] * len(modules)  # the latest message of each block
    losses = []
    for u, target in items:
        x, before = u, list(sent)
        for i, group in enumerate(groups):
            y, passed = group.f(x)
            cotangent = before[i + 1] if i < last else (y - target) / batch
            if i == last:
                losses.append(float(0.5 * (y - target).square().sum() / batch))
            if cotangent is not None:
                sent[i], g = group.products(passed, cotangent)
                for pair, gradients in zip(group.layers, g, strict=True):
                    pair[0], pair[1] = pair[0] - lr * gradients[0], pair[1] - lr * gradients[1]
            x = y
    return groups, losses


def chain(modules, delays) -> Graph:
    return Graph(
        BlockSpec(
            f"b{i}",
            module,
            ("u" if i == 0 else f"b{i - 1}",),
            delays={} if i == 0 else {f"b{i - 1}": delays[i]},
            loss=mse if i == len(modules) - 1 else None,
        )
        for i, module in enumerate(modules)
    )


def check(modules, delays, items, config, **oracle):
    result = train(chain(modules, delays), from_iterable(items, outputs=2), config)
    groups = simulate(modules, items, delays, **oracle)
    for i, group in enumerate(groups):
        found = result.blocks[f"b{i}"]
        wanted = [t for pair in group.layers for t in pair]
        assert relative(_parameters(modules[i]), wanted) > 1e-3, "it did not learn"
        assert relative(found.theta.values(), wanted) <= 1e-12, f"theta of b{i}"
        omega = [t for pair in group.omega for t in pair]
        assert relative(found.omega.values(), omega) <= 1e-11, f"omega of b{i}"
        if not group.readout:
            torch.testing.assert_close(found.h, group.h[-1], rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(found.z, group.z, rtol=1e-11, atol=1e-13)


def _parameters(module):
    return [p.detach() for p in module.parameters()]


def layers():
    return [layer(4, 5, 0), layer(5, 6, 1), layer(6, 5, 2), nn.Sequential(linear(5, 2, 3))]


def groups_of_two():
    return [
        nn.Sequential(layer(4, 5, 0), layer(5, 6, 1)),
        nn.Sequential(layer(6, 5, 2), layer(5, 4, 3)),
        nn.Sequential(layer(4, 3, 4), linear(3, 2, 5)),
    ]


CHAINS = {"local": layers, "group": groups_of_two}


@pytest.mark.parametrize("order", ["omega-first", "simultaneous"])
@pytest.mark.parametrize("hold", [1, 3])
@pytest.mark.parametrize("level", CHAINS)
def test_level(level, hold, order):
    """eta_z = 0, eta_omega = 1/tau, c tau = 1: what the levels run with."""
    modules = CHAINS[level]()
    config = settings(level, locality={"speed": hold, "order": order}, learning={"lr": 0.1})
    items = samples(40, 3, 4, 2)
    check(modules, [1] * len(modules), items, config, hold=hold, order=order)


@pytest.mark.parametrize("delays", [[1, 2, 1, 3], [1, 1, 4, 2]])
@pytest.mark.parametrize("hold", [1, 2])
def test_unequal_delays(delays, hold):
    """The readout still compares with the target of the sample that its input belongs to."""
    config = settings("local", locality={"speed": hold}, learning={"lr": 0.1})
    check(layers(), delays, samples(40, 3, 4, 2), config, hold=hold)


@pytest.mark.parametrize(("tau", "c"), [(0.5, None), (0.5, 1.2), (1.0, 0.3)])
@pytest.mark.parametrize("etas", [{}, {"eta_z": 0.2, "eta_omega": 0.4}, {"eta": 0.3}])
def test_constants(tau, c, etas):
    """The lag of the differential equation, dissipation of either costate, momentum."""
    dynamics = {"tau": tau, **({} if c is None else {"c": c}), **etas}
    config = settings("local", dynamics=dynamics, learning={"lr": 0.1})
    eta_z = etas.get("eta_z", etas.get("eta", 0.0))
    eta_omega = etas.get("eta_omega", etas.get("eta"))
    items = samples(40, 3, 4, 2)
    check(
        layers(), [1, 1, 2, 1], items, config, tau=tau, c=c, eta_z=eta_z, eta_omega=eta_omega
    )  # fmt: skip


def test_target_current_is_the_literal_algorithm():
    """The prediction of an older sample meets the target of the present one."""
    config = settings("local", locality={"target": "current"}, learning={"lr": 0.1})
    check(layers(), [1, 1, 1, 1], samples(40, 3, 4, 2), config, current=True)


def test_missing_targets():
    """Without a target the readout sends zeros; omega falls, with momentum weights go on."""
    items = [(u, None if n % 4 == 2 else y) for n, (u, y) in enumerate(samples(40, 3, 4, 2))]
    config = settings("local", learning={"lr": 0.1, "momentum": 0.5})
    check(layers(), [1, 1, 1, 1], items, config, eta_omega=0.5)


def test_the_target_belongs_to_the_sample_presented_d_ticks_before():
    """By its own loss: an output net on the input's copy, three ticks behind the input."""
    modules = [nn.Identity(), nn.Identity(), nn.Identity(), nn.Identity()]
    items = [(u, u.clone()) for u, _ in samples(10, 3, 2, 2)]
    config = settings("local", metrics={"window": 1})
    result = train(chain(modules, [1, 1, 1, 1]), from_iterable(items), config)
    windows = result.windows["b3"]
    assert [w.first for w in windows] == list(range(10))  # every sample, the last ones too
    assert [w.mean_loss for w in windows] == [0.0] * 10


@pytest.mark.parametrize("hold", [1, 3])
@pytest.mark.parametrize("delays", [[1, 1, 1, 1], [1, 2, 1, 3]])
def test_where_a_held_block_stops(delays, hold):
    """The end reaches a block of a chain depth ticks after the last tick of the last sample."""
    config = settings("local", locality={"speed": hold})
    done = {}

    def after(node, event):
        if node.tick is not None:
            done[node.name] = node.tick

    network = Network(chain(layers(), delays), config, samples(6, 3, 4, 2)).run(after=after)
    assert done == {n: 6 * hold + network.graph.depths[n] for n in network.graph.blocks}
    assert network.graph.depths["b3"] == sum(delays) - 1


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_delay_free(tau):
    modules, items = layers(), samples(40, 3, 4, 2)
    config = settings(
        "delay-free", learning={"lr": 0.1}, dynamics={"tau": tau}, metrics={"window": 1}
    )
    result = train(chain(modules, [1] * 4), from_iterable(items), config)
    groups, losses = delay_free(modules, items, lr=0.1)
    for i, group in enumerate(groups):
        wanted = [t for pair in group.layers for t in pair]
        assert relative(_parameters(modules[i]), wanted) > 1e-3, "it did not learn"
        assert relative(result.blocks[f"b{i}"].theta.values(), wanted) <= 1e-12
    found = [w.mean_loss for w in result.windows["b3"]]
    assert found == pytest.approx(losses, rel=1e-12)
