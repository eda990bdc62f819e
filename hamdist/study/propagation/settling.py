"""Ticks that a static input takes, against the exact counts (docs: concepts/equations).

A chain of nu state blocks, beta = eta = 0, from any states on. With c tau = 1

    simultaneous   h_l exact from tick l,  z_l from 2 nu + 1 - l,  omega's increment from 2 nu
    sequential     h_l exact from tick l,  z_l from 2 nu - l,      omega's increment from 2 nu - 2

and with c tau = a < 1 to a relative error eps (within 12 %)

    the smallest k with P[ Binomial(k, a) <= 2 nu - 1 ] <= eps

B: batch, P: weights of the network.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hamdist.config import Order
from hamdist.dynamics.blocks.hold import HoldBlock
from hamdist.streams.sample import generator
from hamdist.study.propagation.gradients import (
    FrozenRunBlock,
    Network,
    flat,
    frozen,
    omegas,
    ticks_to_settle,
    watch,
)
from hamdist.study.propagation.streams import F64, StreamKind, timed_stream

ROUND_OFF = 1e-12  # relative difference up to which a value counts as exact
ERRORS = (1e-3, 1e-6)
SPARE = 6  # ticks run beyond those expected


@dataclass(frozen=True, slots=True)
class CountRow:
    """Ticks until a quantity is exact: 'h' or 'z' of a layer (from 1), or 'omega', its increment in
    all layers (layer 0).

    Attributes:
        error: relative, to which the ticks are counted; 0: to round-off.
        ticks: None if it was not reached.
        expected: by docs: concepts/equations.
    """

    order: str
    c_tau: float
    quantity: str
    layer: int
    error: float
    seed: int
    ticks: int | None
    expected: int


@dataclass(frozen=True)
class Relaxation:
    """Relative differences from backpropagation, by layer and tick k: of h_k, of z_k, and of the
    increment of omega in tick k."""

    h: Sequence[Sequence[float]]
    z: Sequence[Sequence[float]]
    omega: Sequence[Sequence[float]]

    @property
    def gradient(self) -> list[float]:
        """Return the difference by tick, of the layer whose increment is furthest off."""
        return [max(by_layer) for by_layer in zip(*self.omega, strict=True)]


def is_chain(network: Network) -> bool:
    """Return True if the exact counts apply to this graph: a chain of state blocks."""
    graph = network.graph
    return (
        graph.acyclic
        and all(len(b.parents) == 1 and b.has_state for b in graph.blocks.values())
        and len(graph.blocks) == graph.depth + 1
        and all(e.delay == 1 for e in graph.edges)
    )


def relax(network: Network, order: Order, c_tau: float, ticks: int, seed: int) -> Relaxation:
    """Run `ticks` ticks of a static input, from random h and z."""
    stream = timed_stream(StreamKind.STATIC, network.values, seed)
    u, y = stream.u(0.0), stream.y(0.0)
    late = order is Order.SEQUENTIAL
    names = list(network.graph.blocks)
    h: dict[str, list[Tensor]] = {name: [] for name in names}
    z: dict[str, list[Tensor]] = {name: [] for name in names}
    omega: dict[str, list[Tensor]] = {name: [] for name in names}
    drawn = generator("static states", seed)

    def prepare(name: str, block: FrozenRunBlock) -> None:
        if isinstance(block, HoldBlock):
            block.h, block.z = (
                torch.randn(block.h.shape, generator=drawn, dtype=F64) for _ in range(2)
            )
            h[name].append(block.h)
        omega[name].append(flat(omegas(block)))

    def look(name: str, k: int, block: FrozenRunBlock) -> None:
        if k >= ticks:  # the end is still on its way to the deeper blocks
            return
        if isinstance(block, HoldBlock):
            h[name].append(block.h)
            z[name].append(block.z)
        omega[name].append(flat(omegas(block)))

    # c = 1: time is counted in ticks of tau = c tau.
    settings = frozen(c_tau, 1.0, order=order, eta_omega=0.0)
    samples, classes = itertools.repeat((u, y), ticks), network.values.classes
    watch(network.graph, settings, samples, look, classes=classes, prepare=prepare)
    states, costates = backprop_states(network, u, y)
    gradient = network.backprop(u, y)
    return Relaxation(
        h=[[_apart(v, s) for v in h[n]] for n, s in zip(names, states, strict=True)],
        z=[[_apart(v, s) for v in z[n]] for n, s in zip(names, costates, strict=True)],
        # In the sequential order omega_k is complete after tick k, else omega_{k+1} is.
        omega=[
            [_apart((b - a) / c_tau, flat(gradient[n])) for a, b in itertools.pairwise(o[late:])]
            for n, o in omega.items()
        ],
    )


def backprop_states(network: Network, u: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return h_l and delta_l = dL/dh_l of backpropagation, layer by layer."""
    states = []
    h = u
    for spec in network.graph.blocks.values():
        h = spec.module(h)
        states.append(h)
        last = spec
    prediction = h if last.output is None else last.output(h)
    if last.loss is None:
        raise TypeError("a chain ends in its readout")
    return states, list(torch.autograd.grad(last.loss(prediction, y), states))


def _apart(value: Tensor, exact: Tensor) -> float:
    return float((value - exact.detach()).norm() / exact.detach().norm())


def tick_counts(network: Network, steps: Sequence[float], seed: int) -> list[CountRow]:
    """Return counted and expected ticks of a chain (`is_chain`).

    They are exactness at c tau = 1 in both orders, and the decay at each of `steps` below 1.
    """
    orders = (Order.SIMULTANEOUS, Order.SEQUENTIAL)
    exact = [row for order in orders for row in _exact(network, order, seed)]
    return exact + [row for a in steps if a < 1 for row in _decay(network, a, seed)]


def _exact(network: Network, order: Order, seed: int) -> list[CountRow]:
    nu = len(network.graph.blocks)
    relaxation = relax(network, order, 1.0, 2 * nu + SPARE, seed)
    early = int(order is Order.SEQUENTIAL)

    def row(quantity: str, layer: int, differences: Sequence[float], expected: int) -> CountRow:
        ticks = settling_tick(differences, ROUND_OFF)
        return CountRow(order.value, 1.0, quantity, layer, 0.0, seed, ticks, expected)

    rows = [row("omega", 0, relaxation.gradient, 2 * nu - 2 * early)]
    for i in range(nu):
        rows.append(row("h", i + 1, relaxation.h[i], i + 1))
        rows.append(row("z", i + 1, relaxation.z[i], 2 * nu - i - early))
    return rows


def _decay(network: Network, a: float, seed: int) -> list[CountRow]:
    hops = 2 * len(network.graph.blocks)
    expected = [ticks_to_settle(hops, a, error) for error in ERRORS]
    # The count ends where the error stays below, so more ticks are run than are expected.
    ticks = int(1.5 * max(expected)) + SPARE
    differences = relax(network, Order.SIMULTANEOUS, a, ticks, seed).gradient
    return [
        CountRow("simultaneous", a, "omega", 0, error, seed, settling_tick(differences, error), k)
        for error, k in zip(ERRORS, expected, strict=True)
    ]


def settling_tick(differences: Sequence[float], bound: float) -> int | None:
    """Return the first tick from which on all `differences` are within `bound`."""
    beyond = [k for k, difference in enumerate(differences) if not difference <= bound]
    first = beyond[-1] + 1 if beyond else 0
    return first if first < len(differences) else None
