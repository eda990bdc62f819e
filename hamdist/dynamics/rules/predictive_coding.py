"""Rules of held blocks whose states descend an energy.

    F = L(y, target) + 1/(2B) sum_l |h_l - f_l(h_(l-1))|^2

    predictive coding         h <- h - gamma B dF/dh, then theta <- theta - lr dF/dtheta
                              (Whittington and Bogacz 2017, Eq. 2.16 to 2.19)
    augmented Lagrangian      the same with lambda_l + rho (h_l - f_l) for h_l - f_l, and
                              lambda_l <- lambda_l + alpha (h_l - f_l) in every tick
                              (Seely and Gould 2026, arXiv:2605.31022)
    equilibrium propagation   the same as predictive coding with -beta L, then with +beta L:
                              g = (dF/dtheta(+beta) - dF/dtheta(-beta)) / (2 beta)
                              (Scellier and Bengio 2017, Theorem 1; Laborieux et al. 2021, Eq. 7)

An iteration is a tick: a sample is held for `locality.speed` ticks. The first signal of a sample
sets h = f, at the tick of the block's depth; messages are of the sample two ticks later.
With multipliers h = f at rest, and lambda is backpropagation's gradient but for its sign.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hamdist.dynamics.rules.rule import BlockView, Messages, Rule, Updates
from hamdist.errors import GraphError


class PredictiveCoding(Rule):
    """States move against the energy in every tick; weights with `locality.update`: in the last
    tick of a sample, or in every tick (incremental, Salvatori et al. 2024).

    Args:
        rate: gamma, the step of the states.
    """

    presentation = "hold"

    def __init__(self, rate: float = 0.1) -> None:
        self.rate = rate

    def relax(
        self, block: BlockView, inputs: Sequence[Tensor], message: Tensor
    ) -> tuple[Tensor, Messages, Updates]:
        if block.ticks < block.depth + 4:
            text = f"block {block.name!r}: a sample is held for {block.ticks} ticks, in which "
            raise GraphError(text + "states do not come to rest; set locality.speed to 20 or more")
        f = block.f(inputs)
        if block.age == block.depth:
            return f, [None] * len(inputs), {}
        if block.age == block.depth + 1:
            message = message * 0  # it is still about the sample before
        force = self.force(block, block.h - f) / block.batch
        messages, updates = block.vjp(inputs, -force)  # dF/dh of the parents, dF/dtheta
        return block.h - self.rate * block.batch * (force + message), messages, updates

    def force(self, block: BlockView, error: Tensor) -> Tensor:  # noqa: ARG002
        """Return B dF/dh of the block's own term, of h - f."""
        return error


class AugmentedLagrangian(PredictiveCoding):
    """Each row of a state has multipliers, which go on until h = f: updates are then exact.

    Args:
        rate: gamma; dual: alpha, the step of the multipliers; penalty: rho.
    """

    def __init__(self, rate: float = 0.2, dual: float = 0.2, penalty: float = 1.0) -> None:
        self.rate, self.dual, self.penalty = rate, dual, penalty

    def force(self, block: BlockView, error: Tensor) -> Tensor:
        zeros = torch.zeros_like(error)
        before = block.memory["lambda"] if block.age > block.depth + 1 else zeros
        block.memory["lambda"] = before + self.dual * error
        return before + self.penalty * error


class EquilibriumPropagation(PredictiveCoding):
    """Centred, with free states h = f: from half of a sample's ticks on the nudge is +beta.

    The nudge is `dynamics.phi`, by tick: {values: [-beta, ..., beta, ...], cycle: true}, as many of
    each as half of `locality.speed`; with `locality.update` 'last-tick'. The readout's own step is
    beta times its gradient.

    Args:
        beta: the nudge; rate: gamma.
    """

    def __init__(self, beta: float = 0.1, rate: float = 0.1) -> None:
        self.rate, self.beta = rate, beta

    def nudges(self, ticks: int) -> list[float]:
        return [-self.beta] * (ticks // 2) + [self.beta] * (ticks - ticks // 2)

    def relax(
        self, block: BlockView, inputs: Sequence[Tensor], message: Tensor
    ) -> tuple[Tensor, Messages, Updates]:
        h, messages, g = super().relax(block, inputs, message)
        if block.age == block.ticks // 2 - 1:
            block.memory.update(g)  # of -beta
        before = block.memory
        return h, messages, {n: (g[n] - before.get(n, 0)) / (2 * self.beta) for n in g}
