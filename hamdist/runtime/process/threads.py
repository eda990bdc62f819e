"""Processors and torch's threads."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hamdist.dynamics.user_modules.generator import TURN

# (another thread may draw while a process is forked, and is not there in the child)
os.register_at_fork(after_in_child=TURN._at_fork_reinit)  # type: ignore[attr-defined]


def cores() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processors_of_actor(index: int, actors: int, threads: int) -> set[int] | None:
    """Return the processor of actor `index` of the `actors` on this host; None if it gets none.

    It gets none if it is alone and may run where there is room, if processors are too few, if an
    actor has several threads (torch keeps their processors beyond a run), or if nothing can be
    pinned here. The processors are far apart, as neighbours may share a core.
    """
    if not hasattr(os, "sched_getaffinity") or actors < 2 or threads > 1:
        return None
    mine = sorted(os.sched_getaffinity(0))
    if actors > len(mine):
        return None
    return {mine[index * len(mine) // actors]}


@contextmanager
def pinned(processors: set[int] | None) -> Iterator[None]:
    """Run the calling thread (no other of its process) on `processors` alone, inside."""
    if processors is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run_in_background() -> None:
    """Have the calling thread take processors that are free, and interrupt no other when it wakes.

    Linux calls it SCHED_BATCH. The thread that draws a stream is ahead of the actors, so it can
    wait; without it, it takes the processor of an actor that the others wait for.
    """
    if hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER:
        with contextlib.suppress(OSError):  # (where a sandbox forbids it)
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Compute with `threads` threads of torch inside (results depend on their number)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def product_seconds() -> float:
    """Return the seconds of a product of two 256 x 256 matrices on one thread: the least of a few,
    as other processes may use the host.
    """
    with torch_threads(1):
        a = torch.ones(256, 256)
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - begin)
    return min(times)
