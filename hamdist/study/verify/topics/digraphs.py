"""Graphs with cycles: the gradient at a fixed point.

For a static input h comes to h* = f(h*), and z to the solution of its own linear equation: with
J = df/dh at h*, g = dL/dh, s = -1 and eta_z = 0

    c z -> phi (I - J^T)^{-1} g,      omega / (tau phi) -> the gradient through the fixed point

(docs: concepts/equations). (With s = +1 z grows in every tick: tracking.py.)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from hamdist.config import Settings
from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.runtime.train.train import train
from hamdist.streams.adapters import from_iterable
from hamdist.study.shared.exact_runs import float64_settings
from hamdist.study.verify.oracles.check import Check, Difference, absolute, largest
from hamdist.study.verify.oracles.networks import F64, dense, seeded

TAU, PHI = 0.5, 1.5
ORACLE = "autograd and a linear solve at the fixed point"


class Loops(nn.Module):
    """Cycles b <-> c and d -> b, self-edges on c and d, a skip a -> d. The last two of the 13
    entries of h = [a, b, c, d] (B, 13) are the prediction."""

    SIZES = (4, 4, 3, 2)

    def __init__(self) -> None:
        super().__init__()
        self.a = dense(3, 4)
        self.b = dense(9, 4)
        self.c = dense(7, 3)
        self.d = dense(9, 2)

    def forward(self, u: Tensor, h: Tensor) -> Tensor:
        a, b, c, d = torch.split(h, [*self.SIZES], dim=1)
        joined = [u], [a, c, d], [b, c], [a, c, d]
        parts = zip((self.a, self.b, self.c, self.d), joined, strict=True)
        return torch.cat([f(torch.cat(parents, dim=1)) for f, parents in parts], dim=1)


def loops_graph(net: Loops) -> Graph:
    """Return the same network as a graph of four blocks."""
    return Graph(
        [
            BlockSpec("a", net.a, (INPUT,)),
            BlockSpec("b", net.b, ("a", "c", "d"), shape=(4,)),
            BlockSpec("c", net.c, ("b", "c"), shape=(3,)),
            BlockSpec("d", net.d, ("a", "c", "d"), shape=(2,), loss=mse, state=True),
        ]
    )


def checks(full: bool) -> Iterator[Check]:  # noqa: ARG001
    """Yield the checks of the fixed point."""
    for c_tau, ticks in ((1.0, 100), (0.3, 350)):
        what = f"cycles, self-edges and a skip, static input, c tau = {c_tau:g}"
        name = f"{what}: h, c z and omega after {ticks} ticks"
        yield Check(name, ORACLE, 1e-10, partial(_fixed_point, c_tau, ticks))


def _settings(c_tau: float) -> Settings:
    return float64_settings(
        "local",
        locality={"order": "simultaneous", "target": "current", "readout": "state"},
        dynamics={
            "tau": TAU,
            "c": c_tau / TAU,
            "beta": 0.0,
            "phi": PHI,
            "eta_z": 0.0,
            "eta_omega": 1 / TAU,
        },
        metrics={"record": "trajectory"},
    )


def _sample() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    return (
        torch.randn(1, 3, generator=random, dtype=F64),
        torch.randn(1, 2, generator=random, dtype=F64),
    )


def _fixed_point(c_tau: float, ticks: int) -> Difference:
    net = seeded(Loops)
    u, y = _sample()
    stream = from_iterable([(u, y)] * ticks)
    result = train(loops_graph(net), stream, _settings(c_tau))
    theta = {key: p.detach() for key, p in net.named_parameters()}

    def f(h: Tensor, weights: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(net, weights, (u, h.reshape(1, -1)))
        return result.reshape(-1)

    h = torch.zeros(sum(Loops.SIZES), dtype=F64)
    for _ in range(ticks):
        h = f(h, theta)
    J = jacrev(f)(h, theta)
    g = torch.zeros_like(h)
    g[-2:] = h[-2:] - y.reshape(-1)
    z = torch.linalg.solve(torch.eye(len(h), dtype=F64) - J.T, g)
    leaves = {key: t.clone().requires_grad_() for key, t in theta.items()}
    exact = torch.autograd.grad((z * f(h, leaves)).sum(), list(leaves.values()))
    # Not the states at the end, where the end itself has come along some edges.
    last = result.records.values()
    our_h = torch.cat([r.h[ticks - 1].reshape(-1) for r in last if r.h is not None])
    our_z = torch.cat([r.z[ticks - 1].reshape(-1) for r in last if r.z is not None])
    pairs = {"h": (our_h, h), "c z": (our_z * c_tau / TAU / PHI, z)}
    for key, gradient in zip(leaves, exact, strict=True):
        block, _, name = key.partition(".")
        pairs[f"omega.{key}"] = (result.blocks[block].omega[name] / (TAU * PHI), gradient)
    return largest((name, absolute(a, b)) for name, (a, b) in pairs.items())
