"""What the ends of all channels of one process share, whatever carries the signals."""

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
from hamdist.runtime.signals.interrupts import Aborted, Interrupted
from hamdist.runtime.signals.signal import Channel, Signal
from hamdist.runtime.transport.thread_calls import ThreadCalls

TURN_MS = 100  # how long a blocked call sleeps before it looks whether the run was called off
MAX_PATH = 107  # of a socket's file


@dataclass(frozen=True, slots=True)
class BlockedCall:
    """A blocked call: on which channel, since when (time.monotonic), for which stamp.
    sending: the queue is full; else the signal with `stamp` has not come."""

    channel: Channel
    since: float
    stamp: Stamp
    sending: bool


class EndpointContext:
    """abort: set to make blocked calls raise `Aborted`. requests: of other threads, for which they
    are left. waiting: the blocked call, if there is one. waited, packed: seconds inside calls of
    the operating system, and seconds of work on bytes."""

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
        """After a call that has slept for TURN_MS: goes on only if the run does. midway: through a
        message that has to be finished first. Raises Interrupted where somebody asks for something.
        """
        if self.abort.is_set():
            raise Aborted
        if not midway and self.requests is not None and self.requests.waiting:
            raise Interrupted
        if self.waiting is None:
            since = time.monotonic() - TURN_MS / 1000
            self.waiting = BlockedCall(channel, since, stamp, sending)

    def lost(self, channel: Channel, stamp: Stamp, *, sending: bool) -> NoReturn:
        """The process at the other end is gone. Who misses it is no witness of why: its run call
        tells the driver, who then calls this run off; until then the wait goes on."""
        while True:
            self.turn(channel, stamp, sending=sending)
            self.abort.wait(TURN_MS / 1000)


class Sender(Protocol):
    """The sending end of one channel."""

    def move(self, line: EndpointContext) -> None:
        """From now on another thread sends, whose line this is."""

    def send(self, signals: Sequence[Signal]) -> None:
        """Sends `signals` as one message, when there is room for all of them."""

    def close(self) -> None: ...


class Receiver(Protocol):
    """The receiving end of one channel, open at `address`."""

    address: str

    def receive(self, stamp: Stamp) -> Signal:
        """The next signal. stamp: the one that is waited for, which is not compared here."""

    def close(self) -> None: ...


def socket_folder(run: int) -> Path:
    """The private folder of this run's sockets on this host."""
    folder = Path(tempfile.gettempdir()) / f"{SOCKETS_PREFIX}{run:016x}"
    if len(str(folder)) + 12 > MAX_PATH:
        folder = Path("/tmp") / folder.name
    return folder


def socket_file(run: int, channel: Channel) -> Path:
    """A name in the private folder that nobody has used: a channel's end may be opened again, while
    the file of one that was lost is still there."""
    return private_folder(run) / f"{channel.number}.{secrets.token_hex(2)}"


def private_folder(run: int) -> Path:
    """The folder, made if need be. Raises ClusterError if others can reach into it."""
    folder = socket_folder(run)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or folder.is_symlink():
        raise ClusterError(f"{folder} belongs to somebody else; remove it and start again")
    return folder
