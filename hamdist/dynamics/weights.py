"""The weights of a cell and their costates: the last two of Hamilton's equations.

    omega_{k+1} = omega_k + tau ( -s g_k - eta_omega omega_k )
    theta_{k+1} = theta_k - tau beta omega_{k+1}        (omega-first, sequential)
                = theta_k - tau beta omega_k            (simultaneous)

with g = phi dL/dtheta + z^T dh'/dtheta + r_w theta (HL Eq. 7 and Algorithm 1; the last term: NILP).
With eta_omega = 1/tau, omega is the latest gradient, and a step is one of plain gradient descent
with rate tau beta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hamdist.config import Order
from hamdist.dynamics.block import OutOfRange
from hamdist.dynamics.constants import Dynamics


class Weights:
    """theta (moved in place) and omega, as lists in the order of the cell's parameters.

    names: of the parameters, where their rates beta differ.
    """

    def __init__(
        self,
        theta: Sequence[Tensor],
        dynamics: Dynamics,
        order: Order,
        names: Sequence[str] | None = None,
    ) -> None:
        self.theta = list(theta)
        self.omega = [torch.zeros_like(t) for t in self.theta]
        self.updates = 0
        self._rates = dynamics.rates([""] * len(self.theta) if names is None else names)
        self._sign = dynamics.sign
        self._eta = dynamics.eta_omega
        self._cost = dynamics.weight_cost
        self._limit = dynamics.limit
        self._omega_first = order is not Order.SIMULTANEOUS

    def move(self, g: list[Tensor] | None, scale: float, tau: float) -> None:
        """One update with gradient g (None: zero). scale: of beta, in this tick. tau: seconds."""
        if self.theta:
            later = self._moved(self._with_cost(g), tau)
            if self._omega_first:
                self.omega = later
            self._move_theta(tau * scale)
            self.omega = later
        self.updates += 1

    def integrate(self, g: list[Tensor] | None, tau: float) -> None:
        """Moves omega alone, with gradient g (None: zero)."""
        if self.theta:
            self.omega = self._moved(g, tau)

    def conclude(self, scale: float, tau: float) -> None:
        """Moves theta with the omega of several `integrate`; r_w theta counts once."""
        self.updates += 1
        if not self.theta:
            return
        if self._cost:
            costs = torch._foreach_mul(self.theta, self._cost)
            self.omega = list(torch._foreach_add(self.omega, costs, alpha=-self._sign * tau))
        self._move_theta(tau * scale)

    def fade(self, factor: float) -> None:
        """omega = factor omega."""
        if not factor:
            self.clear()
        elif self.theta:
            self.omega = list(torch._foreach_mul(self.omega, factor))

    def clear(self) -> None:
        """omega = 0."""
        self.omega = [torch.zeros_like(t) for t in self.theta]

    def energies(self) -> tuple[float, float, float]:
        """(1/2 sum beta |omega|^2, r_w/2 |theta|^2, |theta|)."""
        kinetic = sum(
            0.5 * rate * float(o.square().sum())
            for rate, o in zip(self._rates, self.omega, strict=True)
        )
        squares = sum(float(t.square().sum()) for t in self.theta)
        return kinetic, 0.5 * self._cost * squares, squares**0.5

    def _with_cost(self, g: list[Tensor] | None) -> list[Tensor] | None:
        if not self._cost:
            return g
        if g is None:
            return list(torch._foreach_mul(self.theta, self._cost))
        return list(torch._foreach_add(g, self.theta, alpha=self._cost))

    def _moved(self, g: list[Tensor] | None, tau: float) -> list[Tensor]:
        """omega_{k+1}, in fresh tensors, or in those of g. Raises OutOfRange before anything has
        moved: derivatives may be infinite where h, z and the loss are not (a root at 0)."""
        gain, keeps = -self._sign * tau, 1 - tau * self._eta
        if g is not None and keeps == 0:
            omega = g if gain == 1 else list(torch._foreach_mul(g, gain))
        else:
            omega = self.omega if keeps == 1 else list(torch._foreach_mul(self.omega, keeps))
            if g is not None:
                omega = list(torch._foreach_add(omega, g, alpha=gain))
        norm = math.hypot(*(float(n) for n in torch._foreach_norm(omega)))
        if not norm <= self._limit:
            raise OutOfRange("omega", norm)
        return omega

    def _move_theta(self, step: float) -> None:
        if min(self._rates) == max(self._rates):
            rate = step * self._rates[0]
            if rate:
                torch._foreach_add_(self.theta, self.omega, alpha=-rate)
            return
        for theta, omega, beta in zip(self.theta, self.omega, self._rates, strict=True):
            theta.add_(omega, alpha=-step * beta)
