"""This machine: a pool of processes, as many calls at a time as it has cores; and its limits, which
are checked before a run builds anything: sizes beyond memory, and times.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

import psutil
import torch

from hamdist.config import Settings
from hamdist.errors import SettingsError

T = TypeVar("T")


class Processes:
    """A pool of `number` processes; `close`, or the end of the context, ends them at once."""

    def __init__(self, number: int) -> None:
        self._before = set(multiprocessing.active_children())
        self._futures: list[Future[Any]] = []
        self._pool = ProcessPoolExecutor(
            number, multiprocessing.get_context("spawn"), initializer=_end_together
        )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Have a process call `function`, which is none of the main program's; return the future
        of its result."""
        with _no_main():
            future = self._pool.submit(function, *arguments)
        self._futures.append(future)
        return future

    def close(self) -> None:
        """End the processes, at once where calls are unfinished."""
        unfinished = not all(future.done() for future in self._futures)
        self._pool.shutdown(wait=not unfinished, cancel_futures=True)
        if unfinished:
            for process in set(multiprocessing.active_children()) - self._before:
                process.terminate()
                # The pool's own thread may collect a process first, and notes that a moment later.
                while process.is_alive():
                    process.join(0.01)


@contextmanager
def _no_main() -> Iterator[None]:
    """Have processes that start inside not run the user's program again, which may be a script that
    has no `if __name__ == "__main__"`, or come from standard input."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end_together() -> None:
    """Make a worker end silently on Ctrl-C, and with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# -- limits ----------------------------------------------------------------------------------------


LAYER_BYTES = 20_000  # of the Python objects of one layer
RATE = 1e10  # operations in a second, of one core in float32: an order of magnitude
MOST_YEARS = 10


def check_size(settings: Settings, *, own_model: bool = False, own_data: bool = False) -> None:
    """Raise SettingsError if the least memory of a run is more than this host has.

    `own_model`, `own_data`: width and depth, or the batch, are not those of the settings.
    """
    width, depth = (1, 0) if own_model else (settings.model.width, settings.model.depth)
    batch = 0 if own_data else settings.stream.batch
    number = getattr(torch, settings.dtype.value).itemsize
    layer = 2 * number * width**2 + LAYER_BYTES  # weights, their costates, and the objects
    needed, there = depth * layer + batch * number * width, psutil.virtual_memory().total
    if needed > there:
        raise SettingsError(
            f"model.width {width:,}, model.depth {depth:,}, stream.batch {batch:,}: weights and "
            f"one state take at least {needed / 2**30:,.0f} GiB, and this host has "
            f"{there / 2**30:,.0f} GiB: use smaller ones"
        )


def check_time(settings: Settings) -> list[str]:
    """Return a warning if the arithmetic of the settings' model takes unreasonably long.

    Counted are six operations for a sample and a weight (a product and a sum, forward, back and of
    the gradient). It is no error: a stream may end before, and Ctrl-C keeps the trained state.
    """
    width, depth, batch = settings.model.width, settings.model.depth, settings.stream.batch
    years = 6 * depth * width**2 * batch * (settings.steps or 0) / RATE / (365 * 24 * 3600)
    if years <= MOST_YEARS:
        return []
    return [
        f"steps {settings.steps:,}: with model.width {width:,}, model.depth {depth:,} and "
        f"stream.batch {batch:,} that is about {years:,.0f} years of arithmetic on a core; use "
        "smaller ones, or end it with Ctrl-C"
    ]
