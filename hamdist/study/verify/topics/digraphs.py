"""Graphs with cycles: the gradient at a fixed point.

For a static input h comes to h* = f(h*), and z to the solution of its own linear equation: with
J = df/dh at h*, g = dL/dh, s = -1 and eta_z = 0

    c z -> phi (I - J^T)^{-1} g,      omega / (tau phi) -> the gradient through the fixed point

(docs: concepts/equations). (With s = +1 z grows in every tick: tracking.py.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.func import jacrev

from hamdist.dynamics.blocks.hold import HoldBlock
from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.study.propagation.gradients import FrozenRunBlock, flat, frozen, omegas, watch
from hamdist.study.verify.oracles.check import Check, Difference, absolute, largest
from hamdist.study.verify.oracles.networks import F64, dense, seeded

TAU = 0.5
SIZES = [4, 4, 3, 2]


def loops_graph() -> Graph:
    """Return cycles b <-> c and d -> b, self-edges on c and d, a skip a -> d; d predicts."""
    return Graph(
        [
            BlockSpec("a", dense(3, 4), (INPUT,)),
            BlockSpec("b", dense(9, 4), ("a", "c", "d"), shape=(4,)),
            BlockSpec("c", dense(7, 3), ("b", "c"), shape=(3,)),
            BlockSpec("d", dense(9, 2), ("a", "c", "d"), shape=(2,), loss=mse, state=True),
        ]
    )


def checks(full: bool) -> Iterator[Check]:  # noqa: ARG001
    """Yield the checks of the fixed point."""
    for c_tau, ticks in ((1.0, 100), (0.3, 350)):
        title = f"cycles, self-edges and a skip, static input, c tau = {c_tau:g}"
        name = f"{title}: h, c z and omega after {ticks} ticks"
        oracle = "autograd and a linear solve at the fixed point"
        yield Check(name, oracle, 1e-10, partial(_fixed_point, c_tau, ticks))


def _fixed_point(c_tau: float, ticks: int) -> Difference:
    graph = seeded(loops_graph)
    random = torch.Generator().manual_seed(2)
    u, y = (torch.randn(1, n, generator=random, dtype=F64) for n in (3, 2))
    ours: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def look(name: str, k: int, block: FrozenRunBlock) -> None:
        if k == ticks - 1 and isinstance(block, HoldBlock):
            ours[name] = block.h[0], c_tau / TAU * block.z[0], flat(omegas(block)) / TAU

    watch(graph, frozen(TAU, c_tau / TAU), itertools.repeat((u, y), ticks), look)

    def f(h: Tensor) -> Tensor:
        states = {INPUT: u[0], **dict(zip(graph.blocks, torch.split(h, SIZES), strict=True))}
        specs = graph.blocks.values()
        return torch.cat([b.module(torch.cat([states[p] for p in b.parents])) for b in specs])

    h = torch.zeros(sum(SIZES), dtype=F64)
    with torch.no_grad():
        for _ in range(ticks):
            h = f(h)
    J, g = jacrev(f)(h), torch.zeros_like(h)
    g[-2:] = h[-2:] - y[0]
    z = torch.linalg.solve(torch.eye(len(h), dtype=F64) - J.T, g)
    theta = {name: list(spec.module.parameters()) for name, spec in graph.blocks.items()}
    exact = iter(torch.autograd.grad(f(h), [t for weights in theta.values() for t in weights], z))
    pairs = {}
    for name, h_v, z_v in zip(theta, torch.split(h, SIZES), torch.split(z, SIZES), strict=True):
        gradient = flat(next(exact) for _ in theta[name])
        for part, a, b in zip(("h", "c z", "omega"), ours[name], (h_v, z_v, gradient), strict=True):
            pairs[f"{part} of {name}"] = absolute(a, b)
    return largest(pairs.items())
