"""A pool of processes on this machine: as many calls at a time as it has cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

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
        """Have a process call `function`; return the future of its result."""
        future = self._pool.submit(function, *arguments)
        self._futures.append(future)
        return future

    def close(self) -> None:
        """End the processes, at once where calls are unfinished."""
        unfinished = not all(future.done() for future in self._futures)
        self._pool.shutdown(wait=not unfinished, cancel_futures=True)
        if unfinished:
            for process in self._mine():
                process.terminate()
                # The pool's own thread may collect a process first, and notes that a moment later.
                while process.is_alive():
                    process.join(0.01)

    def _mine(self) -> set[BaseProcess]:
        return set(multiprocessing.active_children()) - self._before


def _end_together() -> None:
    """Make a worker end silently on Ctrl-C, and with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
