"""The weights of a local function and their costates: the last two of Hamilton's equations.

    omega_{k+1} = omega_k + tau ( -s g_k - eta_omega omega_k )
    theta_{k+1} = theta_k - tau beta omega_{k+1}        (omega-first, sequential)
                = theta_k - tau beta omega_k            (simultaneous)

with g = phi dL/dtheta + z^T dh'/dtheta + r_w theta (HL Eq. 7 and Algorithm 1; the last term: NILP).
With eta_omega = 1/tau, omega is the latest gradient, and a step plain gradient descent's with rate
tau beta. Two recipes change the step, and nothing else of it:

    clip        g <- g min(1, clip / |tau g|), the norm over all weights of the block together
    look-ahead  theta_{k+1} = theta_k - tau beta ( -s tau g_k + mu omega_{k+1} )
                with mu = 1 - tau eta_omega

The second is Nesterov's momentum as Sutskever et al. (2013) have it. Before all that the scale of
a linear layer's inputs may be removed (whitening.py); an average (average.py) is updated behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hamdist.config import AdaptiveSettings, Order
from hamdist.dynamics.finite import OutOfRange, StepFactor
from hamdist.dynamics.saved_state.stateful import Stateful
from hamdist.dynamics.updates.average import Average
from hamdist.dynamics.updates.constants import Dynamics
from hamdist.dynamics.updates.rotation import NO_AXES
from hamdist.dynamics.updates.whitening import InputWhitening
from hamdist.dynamics.vjp.gradient import (
    AtOnce,
    Gradient,
    Gradients,
    add_to,
    all_dense,
    all_moved,
    dense,
    has_moved,
    norm_bound,
    norm_of,
)


class Weights(Stateful):
    """theta (moved in place) and omega, as lists in the order of the function's parameters.

    names: of the parameters, where their rates beta differ. average: of the weights, or None. The
    product of factors (vjp/gradient.py) is added to theta; with eta_omega = 1/tau omega stays in
    factors as well, until it is read.
    """

    def __init__(
        self,
        theta: Sequence[Tensor],
        dynamics: Dynamics,
        order: Order,
        names: Sequence[str] | None = None,
    ) -> None:
        self.theta = list(theta)
        self.updates = self._steps = 0
        self._omega: list[Tensor] | None = None  # None: zero, or in factors
        self._factors: tuple[Sequence[Gradient], float] | None = None  # omega = number times these
        self._mine = True  # no reader of `omega` holds its tensors
        self._rates = dynamics.rates([""] * len(self.theta) if names is None else names)
        self._sign, self._eta = dynamics.sign, dynamics.eta_omega
        self._cost = dynamics.weight_cost
        self._first_cost = dynamics.first_cost if dynamics.weight_cost else None
        self._decay, self._limit = dynamics.decay, dynamics.limit
        self._largest = min([self._limit, *(torch.finfo(t.dtype).max for t in self.theta)])
        self._bound = 0.0  # of |omega|
        self._omega_first = order is not Order.SIMULTANEOUS
        self._adaptive = dynamics.adaptive
        self._clip, self.share = dynamics.clip, 1.0  # share: of g, in the network's clipped one
        self._ahead = dynamics.ahead
        self._inputs = None if dynamics.inputs is None else InputWhitening(dynamics.inputs)
        self.average = None if dynamics.average is None else Average(self.theta, dynamics.average)
        self._squares: list[Tensor] = []  # v, of adaptive rates
        self._latest: tuple[float, float, AtOnce | None] | None = None  # the latest `at_once`
        self._fading = 1.0  # product of the shares of omega that were kept

    STATE: ClassVar[tuple[str, ...]] = (
        *("updates", "_omega", "_factors", "_bound", "_squares", "_fading", "_steps"),
        *("average", "_inputs", "_first_cost"),
    )
    ADDED: ClassVar[Mapping[str, Any]] = {"_first_cost": None}
    OPTIONAL: ClassVar[tuple[str, ...]] = ("average", "_inputs")

    def state_dict(self) -> dict[str, Any]:
        """Return all but theta, which is in the state of the local function.

        omega stays in factors where it is: the order 'simultaneous' moves theta by them in the next
        tick.
        """
        state = super().state_dict()
        if self._factors is not None:
            state["_factors"] = self._settled()
        return state

    def _settled(self) -> tuple[list[Gradient], float]:
        """Return g and a number, whose product is omega; nothing and 0 if it is not in factors."""
        g, gain = self._factors or ((), 0.0)
        if isinstance(g, Gradients):
            g.complete()
        return list(g), gain

    def omega_norm(self) -> float:
        """Return |omega|. Factors stay factors, on which the bits of later steps depend."""
        g, gain = self._settled()
        return abs(gain) * norm_of(g) if g else norm_of(self._omega or ())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._mine = False

    @property
    def omega(self) -> list[Tensor]:
        """Return the weights' costates, never written to once they have been read here."""
        if self._factors is not None:
            g, gain = self._settled()
            self._omega, self._factors = [dense(g_i) * gain for g_i in g], None
        if self._omega is None:
            self._omega = [torch.zeros_like(t) for t in self.theta]
        self._mine = False
        return self._omega

    @omega.setter
    def omega(self, omega: list[Tensor]) -> None:
        self._omega, self._factors, self._mine = omega, None, False
        self._bound = math.inf  # not known

    def scaled_by(self, factor: StepFactor, sample_of: Callable[[int], int]) -> StepFactor:  # noqa: ARG002
        """Return the factor of beta by sample. sample_of: the sample's number, by its pulse's."""
        return factor

    def at_once(self, factor: float, tau: float) -> AtOnce | None:
        """Return the permission to move theta before `move`.

        None where theta does not move by the present gradient alone.
        """
        latest = self._latest
        if latest is None or latest[0] != factor or latest[1] != tau:
            permission = None
            alone = self._adaptive is None and not self._cost and self._omega_first
            alone = alone and self._clip == math.inf and self._inputs is None
            if self.theta and alone and 1 - tau * self._eta == 0:
                gain = -self._sign * tau
                rates = tuple(-(tau * factor) * beta * gain for beta in self._rates)
                permission = AtOnce(rates, self._largest / abs(gain))
            latest = self._latest = (factor, tau, permission)
        return latest[2]

    def move(self, g: Sequence[Gradient] | None, factor: float, tau: float) -> None:
        """Make one update with gradient g (None: zero). factor: of beta, in this tick."""
        self.updates += 1
        if self.theta:
            self._move(g, factor, tau)
            if self.average is not None:
                self.average.update()

    def moving(self) -> tuple[list[Tensor], ...]:
        """Return theta, omega and v, each by weight (v may be empty)."""
        return self.theta, self.omega, self._squares

    def predicted(self, updates: int, factor: float, tau: float) -> list[Tensor]:
        """Return theta after so many updates more along the present omega, in fresh tensors.

        factor, tau: as in `move`.
        """
        step = updates * tau * factor
        if not step:
            return [t.clone() for t in self.theta]
        return [
            torch.add(t, o, alpha=-step * beta)
            for t, o, beta in zip(self.theta, self.omega, self._rates, strict=True)
        ]

    def rest(self) -> None:
        """Count an update in which nothing moves, for the stamps of the signals that follow."""
        self.updates += 1

    def _move(self, g: Sequence[Gradient] | None, factor: float, tau: float) -> None:
        if self._inputs is not None and g is not None:
            g = self._inputs.applied(g)
        if self._adaptive is not None:
            self._move_adaptive(self._adaptive, None if g is None else all_dense(g), factor, tau)
            return
        if all_moved(g) and g is not None:
            self._factors, self._omega = (g, -self._sign * tau), None
            self._bound = math.inf  # the cell has looked at every layer's
            return
        in_tensors = g is None or all(isinstance(g_i, Tensor) for g_i in g)
        if g is not None and not in_tensors and not self._cost:
            self._move_fused(g, factor, tau, self._gain(g, tau))
            return
        gradients, gain = self._with_cost(None if g is None else all_dense(g), tau)
        later = self._moved(gradients, tau, gain)
        if self._ahead:
            self._move_ahead(gradients, later, factor, tau, gain)
            return
        if self._omega_first:
            self.omega = later
        self._move_theta(tau * factor)
        self.omega = later

    def _gain(self, g: Sequence[Gradient] | None, tau: float) -> float:
        """Return the factor of g in omega: -s tau, less where g is clipped."""
        gain = -self._sign * tau * self.share
        if self._clip == math.inf or g is None:
            return gain
        norm = tau * norm_of(g)
        return gain * (self._clip / norm) if norm > self._clip else gain

    def _move_ahead(
        self,
        g: Sequence[Gradient] | None,
        later: list[Tensor],
        factor: float,
        tau: float,
        gain: float,
    ) -> None:
        """Set theta -= tau beta (gain g + mu omega_{k+1}) and omega = omega_{k+1} = `later`."""
        step, mu = tau * factor, 1 - tau * self._eta
        for i, (theta, beta) in enumerate(zip(self.theta, self._rates, strict=True)):
            if g is not None:
                add_to(theta, g[i], -step * beta * gain)
            theta.add_(later[i], alpha=-step * beta * mu)
        self.omega = later

    def _move_adaptive(
        self, adaptive: AdaptiveSettings, g: list[Tensor] | None, factor: float, tau: float
    ) -> None:
        """Move with a beta by weight: with d = -s tau g and mu = 1 - tau eta_omega

            v_{k+1} = r v_k + (1 - r) d_k^2
            beta_k  = beta (1 - mu)/(1 - mu^k) / ( sqrt( v_{k+1}/(1 - r^k) ) + epsilon )

        which is Adam (Kingma and Ba 2015, Algorithm 1): there m = (1 - mu) omega; in the axes of
        rotation.py, if they are turned.
        """
        axes = NO_AXES if self._inputs is None else self._inputs.axes
        before = self.omega
        gradients, gain = self._with_cost(g, tau)
        later = self._moved(gradients, tau, gain)
        squares = axes.turned(self._squares or [torch.zeros_like(t) for t in self.theta])
        torch._foreach_mul_(squares, adaptive.memory)
        if gradients is not None:
            turned = axes.into(gradients)
            torch._foreach_addcmul_(squares, turned, turned, (1 - adaptive.memory) * gain * gain)
        self._squares, keeps = squares, 1 - tau * self._eta
        self._steps += 1
        self._fading *= keeps
        omega = later if self._omega_first else before
        step = tau * factor * ((1 - keeps) / (1 - self._fading) if keeps != 1 else 1 / self._steps)
        roots = torch._foreach_div(squares, 1 - adaptive.memory**self._steps)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, adaptive.epsilon)
        if self._decay:  # decoupled: AdamW (Loshchilov and Hutter 2019, Algorithm 2)
            stay = [1 - tau * factor * beta * self._decay for beta in self._rates]
            torch._foreach_mul_(self.theta, stay)
        axes.move(self.theta, omega, roots, [-step * beta for beta in self._rates])
        self.omega = later

    def _move_fused(self, g: Sequence[Gradient], factor: float, tau: float, gain: float) -> None:
        """Move with as few passes over the weights as there can be."""
        keeps = 1 - tau * self._eta
        self._check(g, gain, keeps)
        # keeps = 0 (eta_omega = 1/tau): omega_{k+1} = gain g, so the factors of g are omega, and no
        # tensor of its size is made. In the order 'simultaneous' theta moves by the old omega, so
        # before it is replaced.
        if keeps == 0:
            if not self._omega_first:
                self._move_theta(tau * factor)
            self._factors, self._omega = (g, gain), None
            if self._omega_first:
                self._move_theta(tau * factor)
            return
        if not self._omega_first:
            self._move_theta(tau * factor)
        # In place only where no reader of `omega` holds these tensors.
        if self._omega is None or not self._mine:
            self._omega = [o.clone() for o in self.omega]
            self._mine = True
        for omega, g_i in zip(self._omega, g, strict=True):
            add_to(omega, g_i, gain, keeps)
        if self._ahead:
            self._move_ahead(g, self._omega, factor, tau, gain)
            self._mine = True
        elif self._omega_first:
            self._move_theta(tau * factor)

    def _check(self, g: Sequence[Gradient], gain: float, keeps: float) -> None:
        """Raise OutOfRange for an omega out of range, before anything has moved.

        A bound of omega's norm follows from the factors; the norm itself is computed only where the
        bound is too large.
        """
        most = abs(gain) * norm_bound([g_i for g_i in g if not has_moved(g_i)])
        most += abs(keeps) * self._bound if keeps else 0.0
        if not most <= self._largest:
            omega: list[Tensor] = [dense(g_i) * gain for g_i in g]
            if keeps:
                omega = list(torch._foreach_add(omega, self.omega, alpha=keeps))
            most = math.hypot(*(float(n) for n in torch._foreach_norm(omega)))
            if not most <= self._limit:
                raise OutOfRange("omega", most)
        self._bound = most

    def integrate(self, g: Sequence[Gradient] | None, tau: float) -> None:
        """Move omega alone, with gradient g (None: zero)."""
        if self.theta:
            self.omega = self._moved(None if g is None else all_dense(g), tau, -self._sign * tau)

    def conclude(self, factor: float, tau: float, unused: Collection[int] = ()) -> None:
        """Move theta by the omega of several `integrate`; r_w theta counts once. unused: stay."""
        self.updates += 1
        if not self.theta:
            return
        if self._cost:
            costs = torch._foreach_mul(self.theta, self._cost_now())
            self.omega = list(torch._foreach_add(self.omega, costs, alpha=-self._sign * tau))
        if unused:
            self.omega = [o * 0 if i in unused else o for i, o in enumerate(self.omega)]
        self._move_theta(tau * factor)
        if self.average is not None:
            self.average.update()

    def fade(self, factor: float) -> None:
        """Set omega = factor omega."""
        if not factor:
            self.clear()
        elif self.theta:
            self.omega = list(torch._foreach_mul(self.omega, factor))

    def clear(self) -> None:
        """Set omega = 0."""
        self._omega = self._factors = None
        self._mine, self._bound = True, 0.0

    def energies(self) -> tuple[float, float, float]:
        """Return (1/2 sum beta |omega|^2, r_w/2 |theta|^2, |theta|)."""
        kinetic = sum(
            0.5 * rate * float(o.square().sum())
            for rate, o in zip(self._rates, self.omega, strict=True)
        )
        squares = sum(float(t.square().sum()) for t in self.theta)
        return kinetic, 0.5 * self._cost * squares, squares**0.5

    def _with_cost(self, g: list[Tensor] | None, tau: float) -> tuple[list[Tensor] | None, float]:
        """Return g + r_w theta, and its factor in omega; only g is clipped."""
        gain = self._gain(g, tau)
        if not self._cost:
            return g, gain
        cost = self._cost_now() * (-self._sign * tau / gain)
        if g is None:
            return list(torch._foreach_mul(self.theta, cost)), gain
        return list(torch._foreach_add(g, self.theta, alpha=cost)), gain

    def _cost_now(self) -> float:
        """Return r_w of this update."""
        first, self._first_cost = self._first_cost, None
        return self._cost if first is None else first

    def _moved(self, g: list[Tensor] | None, tau: float, gain: float) -> list[Tensor]:
        """Return omega_{k+1}, in fresh tensors, or in those of g, which comes with `gain`.

        Raises OutOfRange before anything has moved: derivatives may be infinite where h, z and the
        loss are not (a root at 0).
        """
        keeps = 1 - tau * self._eta
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
        """Set theta -= step beta omega."""
        if self._factors is not None:
            g, gain = self._factors
            for theta, g_i, beta in zip(self.theta, g, self._rates, strict=True):
                if step * beta and not has_moved(g_i):
                    add_to(theta, g_i, -step * beta * gain)
        elif self._omega is not None:
            if min(self._rates) == max(self._rates):
                rate = step * self._rates[0]
                if rate:
                    torch._foreach_add_(self.theta, self._omega, alpha=-rate)
                return
            for theta, omega, beta in zip(self.theta, self._omega, self._rates, strict=True):
                theta.add_(omega, alpha=-step * beta)
