"""Learning as a linear quadratic problem of control (NILP), with its costate forward in time.

One neuron without an input, whose one weight is its bias w, follows y; the control is dw/dt:

    dh/dt = c ( -h + w ),        J = integral of  q/2 (h - y)^2 + r_w/2 w^2 + r/2 (dw/dt)^2

With c tau = 1, h is w one tick ago. For y = 0, r_w = 0 optimal control is that of the Riccati
equation 0 = q - P^2/r:

    omega = P h,  P = sqrt(q r),    h = h_0 e^(-lambda t),  lambda = sqrt(q/r),    J* = P h_0^2 / 2

Hamilton's costate, d omega/dt = -q h with omega(T) = 0, diverges forward in time: h = h_0
cosh(lambda t). Two ways to turn its time: its sign, with dissipation (the levels of hamdist), d
omega/dt = q h - eta omega. At eta = 2 lambda it has the optimum's rate twice:

    h = h_0 (1 + lambda t) e^(-lambda t),        omega / h = P lambda t / (1 + lambda t)
    J / J* = a + 1/(2a),  a = eta / (2 lambda):  sqrt(2) at the best
    y = sin(nu t):  h = Im[ lambda^2 / (lambda^2 - nu^2 + i eta nu) e^(i nu t) ]

The Riccati equation in omega = p h (a rule, `RiccatiCostate`): dp/dt = q - p^2/r from p = 0 on,

    p = P tanh(lambda t),    h = h_0 / cosh(lambda t),    J / J* = 4/3
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.rules.rule import BlockView, Messages, Rule, Updates
from hamdist.runtime.train.train import train
from hamdist.streams.adapters import from_iterable
from hamdist.streams.sample import Sample, Stream
from hamdist.streams.sources.signals import SignalStream
from hamdist.study.run.measures import Trajectory
from hamdist.study.shared.exact_runs import float64_settings
from hamdist.study.verify.oracles.check import Check
from hamdist.study.verify.oracles.networks import F64

Q, R, START, TAU = 4.0, 1.0, 1.5, 2e-3  # q, r, h_0, and seconds of a tick
LAMBDA, P = math.sqrt(Q / R), math.sqrt(Q * R)
NU, SETTLED = 1.0, 1500  # rad/s of the sinusoid, and ticks
BOUND = 0.02  # of Euler's steps, lambda tau = 0.004


class BiasNeuron(nn.Module):
    """f(h) = w, (B, 1): the neuron does not depend on its input."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=F64))

    def forward(self, h: Tensor) -> Tensor:
        return self.w + 0 * h


class RiccatiCostate(Rule):
    """The costate omega = p h of a `BiasNeuron`, with the Riccati equation of p forward in time."""

    presentation = "hold"

    def start(self, block: BlockView) -> dict[str, Any]:  # noqa: ARG002
        return {"p": 0.0}

    def relax(
        self,
        block: BlockView,
        inputs: Sequence[Tensor],
        message: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor, Messages, Updates]:
        p = block.memory["p"]
        block.memory["p"] = p + TAU * (Q - p**2 / R)
        return block.f(inputs), [None] * len(inputs), {"w": (p * block.h).sum(0)}


def follower(ticks: int, y: float | Stream = 0.0, **changes: Any) -> Trajectory:
    """Return h (K,) of the neuron with s = -1, which follows y and begins with h = w = START (with
    y = 0, else 0); changes: constants of `dynamics`, eta_omega if it is not 2 lambda."""
    block = _neuron(START if y == 0.0 else 0.0, loss=mse, state=True)
    constants = {
        "tau": TAU,
        "phi": Q,
        "beta": 1 / R,
        "eta_z": 0.0,
        "eta_omega": 2 * LAMBDA,
        **changes,
    }
    locality = {"order": "simultaneous", "target": "current", "readout": "state"}
    more: dict[str, Any] = {"locality": locality, "metrics": {"record": "trajectory"}}
    settings = float64_settings("local", steps=ticks, dynamics=constants, **more)
    stream = _constant(ticks, y) if isinstance(y, float) else y
    (h,) = (r.h for r in train(Graph([block]), stream, settings).records.values())
    return np.zeros(0) if h is None else h.flatten().numpy()


