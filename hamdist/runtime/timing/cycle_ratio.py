"""The maximum cycle ratio of a marked graph, by policy iteration.

    lambda = max over cycles C of   sum of seconds on C / sum of periods on C

is the steady period of a system whose event i of period p begins no earlier than event j of period
p - periods ended. It is the least lambda at which no cycle gains, each arc i -> j gaining
seconds - lambda periods; then the best gain of a path from i is finite,

    v_i = max(0, max over arcs i -> j of  seconds - lambda periods + v_j).

Howard's algorithm (Cochet-Terrasson et al. 1998; Dasdan 2004 compares it with others) for this
form: every node follows one arc, its policy. lambda is the largest ratio of the cycles that the
policy has so far; v is its value along the policy, from which a path may stop anywhere; an arc that
gains more improves the policy. Without a better arc lambda is the maximum. As paths may stop, a
value depends on the nodes near by alone, and few rounds do. All nodes are valued and improved at
once, by pointer doubling.

N: nodes, A: arcs.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Reals: TypeAlias = "NDArray[np.float64]"
Places: TypeAlias = "NDArray[np.intp]"

TOLERANCE = 1e-9  # of a ratio or value, relative to the seconds of the graph


MOST_ROUNDS = 1000


class NoPeriodError(ArithmeticError):
    """The graph has no steady period: a cycle that takes time, and no period."""


class CriticalCycle(NamedTuple):
    """The largest ratio, and the arcs of a cycle that has it, in order."""

    ratio: float
    arcs: list[int]


def max_cycle_ratio(
    sources: Places, targets: Places, seconds: Reals, periods: Places
) -> CriticalCycle:
    """Return the maximum cycle ratio and a critical cycle.

    Args:
        sources, targets: (A,) nodes of each arc; every node has an arc out of it.
        seconds: (A,) not negative.
        periods: (A,) not negative.

    Raises:
        NoPeriodError: a cycle takes time and has no period.
    """
    order = np.argsort(sources, kind="stable")
    sources, targets, periods = sources[order], targets[order], periods[order]
    seconds = seconds[order]
    n = int(sources[-1]) + 1
    first = np.searchsorted(sources, np.arange(n))
    small = TOLERANCE * max(float(seconds.max(initial=0.0)), 1e-30)
    policy, ratio = _best(seconds, first), -np.inf
    for _ in range(MOST_ROUNDS):
        follows = targets[policy]
        largest, place = _largest(follows, seconds[policy], periods[policy])
        if largest == np.inf:
            raise NoPeriodError("a cycle takes time, but no period: its events wait for each other")
        if largest > ratio:
            ratio, start, cycle = largest, place, policy
        values = _values(follows, seconds[policy] - ratio * periods[policy])
        gain = seconds - ratio * periods + values[targets]
        better = _best(gain, first)
        improved = gain[better] > values + small
        if not improved.any():
            break
        policy = np.where(improved, better, policy)
    else:
        raise NoPeriodError(f"no policy without a better arc in {MOST_ROUNDS} rounds")
    arcs: list[int] = []
    node = start
    while not arcs or node != start:
        arcs.append(int(order[cycle[node]]))
        node = int(targets[cycle[node]])
    return CriticalCycle(ratio, arcs)


def _best(gain: Reals, first: Places) -> Places:
    """Return the arc with the largest gain of each node; arcs lie in the order of the nodes."""
    most = np.maximum.reduceat(gain, first)
    counts = np.diff(np.append(first, len(gain)))
    hits = np.flatnonzero(gain == np.repeat(most, counts))
    owner = np.repeat(np.arange(len(first)), counts)[hits]
    best = np.empty(len(first), np.intp)
    best[owner[::-1]] = hits[::-1]  # (the first one of each)
    return best


def _largest(follows: Places, seconds: Reals, periods: Places) -> tuple[float, int]:
    """Return the largest ratio of a policy's cycles, and the least node of that cycle."""
    n = len(follows)
    jump, least = follows, np.arange(n)
    for _ in range(n.bit_length()):  # jump: 2^k arcs on; least: the least node before that
        least = np.minimum(least, least[jump])
        jump = jump[jump]
    on_cycle = np.zeros(n, bool)
    on_cycle[jump] = True
    total = np.bincount(least[on_cycle], seconds[on_cycle], n)
    tokens = np.bincount(least[on_cycle], periods[on_cycle], n)
    endless = np.where(total > 0, np.inf, -np.inf)
    ratios = np.where(tokens > 0, total / np.maximum(tokens, 1), endless)
    return float(ratios.max()), int(ratios.argmax())


def _values(follows: Places, gains: Reals) -> Reals:
    """Return the most that a path along the policy gains until it stops."""
    most = np.maximum(gains, 0.0)
    jump = follows
    for _ in range(len(follows).bit_length()):  # gains: of 2^k arcs; most: of up to 2^k arcs
        most = np.maximum(most, gains + most[jump])
        gains = gains + gains[jump]
        jump = jump[jump]
    return most
