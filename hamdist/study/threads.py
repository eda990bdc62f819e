"""How many threads centralised training gets, so that the comparison is fair to both sides."""

from __future__ import annotations

import time
from collections.abc import Callable

from hamdist.config import EngineKind, EngineSettings
from hamdist.runtime.threads import cores, torch_threads

WARM_UP = 3
REPEATS = 15
CLEARLY = 1.1


def fair_threads(engine: EngineSettings) -> int:
    """Threads that all processes of a run with `engine` use together, at most the cores."""
    return min(_processes(engine) * engine.threads, cores())


def _processes(engine: EngineSettings) -> int:
    if engine.kind is EngineKind.INPROCESS:
        return 1
    if engine.placement is not None:
        return len(engine.placement)
    return cores() if engine.actors == "auto" else engine.actors


def faster_of(candidates: set[int], step: Callable[[], None]) -> int:
    """The number of threads among `candidates` with which `step` is fastest (median of a few).

    More threads than the fewest must win clearly: on a busy machine each one waits for the last.
    """
    fewest, *more = sorted(candidates)
    if not more:
        return fewest
    seconds = {threads: _seconds(threads, step) for threads in (fewest, *more)}
    best = min(more, key=seconds.__getitem__)
    return best if seconds[best] * CLEARLY < seconds[fewest] else fewest


def _seconds(threads: int, step: Callable[[], None]) -> float:
    times = []
    with torch_threads(threads):
        for _ in range(WARM_UP + REPEATS):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
    return sorted(times[WARM_UP:])[REPEATS // 2]
