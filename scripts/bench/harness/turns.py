"""Sides in turn. Only one of them is busy at a time; the others wait, idle, for their turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

from harness.figures import Spread, spread

# Works for about so many seconds (after a warm-up of its own); returns seconds a step.
Side: TypeAlias = Callable[[float], float]

WARM_UP = 0.2  # of the time that is measured
LEAST_WARM_UP = 3  # steps


def in_turns(sides: Mapping[str, Side], repeats: int, seconds: float) -> dict[str, Spread]:
    """Every side `repeats` times, A B C A B C ...; seconds a step."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            found[name].append(run(seconds))
    return {name: spread(values) for name, values in found.items()}


def fastest(sides: Mapping[str, Side], seconds: float) -> tuple[str, dict[str, float]]:
    """A short pilot: the name of the fastest side, and the seconds a step of all."""
    found = {name: run(seconds) for name, run in sides.items()}
    return min(found, key=found.__getitem__), found


def per_step(step: Callable[[], object], seconds: float) -> float:
    """Seconds a step, over about `seconds`, warm-up not counted."""
    _repeat(step, seconds * WARM_UP, LEAST_WARM_UP)
    return _repeat(step, seconds, 1)


def _repeat(step: Callable[[], object], seconds: float, least: int) -> float:
    steps = 0
    begun = time.perf_counter()
    while True:
        step()
        steps += 1
        passed = time.perf_counter() - begun
        if passed >= seconds and steps >= least:
            return passed / steps
