"""The costate's time turned, in the linear quadratic case.

Oracles of the closed forms that the topic `lq` has: scipy's Riccati equation, and the boundary
problem of Hamilton's equations, solved by scipy.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import solve_bvp
from scipy.linalg import solve_continuous_are

from hamdist.study.verify.topics import lq


def test_riccati_and_the_boundary_problem():
    P = solve_continuous_are([[0.0]], [[1.0]], [[lq.Q]], [[lq.R]])[0, 0]
    assert pytest.approx((P, P / lq.R)) == (lq.P, lq.LAMBDA)

    def hamilton(t, state):
        h, omega = state
        return np.stack([-omega / lq.R, -lq.Q * h])

    def ends(first, last):
        return np.array([first[0] - lq.START, last[1]])

    t = np.linspace(0, 8, 4001)
    solution = solve_bvp(hamilton, ends, t, np.zeros((2, len(t))), tol=1e-8)
    h, omega = solution.sol(np.arange(0, 4, lq.TAU))
    assert h == pytest.approx(lq.START * np.exp(-lq.LAMBDA * np.arange(0, 4, lq.TAU)), abs=1e-5)
    assert omega == pytest.approx(P * h, abs=1e-4)
    assert lq.cost(h) == pytest.approx(1, abs=0.01)


def test_the_costate_forward_comes_to_the_riccati_solution():
    """And with another dissipation it does not: the closed form is that of eta = 2 lambda."""
    x = lq.LAMBDA * lq.TAU * np.arange(400)
    expected = lq.START * (1 + x) * np.exp(-x)
    assert lq.follower(400) == pytest.approx(expected, abs=0.01)
    assert np.abs(lq.follower(400, eta_omega=3 * lq.LAMBDA) - expected).max() > 0.1
    assert lq.riccati_follower(400) == pytest.approx(lq.START / np.cosh(x), abs=0.01)


@pytest.mark.slow
def test_all_checks_pass():
    assert [c.name for c in lq.checks(False) if not c.measure() <= c.bound] == []