def riccati_follower(ticks: int) -> Trajectory:
    """Return h (K,) of the neuron with the rule `RiccatiCostate`, and y = 0."""
    readout = BlockSpec("y", nn.Identity(), ("x",), loss=mse)
    more: dict[str, Any] = {"learning": {"lr": TAU / R}, "metrics": {"window": 1, "limit": 1 << 16}}
    settings = float64_settings("local", steps=ticks, **more)
    graph = Graph([_neuron(START, rule=RiccatiCostate()), readout])
    windows = train(graph, _constant(ticks, 0.0), settings).windows["y"]
    # Blocks with a rule record no trajectory: L = h^2 / 2, and h stays above 0.
    h: Trajectory = np.sqrt(2 * np.array([w.mean_loss for w in windows]))
    return h


def _neuron(start: float, **more: Any) -> BlockSpec:
    h_0 = torch.tensor([start], dtype=F64)
    return BlockSpec("x", BiasNeuron(start), ("x",), shape=(1,), initial=h_0, **more)


def _constant(ticks: int, y: float) -> Stream:
    sample = Sample(torch.zeros(1, 1, dtype=F64), torch.full((1, 1), y, dtype=F64))
    return from_iterable([sample] * ticks)


def cost(h: Trajectory) -> float:
    """Return J / J* of h (K,), which begins at START, with y = 0."""
    J = TAU * ((Q * h**2).sum() + R * (np.diff(h) ** 2).sum() / TAU**2) / 2
    return float(J / (P * START**2 / 2))


def checks(full: bool) -> Iterator[Check]:
    """Yield the checks of both ways to turn the costate's time."""
    ticks = 4000 if full else 2000
    time = TAU * np.arange(ticks)
    x = LAMBDA * time
    forward, riccati = cache(partial(follower, ticks)), cache(partial(riccati_follower, ticks))
    signal = SignalStream(amplitude=1.0, period=2 * math.pi / NU, tau=TAU, dtype=F64)
    sinusoid, end = partial(follower, ticks, signal), partial(follower, ticks, 1.0, weight_cost=1.0)
    gain = LAMBDA**2 / (LAMBDA**2 - NU**2 + 2j * LAMBDA * NU)
    followed = (gain * np.exp(1j * NU * time)).imag[SETTLED:]

    def ratio() -> Trajectory:
        h = forward()[: ticks // 2]
        return -R * np.diff(h) / TAU / h[:-1] / P

    sign, riccatis = "LQ, sign of the costate turned", "LQ, Riccati's p forward"
    for name, law, measured, expected in (
        (f"{sign}: h / h_0", "(1 + x) e^-x", lambda: forward() / START, (1 + x) * np.exp(-x)),
        (f"{sign}: omega / (P h)", "x / (1 + x)", ratio, (x / (1 + x))[: ticks // 2 - 1]),
        (f"{sign}, y = sin({NU:g} t): h", "gain", lambda: sinusoid()[SETTLED:], followed),
        (f"{sign}, y = r_w = 1: last h", "q / (q + r_w)", lambda: end()[-1], Q / (Q + 1)),
        (f"{riccatis}: h / h_0", "1 / cosh x", lambda: riccati() / START, 1 / np.cosh(x)),
        (f"{riccatis}: J / J*", "4/3", lambda: cost(riccati()), 4 / 3),
    ):
        yield Check(name, f"closed form, x = lambda t: {law}", BOUND, _apart(measured, expected))
    for a in (0.5, math.sqrt(0.5), 1.0):
        name = f"{sign}, eta = {2 * a:.3g} lambda: J / J*"
        yield Check(name, "closed form: a + 1/(2a)", BOUND, partial(_cost_apart, ticks, a))


def _cost_apart(ticks: int, a: float) -> float:
    return abs(cost(follower(ticks, eta_omega=2 * a * LAMBDA)) - a - 1 / (2 * a))


def _apart(measured: Callable[[], Any], expected: Any) -> Callable[[], float]:
    return lambda: float(np.abs(measured() - expected).max())
