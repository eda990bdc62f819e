"""Calls that other threads have made by the thread that steps the nodes of a process.

Sockets belong to one thread, so a channel can change its ends only there: between two events, or
where a call is blocked. When the loop has ended, the calling thread makes the call itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class ThreadCalls:
    """Calls that wait for the loop's thread; `waiting` is true if there are some."""

    def __init__(self) -> None:
        self.waiting = False
        self._lock = threading.RLock()
        self._queue: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._looping = False

    def ask(self, act: Callable[[], T], seconds: float) -> T:
        """Return the result of `act`, called by the loop's thread, or by this one if no loop runs.

        Raises TimeoutError if the loop does not come to it within `seconds`.
        """
        future: Future[object] = Future()
        with self._lock:
            if not self._looping:
                return act()
            self._queue.append((act, future))
            self.waiting = True
        return future.result(seconds)  # type: ignore[return-value]

    def serve(self) -> None:
        """Make the waiting calls; only for the loop's thread."""
        while True:
            with self._lock:
                if not self._queue:
                    self.waiting = False
                    return
                act, future = self._queue.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = act()
            except Exception as error:  # noqa: BLE001  (it is raised where it was asked for)
                future.set_exception(error)
            else:
                future.set_result(result)

    def begin(self) -> None:
        """Note that the loop begins, in this thread."""
        with self._lock:
            self._looping = True

    def end(self) -> None:
        """Note that the loop has ended."""
        with self._lock:
            self.serve()
            self._looping = False
