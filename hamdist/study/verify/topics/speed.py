"""From local to backpropagation: the limits of fast signals and of static inputs.

    smooth input     error ~ 1/c, 1 - cos ~ 1/c^2, Richardson's 2 G_2c - G_c ~ 1/c^2
    static input     exact from a known tick on, or to any error after a known number of ticks

(docs: concepts/equations; nu blocks, l from 1). Cycles are in digraphs.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from hamdist.config import Order
from hamdist.study.propagation.gradients import (
    exact_gradients,
    local_gradients,
    one_minus_cos,
    relative_error,
)
from hamdist.study.propagation.report import fit
from hamdist.study.propagation.settling import CountRow, tick_counts
from hamdist.study.propagation.streams import StreamKind, timed_stream
from hamdist.study.propagation.study import tanh_network
from hamdist.study.verify.oracles.check import Check

SPEEDS = (100.0, 300.0, 1000.0)
AUTOGRAD = "autograd on the merged module"

Measure = Callable[[Sequence[Tensor], Sequence[Tensor]], float]


def checks(full: bool) -> Iterator[Check]:
    """Yield the checks of smooth and of static inputs."""
    yield from _smooth(full)
    yield from _static(full)


def _smooth(full: bool) -> Iterator[Check]:
    for a in (1.0, 0.5, 0.1) if full else (1.0,):
        for seed in range(3 if full else 1):
            title = f"smooth input, 3 layers, c tau = {a:g}, seed {seed}"
            name = f"{title}: |exponent + 1| of the gradient's relative error, by c"
            yield Check(name, AUTOGRAD, 0.02, partial(_from_order, -1, relative_error, a, seed))
            name = f"{title}: |exponent + 2| of 1 - cos, by c"
            yield Check(name, AUTOGRAD, 0.05, partial(_from_order, -2, one_minus_cos, a, seed))
    yield Check(
        "smooth input, 3 layers: |exponent + 2| of the error of 2 G_2c - G_c, by c",
        AUTOGRAD,
        0.05,
        partial(_from_order, -2, relative_error, 1.0, 0, richardson=True),
    )


def _from_order(
    order: int, measure: Measure, a: float, seed: int, richardson: bool = False
) -> float:
    """Return how far the exponent of `measure` is from `order`."""
    network = tanh_network().make(seed)
    stream = timed_stream(StreamKind.SMOOTH, network.values, seed)
    exact = exact_gradients(network, stream)

    def gradients(c: float) -> Sequence[Tensor]:
        once, _ = local_gradients(network, stream, c, a)
        if not richardson:
            return once
        twice, _ = local_gradients(network, stream, 2 * c, a)
        return [2 * g2 - g1 for g1, g2 in zip(once, twice, strict=True)]

    slope = fit(SPEEDS, [measure(gradients(c), exact) for c in SPEEDS])
    return math.nan if slope is None else abs(slope.exponent - order)


def _static(full: bool) -> Iterator[Check]:
    for depth in (2, 3, 5) if full else (3,):
        title = f"static input, {depth} layers"
        for order in (Order.SIMULTANEOUS, Order.SEQUENTIAL):
            yield Check(
                f"{title}, c tau = 1, {order.value}: first exact tick of h_l, z_l, omega's step",
                "l; 2 nu + 1 - l or 2 nu - l; 2 nu or 2 nu - 2",
                0.0,
                partial(_exact_ticks, depth, order),
            )
        for a in (0.5, 0.1) if full else (0.5,):
            yield Check(
                f"{title}, c tau = {a:g}: ticks until an error of 1e-3 and 1e-6 (relative)",
                "the smallest k with P[Binomial(k, c tau) <= 2 nu - 1] <= error",
                0.12,
                partial(_decay_ticks, depth, a),
            )


def _exact_ticks(depth: int, order: Order) -> float:
    rows = tick_counts(tanh_network(depth=depth).make(1), (), seed=1)
    return max(_off(row) for row in rows if row.order == order.value)


def _decay_ticks(depth: int, a: float) -> float:
    rows = tick_counts(tanh_network(depth=depth).make(1), (a,), seed=1)
    return max(_off(row) / row.expected for row in rows if row.c_tau < 1)


def _off(row: CountRow) -> float:
    return math.inf if row.ticks is None else float(abs(row.ticks - row.expected))
