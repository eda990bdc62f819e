"""The likely cause of a run that left the finite range, in words."""

from __future__ import annotations

import math

from hamdist.dynamics.blocks.dissipation import dissipation_warnings
from hamdist.errors import DivergedError
from hamdist.runtime.plan.plan import Plan


def explained(error: DivergedError, plan: Plan) -> DivergedError:
    """Return the same error with its likely cause."""
    cause = error.cause or _cause(error, plan)
    return DivergedError(error.block, error.tick, error.quantity, error.norm, cause)


def _cause(error: DivergedError, plan: Plan) -> str:
    d = plan.dynamics.of(error.block)
    if d.sign == 1:
        return (
            "sign s = +1 is the original Hamilton equations, which blow up when they are "
            "integrated forward in time; use dynamics.sign -1 (Hamiltonian Learning)"
        )
    of_z = error.quantity == "z"  # what children have sent
    blocks = [
        b for b in plan.graph.blocks.values() if error.block in (b.parents if of_z else [b.name])
    ]
    rules = [block.name for block in blocks if block.rule is not None]
    if math.isnan(error.norm) and rules:
        return (
            f"what the rule of {', '.join(rules)} returns is not a number: look there for a root "
            "or a norm at 0, a logarithm, a division"
        )
    if error.quantity == "omega" and math.isnan(error.norm):
        return (
            "a derivative does not exist where the block's module stands now, as that of a root or "
            "a norm at 0; keep its argument away from there (an epsilon)"
        )
    if error.tick <= plan.graph.depths[error.block] or not (d.beta or d.betas):
        return (
            "the weights have not moved, so look at the input's scale, the initial weights and "
            f"dynamics.limit ({d.limit:g})"
        )
    if plan.knobs.hold and error.block in plan.graph.cycle():
        too_little = dissipation_warnings(plan.graph, plan.dynamics)
        if too_little:
            return too_little[0]
    rate = "learning.lr" if plan.follows_lr else "dynamics.beta"
    if plan.optimizer is not None and plan.optimizer.function is not None:
        rate = "lr in the function 'optimizer'"
    smaller = f"use a smaller {rate}"
    if plan.knobs.sequence:
        return (
            f"most likely the steps are too large: {smaller} (a step follows the sum of the losses "
            "of a sequence, so it grows with the sequence's length)"
        )
    stale = ""
    if plan.schedule.staleness:
        stale = (
            f", or steps that shrink with the delay (locality.delay_power): messages are up to "
            f"{plan.schedule.staleness} samples late"
        )
    return f"most likely the steps are too large: {smaller}{stale}"
