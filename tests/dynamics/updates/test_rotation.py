"""Adam in the axes of inputs and costates against the formulas of rotation.py, written out."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamics.helpers import F64, mlp, relative, samples, settings
from torch import nn

from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.updates.rotation import Rotation, eigenvectors
from hamdist.errors import LevelError
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable

SIZES = [4, 5, 6, 2]
EVERY, HALF, R, EPSILON = 6, 3, 0.9, 1e-3
INPUTS = {"rule": "rotated", "memory": 0.8, "look": 2, "refresh": EVERY}


def run(level, items, model=None, **fields):
    config = settings(level, **fields)
    return train(model or mlp(SIZES), from_iterable(items, outputs=2), config, loss=mse)


def axes(factor):
    return torch.linalg.eigh(factor)[1]


def by_formula(items, sides, *, lr, momentum, cost):
    """One linear layer after the other: statistics, axes, v in the new axes, the step of W and c,
    and b from it. v is kept as the full matrix of what it stands for: diag(v) in today's axes."""
    model = copy.deepcopy(mlp(SIZES))
    layers = [model[0], model[2], model[4]]
    known = [{"v": torch.zeros(1, dtype=F64), "v_c": torch.zeros(1, dtype=F64)} for _ in layers]
    for k, (u, y) in enumerate(items):
        x, outputs = [u], []
        for layer in layers:
            outputs.append(layer(x[-1]))
            x.append(torch.tanh(outputs[-1]))
        zs = torch.autograd.grad(mse(outputs[-1], y), outputs)
        for layer, x_i, z, s in zip(layers, x, zs, known, strict=False):
            x_i = x_i.detach()
            mean = x_i.mean(0)
            s["mu"] = mean if k == 0 else 0.8 * s["mu"] + 0.2 * mean
            centred = x_i - s["mu"]
            if k % 2 == 0:
                for name, rows in (("a", centred), ("b", z)):
                    now = rows.T @ rows / len(rows)
                    s[name] = now if k == 0 else 0.64 * s[name] + 0.36 * now
            if k % EVERY == 0:
                s["next"] = (
                    axes(s["a"]),
                    axes(s["b"]) if sides == "both" else torch.eye(len(s["b"]), dtype=F64),
                )
            old = s.get("q")
            if k == 0 or k % EVERY == HALF:
                s["q"] = s["next"]
            q_a, q_b = s["q"]
            if old is not None and k % EVERY == HALF:
                t_a, t_b = (q_a.T @ old[0]) ** 2, (q_b.T @ old[1]) ** 2
                s["v"] = torch.einsum("op,pq,iq->oi", t_b, s["v"], t_a)
            w, b = layer.weight.data, layer.bias.data
            g_w, g_c = z.T @ centred, z.sum(0)
            d = q_b.T @ g_w @ q_a
            s["v"] = R * s["v"] + (1 - R) * d**2
            s["v_c"] = R * s["v_c"] + (1 - R) * g_c**2
            s["m"] = momentum * s.get("m", 0) + (1 - momentum) * g_w
            s["m_c"] = momentum * s.get("m_c", 0) + (1 - momentum) * g_c
            fresh, seen = 1 - momentum ** (k + 1), 1 - R ** (k + 1)
            n = (q_b.T @ s["m"] @ q_a / fresh) / ((s["v"] / seen).sqrt() + EPSILON)
            dw = -lr * q_b @ n @ q_a.T
            dc = -lr * (s["m_c"] / fresh) / ((s["v_c"] / seen).sqrt() + EPSILON)
            w.mul_(1 - lr * cost).add_(dw)
            b.mul_(1 - lr * cost).add_(dc - dw @ s["mu"])
    return model


@pytest.mark.parametrize("sides", ["both", "inputs"])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("step", ["auto", "closed", "autograd"])
def test_steps_in_turned_axes(sides, momentum, step):
    items = samples(31, 12, 4, 2)
    learning = {"lr": 0.01, "momentum": momentum, "weight_decay": 0.1}
    learning |= {
        "adaptive": {"memory": R, "epsilon": EPSILON},
        "inputs": {**INPUTS, "sides": sides},
    }
    found = run("backprop", items, learning=learning, engine={"step": step}).model
    expected = by_formula(items, sides, lr=0.01, momentum=momentum, cost=0.1)
    assert relative(found.parameters(), expected.parameters()) <= 1e-10
    plain = run("backprop", items, learning={**learning, "inputs": "off"}).model
    assert relative(plain.parameters(), expected.parameters()) > 1e-3


def test_a_convolution_turns_the_axes_of_its_patches():
    """Two convolutions that are linear layers (kernels of one pixel) are those layers."""
    items = samples(20, 12, 4, 2)
    learning = {"lr": 0.01, "adaptive": {"epsilon": EPSILON}, "inputs": INPUTS}
    dense = mlp([4, 5, 2])
    convs = nn.Sequential(
        nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 5, 1), nn.Tanh(), nn.Conv2d(5, 2, 1), nn.Flatten()
    ).to(F64)
    for conv, layer in ((convs[1], dense[0]), (convs[3], dense[2])):
        conv.load_state_dict({"weight": layer.weight[:, :, None, None], "bias": layer.bias})
    expected = run("backprop", items, dense, learning=learning).model
    found = run("backprop", items, convs, learning=learning, partition={"cuts": ["3"]}).model
    pairs = zip(found.parameters(), expected.parameters(), strict=True)
    assert all(relative([f.flatten()], [e.flatten()]) <= 1e-9 for f, e in pairs)


def test_what_it_needs():
    with pytest.raises(LevelError, match=r"learning\.inputs 'rotated'.*learning\.adaptive"):
        run("trace", samples(3, 3, 4, 2), learning={"inputs": "rotated"})
    blocks = {"block1": {"inputs": "rotated"}}
    with pytest.raises(LevelError, match="learning.inputs 'rotated'"):
        run("trace", samples(3, 3, 4, 2), learning={"optimizer": "adam", "blocks": blocks})


def test_infinite_factors_leave_the_axes_and_the_second_moment():
    turned = Rotation()
    turned.refresh([None, torch.full((2, 2), torch.inf)])
    turned.take()
    v = torch.ones(3, 2)
    assert turned.bases == [None, None]
    assert torch.equal(turned.turned(v), v)
    assert torch.equal(turned.into(v), v)


@pytest.mark.parametrize("size", [0.0, 1e-17, 1e-19, 1.0])
def test_factors_of_tiny_numbers_have_axes(size):
    """LAPACK fails on four of these without a scale."""
    for seed in (1, 11, 22, 32):
        drawn = torch.Generator().manual_seed(seed)
        rows = torch.randn(8, 64, generator=drawn) * (torch.rand(8, 64, generator=drawn) < 0.1)
        factor = (rows * size).t() @ (rows * size) / 8
        q, none = eigenvectors([factor, torch.full((2, 2), torch.nan)])
        assert none is None
        assert torch.allclose(q.t() @ q, torch.eye(64), atol=1e-5)
        turned = q.t() @ (rows.t() @ rows) @ q
        assert size < 1e-18 or torch.allclose(turned, turned.diagonal().diag(), atol=1e-3)
