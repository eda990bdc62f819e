"""The context that all channel ends of one process share, whatever carries the signals."""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from hamdist.dynamics.schedule.events import Stamp
from hamdist.errors import ClusterError
from hamdist.runtime.process.leftovers import SOCKETS_PREFIX
from hamdist.runtime.signals.signal import Aborted, Channel, Interrupted, Signal
from hamdist.runtime.transport.thread_calls import ThreadCalls

TURN_MS = 100  # how long a blocked call sleeps before it looks whether the run was called off
MAX_PATH = 107  # of a socket's file


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

    def move(self, line: EndpointContext) -> None:
        """Hand the end to another thread, with that thread's context."""

    def send(self, signals: Sequence[Signal]) -> None:
        """Send `signals` as one message, once there is room for all of them."""

    def close(self) -> None:
        """Close the end."""


class Receiver(Protocol):
    """The receiving end of one channel, open at `address`."""

    address: str

    def receive(self, stamp: Stamp) -> Signal:
        """Return the next signal. `stamp` is the expected one, for errors; it is not compared."""

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
