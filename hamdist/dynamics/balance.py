"""The best way to cut a row of costs into runs."""

from __future__ import annotations

from collections.abc import Sequence


def balanced(costs: Sequence[float], parts: int) -> list[int]:
    """First indices of `parts` runs of neighbours whose largest sum of `costs` is the least
    possible (the earliest cuts among equals); every run has at least one element."""
    n = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = {(0, 0): (0.0, 0)}
    for part in range(1, parts + 1):
        for end in range(part, n - (parts - part) + 1):
            best[part, end] = min(
                (max(best[part - 1, start][0], sums[end] - sums[start]), start)
                for start in range(part - 1, end)
                if (part - 1, start) in best
            )
    starts, end = [], n
    for part in range(parts, 0, -1):
        end = best[part, end][1]
        starts.append(end)
    return starts[::-1]
