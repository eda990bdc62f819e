"""The context that all channel ends of one process share, whatever carries the signals.

Sockets belong to one thread, the one that steps the nodes, so a channel can change its ends only
there: between two events, or where a call is blocked (`ThreadCalls`). When the loop has ended, the
calling thread makes the call itself.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from hamdist.dynamics.schedule.events import Stamp
from hamdist.errors import ClusterError
from hamdist.runtime.process.leftovers import SOCKETS_PREFIX
from hamdist.runtime.signals.signal import Aborted, Channel, Interrupted, Signal

T = TypeVar("T")
TURN_MS = 100  # how long a blocked call sleeps before it looks whether the run was called off
MAX_PATH = 107  # of a socket's file


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


@dataclass(frozen=True, slots=True)
class BlockedCall:
    """A blocked call.

    Attributes:
        channel: on which it waits.
        since: start of the wait (time.monotonic).
        stamp: of the signal to send, or to receive.
        sending: True if the queue is full; else the signal with `stamp` has not come.
    """

    channel: Channel
    since: float
    stamp: Stamp
    sending: bool


class EndpointContext:
    """Abort flag, requests and time accounts of one process's channel ends.

    Attributes:
        abort: set to make blocked calls raise `Aborted`.
        requests: of other threads; blocked calls are left for them.
        waiting: the blocked call, if there is one.
        waited, packed: seconds inside calls of the operating system, and of work on bytes.
    """

    __slots__ = ("abort", "packed", "requests", "run", "waited", "waiting")

    def __init__(
        self, run: int, abort: threading.Event, requests: ThreadCalls | None = None
    ) -> None:
        self.run = run
        self.abort = abort
        self.waiting: BlockedCall | None = None
        self.waited = 0.0
        self.packed = 0.0
        self.requests = requests

    def turn(self, channel: Channel, stamp: Stamp, *, sending: bool, midway: bool = False) -> None:
        """Check whether a call that has slept for TURN_MS may go on.

        Args:
            channel, stamp, sending: of the blocked call.
            midway: within a message that has to be finished first.

        Raises:
            Aborted: the run was called off.
            Interrupted: another thread has a request.
        """
        if self.abort.is_set():
            raise Aborted
        if not midway and self.requests is not None and self.requests.waiting:
            raise Interrupted
        if self.waiting is None:
            since = time.monotonic() - TURN_MS / 1000
            self.waiting = BlockedCall(channel, since, stamp, sending)

    def lost(self, channel: Channel, stamp: Stamp, *, sending: bool) -> NoReturn:
        """Wait until the run is called off, because the process at the other end is gone.

        This process cannot tell why. The run call of the lost process reports it to the driver,
        which then calls this run off.
        """
        while True:
            self.turn(channel, stamp, sending=sending)
            self.abort.wait(TURN_MS / 1000)


class Sender(Protocol):
    """The sending end of one channel."""

    def move(self, context: EndpointContext) -> None:
        """Hand the end to another thread.

        Args:
            context: of that thread.
        """

    def send(self, signals: Sequence[Signal]) -> None:
        """Send signals as one message, once there is room for all of them.

        Args:
            signals: one, or those of a bundle, in order. Their payloads, (B, ...), are not written
                to afterwards.

        Raises:
            Aborted: the run was called off.
            Interrupted: another thread asks for this end; nothing was sent.
        """

    def close(self) -> None:
        """Close the end."""


class Receiver(Protocol):
    """The receiving end of one channel, open at `address`."""

    address: str

    def receive(self, stamp: Stamp) -> Signal:
        """Return the next signal.

        Args:
            stamp: the expected one, for errors; it is not compared.

        Raises:
            Aborted: the run was called off.
            Interrupted: another thread asks for this end; nothing was taken.
            WireError: what has come is no signal.
        """

    def close(self) -> None:
        """Close the end."""


def socket_folder(run: int) -> Path:
    """Return the private folder of this run's sockets on this host."""
    folder = Path(tempfile.gettempdir()) / f"{SOCKETS_PREFIX}{run:016x}"
    if len(str(folder)) + 12 > MAX_PATH:
        folder = Path("/tmp") / folder.name
    return folder


def socket_file(run: int, channel: Channel) -> Path:
    """Return an unused path in the private folder.

    A channel's end may be opened again while the file of a lost one is still there.
    """
    return private_folder(run) / f"{channel.number}.{secrets.token_hex(2)}"


def private_folder(run: int) -> Path:
    """Make the folder if it is missing. Raises ClusterError if other users can reach into it."""
    folder = socket_folder(run)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise ClusterError(f"{folder} belongs to somebody else; remove it and start again")
    return folder
