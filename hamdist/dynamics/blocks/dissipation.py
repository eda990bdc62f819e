"""The dissipation that a network with cycles needs in order to learn without growing swings (NILP).

The effect of a weight comes back to it about 2/c later: through x, and back through z. Slowly
moving weights then swing as

    w'' + (eta_omega - 2 K/c) w' + K w = 0,    K = beta (phi g^2 + r_w)

with g the gain from the weight to the output, so the swing dies down for eta_omega above 2 K/c
(above 2 K/c + K tau in the simultaneous order), and never does for eta_omega = 0. The dissipation
of z does not help: it only makes the way back a little shorter.
"""

from __future__ import annotations

from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.updates.constants import Dynamics


def least_dissipation(
    c: float, *, phi: float, beta: float, weight_cost: float, gain: float = 1.0
) -> float:
    """Return 2 K/c, the eta_omega in 1/seconds above which weights on a cycle do not swing up.

    Args:
        c: speed of propagation, in hops a second.
        phi, beta, weight_cost: of Hamilton's equations; the last is r_w above.
        gain: g, from the weight to the output.
    """
    return 2 * beta * (phi * gain**2 + weight_cost) / c


def dissipation_warnings(graph: Graph, dynamics: Dynamics) -> list[str]:
    """Return a warning if the dissipation of blocks on or behind a cycle is too small for their c.

    At phi_0 and a gain of 1. For presentation 'hold'.
    """
    short, parameters = [], graph.parameters()
    for name in graph.cycle():
        d = dynamics.of(name)
        beta = max(d.rates(parameters[name]), default=0.0)
        least = least_dissipation(d.c, phi=d.phi(0), beta=beta, weight_cost=d.weight_cost)
        if d.sign == -1 and d.eta_omega < least:
            short.append((least, name, d))
    if not short:
        return []
    least, name, d = max(short, key=lambda entry: entry[0])
    others = f" (and {len(short) - 1} more)" if len(short) > 1 else ""
    return [
        f"block {name!r}{others} lies on a cycle with eta_omega = {d.eta_omega:g} 1/s, below 2K/c "
        f"= {least:.3g} 1/s, K = beta (phi + weight_cost): its weights will swing up (rule for a "
        "gain of 1 from a weight to the output: NILP); use dynamics.eta above that, a larger "
        "dynamics.c, or a smaller dynamics.beta"
    ]
