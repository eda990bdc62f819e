"""Oracle: the recursions of equations.md in numpy, and torch.optim.SGD."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from dynamics.helpers import F64, noise, relative

from hamdist.config import AdaptiveSettings, Order
from hamdist.dynamics.updates.constants import Constant, Dynamics
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.gradient import Column, Outer

TICKS = 12


def constants(*, tau=1.0, eta_omega=1.0, beta=0.1, sign=-1):
    return Dynamics(
        tau=Constant(tau),
        c=1 / tau,
        eta_z=0.0,
        eta_omega=eta_omega,
        beta=beta,
        phi=Constant(1.0),
        sign=sign,
    )


def gradients(seed=3):
    """Per tick, for a matrix and a vector; None where there is none."""
    made = [[noise(seed + k, 3, 2), noise(seed + 50 + k, 4)] for k in range(TICKS)]
    return [None if k in (4, 9) else g for k, g in enumerate(made)]


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("eta_omega", [0.0, 0.7, 2.0, 4.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_recursion(order, sign, eta_omega, scale):
    """omega += tau (-s g - eta omega), theta -= tau beta omega: old omega if simultaneous."""
    tau, beta = 0.5, 0.3
    d = constants(tau=tau, eta_omega=eta_omega, beta=beta, sign=sign)
    theta = [noise(0, 3, 2), noise(1, 4)]
    weights = Weights(theta, d, order)
    expected_theta = [t.numpy().copy() for t in theta]
    omega = [np.zeros_like(t) for t in expected_theta]
    for k, g in enumerate(gradients()):
        old = [o.copy() for o in omega]
        for i in range(2):
            gradient = 0.0 if g is None else g[i].numpy()
            omega[i] = omega[i] + tau * (-sign * gradient - eta_omega * omega[i])
            moved_by = old[i] if order is Order.SIMULTANEOUS else omega[i]
            expected_theta[i] -= tau * beta * scale * moved_by
        weights.move(g, scale, tau)
        assert weights.updates == k + 1
        for i in range(2):
            np.testing.assert_allclose(weights.omega[i].numpy(), omega[i], rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(theta[i].numpy(), expected_theta[i], rtol=1e-12, atol=1e-14)


def test_with_eta_one_over_tau_omega_is_the_latest_gradient():
    weights = Weights([noise(0, 3, 2)], constants(tau=0.5, eta_omega=2.0), Order.OMEGA_FIRST)
    for seed in (5, 6):
        g = noise(seed, 3, 2)
        weights.move([g], 1.0, 0.5)
        torch.testing.assert_close(weights.omega[0], 0.5 * g, rtol=1e-15, atol=0)
    weights.move(None, 1.0, 0.5)
    assert not weights.omega[0].any()


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("momentum", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("order", [Order.OMEGA_FIRST, Order.SEQUENTIAL])
def test_equals_sgd(tau, momentum, order):
    """HL Appendix E with dampening 0: phi = 1/tau is in the gradient."""
    lr = 0.03
    d = constants(tau=tau, eta_omega=(1 - momentum) / tau, beta=lr / tau)
    theta = [noise(0, 3, 2), noise(1, 4)]
    theirs = [t.clone().requires_grad_() for t in theta]
    optimiser = torch.optim.SGD(theirs, lr=lr, momentum=momentum)
    weights = Weights(theta, d, order)
    for k in range(200):
        g = [noise(1000 + k, 3, 2), noise(2000 + k, 4)]
        for p, gradient in zip(theirs, g, strict=True):
            p.grad = gradient.clone()
        optimiser.step()
        weights.move([gradient / tau for gradient in g], 1.0, tau)
    assert relative(theta, [p.detach() for p in theirs]) <= 1e-14


def test_simultaneous_is_sgd_one_step_late():
    d = constants(beta=0.03)
    late, now = [noise(0, 3, 2)], [noise(0, 3, 2)]
    simultaneous, first = Weights(late, d, Order.SIMULTANEOUS), Weights(now, d, Order.OMEGA_FIRST)
    for k in range(5):
        before = now[0].clone()
        first.move([noise(k, 3, 2)], 1.0, 1.0)
        simultaneous.move([noise(k, 3, 2)], 1.0, 1.0)
        torch.testing.assert_close(late[0], before, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("eta_omega", [0.0, 0.5, 1.0])
def test_gradients_are_left_as_they_are(eta_omega):
    """A gradient may be a tensor that somebody else reads (a message, an omega of before)."""
    weights = Weights([noise(0, 3, 2)], constants(eta_omega=eta_omega), Order.OMEGA_FIRST)
    g = noise(1, 3, 2)
    kept = g.clone()
    weights.move([g], 1.0, 1.0)
    seen = weights.omega[0]
    was = seen.clone()
    weights.move([noise(2, 3, 2)], 1.0, 1.0)
    weights.move(None, 0.5, 1.0)
    assert torch.equal(g, kept)
    assert torch.equal(seen, was)


def test_theta_moves_in_place():
    theta = torch.ones(2, dtype=F64)
    weights = Weights([theta], constants(beta=0.5), Order.OMEGA_FIRST)
    weights.move([torch.ones(2, dtype=F64)], 1.0, 1.0)
    assert theta.tolist() == [0.5, 0.5]


def test_a_block_without_weights_counts_its_updates():
    weights = Weights([], constants(), Order.OMEGA_FIRST)
    weights.move([], 1.0, 1.0)
    weights.move(None, 1.0, 1.0)
    assert weights.updates == 2


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("in_factors", [False, True])
def test_equals_adam(tau, momentum, in_factors):
    """Oracle: torch.optim.Adam; phi = 1/tau is in the gradient, as without dampening."""
    lr, memory, epsilon = 0.03, 0.95, 1e-6
    d = replace(
        constants(tau=tau, eta_omega=(1 - momentum) / tau, beta=lr / tau),
        adaptive=AdaptiveSettings(memory=memory, epsilon=epsilon),
    )
    theta = [noise(0, 3, 2), noise(1, 3)]
    theirs = [t.clone().requires_grad_() for t in theta]
    optimiser = torch.optim.Adam(theirs, lr, (momentum, memory), epsilon)
    weights = Weights(theta, d, Order.OMEGA_FIRST)
    for k in range(TICKS):
        z, x = noise(10 + k, 4, 3), noise(40 + k, 4, 2)
        g = [Outer(z / tau, x), Column(z / tau)] if in_factors else [z.T @ x / tau, z.sum(0) / tau]
        weights.move(g, 1.0, tau)
        for t, gradient in zip(theirs, (z.T @ x, z.sum(0)), strict=True):
            t.grad = gradient
        optimiser.step()
        for ours, t in zip(theta, theirs, strict=True):
            torch.testing.assert_close(ours, t.detach(), rtol=1e-12, atol=1e-14)
