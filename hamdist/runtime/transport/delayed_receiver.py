"""A link with a fixed latency, for tests and studies (`engine.link_delay`): a signal is handed out
no sooner than so many seconds after it has arrived.

A thread takes the signals as they come and notes when they are due. It stops while as many signals
as the channel has room for are overdue, so that a slow receiver still holds its sender back.
Signals on their way over the link do not count: a link of d seconds holds d seconds' signals.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from hamdist.dynamics.schedule.events import Stamp
from hamdist.errors import HamdistError
from hamdist.runtime.signals.signal import Aborted, Channel, Signal
from hamdist.runtime.transport.endpoint import TURN_MS, EndpointContext, Receiver

TURN_SECONDS = TURN_MS / 1000


class DelayedReceiver:
    """The receiver that `make` opens in a context of its own, `seconds` later."""

    def __init__(
        self,
        line: EndpointContext,
        channel: Channel,
        seconds: float,
        make: Callable[[EndpointContext], Receiver],
    ) -> None:
        self._line = line
        self._channel = channel
        self._seconds = seconds
        self._closing = threading.Event()
        self._inner = make(EndpointContext(line.run, self._closing))
        self.address = self._inner.address
        self._came: deque[tuple[float, Signal]] = deque()  # when due
        self._news = threading.Condition()
        self._failure: HamdistError | None = None
        self._thread = threading.Thread(target=self._take, name="hamdist-link", daemon=True)
        self._thread.start()

    def _take(self) -> None:
        """Note the signals that arrive, in a thread of its own."""
        try:
            while True:
                signal = self._inner.receive(Stamp(0, 0, 0))
                due = time.monotonic() + self._seconds
                with self._news:
                    while self._full() and not self._closing.is_set():
                        self._news.wait(TURN_SECONDS)
                    self._came.append((due, signal))
                    self._news.notify()
        except Aborted:
            return
        except HamdistError as error:
            with self._news:
                self._failure = error
                self._news.notify()

    def _full(self) -> bool:
        room = self._channel.capacity
        return len(self._came) >= room and self._came[room - 1][0] <= time.monotonic()

    def receive(self, stamp: Stamp) -> Signal:
        line = self._line
        began = time.perf_counter()
        with self._news:
            while True:
                wait = TURN_SECONDS
                if self._came:
                    wait = self._came[0][0] - time.monotonic()
                    if wait <= 0:
                        _, signal = self._came.popleft()
                        self._news.notify()
                        break
                elif self._failure is not None:
                    raise self._failure
                self._news.wait(min(wait, TURN_SECONDS))
                if not self._came or wait > TURN_SECONDS:
                    line.turn(self._channel, stamp, sending=False)
        line.waiting = None
        line.waited += time.perf_counter() - began
        return signal

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._inner.close()
