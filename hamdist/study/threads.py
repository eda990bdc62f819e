"""How many threads centralised training gets, so that the comparison is fair to both sides."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hamdist.config import EngineKind, EngineSettings

WARM_UP = 3
REPEATS = 15


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fair_threads(engine: EngineSettings) -> int:
    """Threads that all processes of a run with `engine` use together, at most the cores."""
    return min(_processes(engine) * engine.threads, cores())


def _processes(engine: EngineSettings) -> int:
    if engine.kind is EngineKind.INPROCESS:
        return 1
    if engine.placement is not None:
        return len(engine.placement)
    return cores() if engine.actors == "auto" else engine.actors


@contextmanager
def limited_to(threads: int) -> Iterator[None]:
    """Inside, torch uses `threads` threads; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def faster_of(candidates: set[int], step: Callable[[], None]) -> int:
    """The number of threads among `candidates` with which `step` is fastest (median of a few)."""
    if len(candidates) == 1:
        return next(iter(candidates))
    return min(sorted(candidates), key=lambda threads: _seconds(threads, step))


def _seconds(threads: int, step: Callable[[], None]) -> float:
    times = []
    with limited_to(threads):
        for _ in range(WARM_UP + REPEATS):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
    return sorted(times[WARM_UP:])[REPEATS // 2]
