"""Why a run left the finite range, in words."""

from __future__ import annotations

from hamdist.dynamics.graph import Graph
from hamdist.errors import DivergedError
from hamdist.runtime.outcome import Outcome
from hamdist.runtime.plan import Plan


def explained(error: DivergedError, plan: Plan) -> DivergedError:
    """The same error with its likely cause."""
    cause = _cause(error, plan)
    made = DivergedError(error.block, error.tick, error.quantity, error.norm, cause)
    made.outcome = error.outcome
    return made


def _cause(error: DivergedError, plan: Plan) -> str:
    d = plan.dynamics.of(error.block)
    if d.sign == 1:
        return (
            "sign s = +1 is the original Hamilton equations, which blow up when they are "
            "integrated forward in time; use dynamics.sign -1 (Hamiltonian Learning)"
        )
    smaller = "use a smaller learning.lr" if plan.follows_lr else "use a smaller dynamics.beta"
    if not d.beta and not d.betas:
        smaller = "the weights do not move, so look at the input's scale and the initial weights"
    if plan.knobs.sequence:
        return (
            f"most likely the steps are too large: {smaller} (a step follows the sum of the losses "
            "of a sequence, so it grows with the sequence's length)"
        )
    if not plan.graph.acyclic and (error.quantity == "z" or not d.eta_z):
        return (
            f"around a cycle costates grow where eta is too small for c (eta_z = {d.eta_z:g}, c = "
            f"{d.c:g}): raise dynamics.eta or dynamics.c (stable for eta above about 2K/c, K the "
            f"curvature of the cost: NILP), or {smaller}"
        )
    stale = ""
    if plan.schedule.staleness:
        stale = (
            f", or steps that shrink with the delay (locality.delay_power): messages are up to "
            f"{plan.schedule.staleness} samples late"
        )
    return f"most likely the steps are too large: {smaller}{stale}"


def not_finite(outcome: Outcome, graph: Graph) -> list[str]:
    """Blocks whose weights have left the finite range themselves."""
    return [
        name
        for name in graph.blocks
        if name in outcome.blocks
        and not all(t.isfinite().all() for t in outcome.blocks[name].theta.values())
    ]
