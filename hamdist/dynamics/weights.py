"""The weights of a cell and their costates: the last two of Hamilton's equations.

    omega_{k+1} = omega_k + tau ( -s g_k - eta_omega omega_k )
    theta_{k+1} = theta_k - tau beta omega_{k+1}        (omega-first, sequential)
                = theta_k - tau beta omega_k            (simultaneous)

with g = phi dL/dtheta + z^T dh'/dtheta (HL Eq. 7 and Algorithm 1). With eta_omega = 1/tau, omega is
the latest gradient, and a step is one of plain gradient descent with rate tau beta.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hamdist.config import Order
from hamdist.dynamics.locality import Dynamics


class Weights:
    """theta (moved in place) and omega, as lists in the order of the cell's parameters."""

    def __init__(self, theta: Sequence[Tensor], dynamics: Dynamics, order: Order) -> None:
        self.theta = list(theta)
        self.omega = [torch.zeros_like(t) for t in self.theta]
        self.updates = 0
        self._tau = dynamics.tau
        self._beta = dynamics.beta
        self._gain = -dynamics.sign * dynamics.tau
        self._keeps = 1 - dynamics.tau * dynamics.eta_omega
        self._omega_first = order is not Order.SIMULTANEOUS

    def move(self, g: list[Tensor] | None, scale: float) -> None:
        """One update with gradient g (None: zero). scale: of beta, in this tick."""
        self.updates += 1
        if not self.theta:
            return
        if not self._omega_first:
            self._move_theta(scale)
        self._move_omega(g)
        if self._omega_first:
            self._move_theta(scale)

    def _move_omega(self, g: list[Tensor] | None) -> None:
        if g is not None and self._keeps == 0:
            self.omega = g if self._gain == 1 else list(torch._foreach_mul(g, self._gain))
            return
        if self._keeps != 1:
            # A fresh list: omega may be a gradient that somebody else still reads.
            self.omega = list(torch._foreach_mul(self.omega, self._keeps))
        if g is not None:
            self.omega = list(torch._foreach_add(self.omega, g, alpha=self._gain))

    def _move_theta(self, scale: float) -> None:
        rate = self._tau * self._beta * scale
        if rate:
            torch._foreach_add_(self.theta, self.omega, alpha=-rate)
