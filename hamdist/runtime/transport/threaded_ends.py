"""Channel ends with a thread of their own.

`DelayedReceiver`: a link with a fixed latency, for tests and studies (`engine.link_delay`). A
signal is handed out no sooner than so many seconds after it has arrived. The thread takes the
signals as they come and notes when they are due. It stops while as many signals as the channel has
room for are overdue, so that a slow receiver still holds its sender back. Signals on their way over
the link do not count: a link of d seconds holds d seconds' signals.

`ReplaySender`: sends a restarted receiver the signals that it has missed, out of the log. The
thread sends the logged signals from a number on. The sender's own thread goes on meanwhile; its new
signals are in the log as well, so it only waits where the receiver is too far behind. When the
thread has caught up, the sender's own thread takes over.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from hamdist.dynamics.schedule.events import Stamp
from hamdist.errors import HamdistError, WireError
from hamdist.runtime.signals.sent_log import ChannelLog
from hamdist.runtime.signals.signal import Aborted, Channel, Signal
from hamdist.runtime.transport.endpoint import TURN_MS, EndpointContext, Receiver, Sender

TURN_SECONDS = TURN_MS / 1000


class DelayedReceiver:
    """The receiver that `make` opens in a context of its own, `seconds` later."""

    def __init__(
        self,
        context: EndpointContext,
        channel: Channel,
        seconds: float,
        make: Callable[[EndpointContext], Receiver],
    ) -> None:
        self._context = context
        self._channel = channel
        self._seconds = seconds
        self._closing = threading.Event()
        self._inner = make(EndpointContext(context.run, self._closing))
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
        context = self._context
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
                    context.turn(self._channel, stamp, sending=False)
        context.waiting = None
        context.waited += time.perf_counter() - began
        return signal

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._inner.close()


class ReplaySender:
    """A sending end, opened by `make`, that first replays the log from signal number `first` on."""

    def __init__(
        self,
        context: EndpointContext,
        channel: Channel,
        log: ChannelLog,
        first: int,
        make: Callable[[EndpointContext], Sender],
    ) -> None:
        self._context = context
        self._channel = channel
        self._log = log
        self._next = first
        self._closing = threading.Event()
        self._thread_context = EndpointContext(context.run, self._closing)
        self._end = make(self._thread_context)
        self._news = threading.Condition()
        self._failure: HamdistError | None = None
        self._thread: threading.Thread | None = threading.Thread(
            target=self._feed, name="hamdist-feeder", daemon=True
        )
        self._thread.start()

    def _feed(self) -> None:
        try:
            while not self._closing.is_set():
                if self._next > self._log.posted:
                    with self._news:
                        self._news.wait(TURN_MS / 1000)
                    continue
                self._end.send([self._log.at(self._next)])
                with self._news:
                    self._next += 1
                    self._news.notify_all()
        except Aborted:
            return
        except HamdistError as error:
            self._fail(error)
        except RuntimeError as error:  # of a GPU that a kept signal lies on
            self._fail(WireError(f"{self._channel}: {type(error).__name__}: {error}"))

    def _fail(self, error: HamdistError) -> None:
        with self._news:
            self._failure = error
            self._news.notify_all()

    def send(self, signals: Sequence[Signal]) -> None:
        # The signals are in the log already: `first` is the number of the first of them.
        first = self._log.posted - len(signals) + 1
        if self._thread is None:
            # The thread has ended; the first call after that leaves out what it had sent.
            left = signals[max(0, self._next - first) :] if self._next else signals
            if left:
                self._end.send(left)
            self._next = 0  # from now on everything is sent here
            return
        # The thread sends: wait until it is less than `capacity` behind, as a full channel would.
        with self._news:
            self._news.notify_all()
            while self._log.posted - self._next >= self._channel.capacity:
                if self._failure is not None:
                    raise self._failure
                self._news.wait(TURN_MS / 1000)
                self._context.turn(self._channel, signals[0].stamp, sending=True)
            self._context.waiting = None
            near = self._next >= first  # all earlier signals are sent: this thread can take over
        if near:
            self._take_over()
            self.send(signals)

    def _take_over(self) -> None:
        # Joining the thread first makes `_next` final, so that no signal is sent twice or left out,
        # and hands the socket over: it belongs to one thread at a time.
        self._end_thread()
        if self._failure is not None:
            raise self._failure
        self._end.move(self._context)

    def _end_thread(self) -> None:
        self._closing.set()
        with self._news:
            self._news.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def move(self, context: EndpointContext) -> None:
        self._context = context

    def close(self) -> None:
        self._end_thread()
        self._end.close()
