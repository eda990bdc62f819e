"""ZeroMQ between processes: one PUSH and one PULL socket per channel.

Each channel has its own queue of bounded length, so a slow receiver holds exactly its senders
back. ipc sockets lie in a private folder (mode 0700); tcp sockets bind to one address and an
ephemeral port.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import zmq

from hamdist.dynamics.schedule import Stamp
from hamdist.errors import ClusterError
from hamdist.runtime.loop import Aborted
from hamdist.runtime.signal import Channel, Signal, decode, encode

TURN_MS = 100  # how long a blocked call sleeps before it looks whether the run was called off
MAX_IPC_PATH = 107


@dataclass(frozen=True, slots=True)
class Waiting:
    """A blocked call: on which channel, since when (time.monotonic), for which stamp.
    sending: the queue is full; else the signal with `stamp` has not come."""

    channel: Channel
    since: float
    stamp: Stamp
    sending: bool


def socket_folder(run: int) -> Path:
    """The private folder of this run's ipc sockets on this host."""
    folder = Path(tempfile.gettempdir()) / f"hd-{run:016x}"
    if len(str(folder)) + 12 > MAX_IPC_PATH:
        folder = Path("/tmp") / folder.name
    return folder


class ZmqTransport:
    """The sockets of one process. abort: set to make blocked calls raise `Aborted`.

    Sockets belong to the thread that sends and receives, but for `bind`, `connect` and `close`,
    which come before and after.
    """

    def __init__(self, run: int, abort: threading.Event) -> None:
        self._run = run
        self._abort = abort
        self._context = zmq.Context()
        self._pull: dict[int, zmq.Socket[bytes]] = {}
        self._push: dict[int, zmq.Socket[bytes]] = {}
        self._files: list[Path] = []
        self.waiting: Waiting | None = None

    def bind(self, channel: Channel, host: str | None) -> str:
        """Opens the receiving end: on tcp at address `host`, or on ipc. Returns where."""
        socket = self._context.socket(zmq.PULL)
        self._pull[channel.number] = socket
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, channel.capacity)
        socket.setsockopt(zmq.RCVTIMEO, TURN_MS)
        if host is not None:
            socket.bind(f"tcp://{host}:*")
            return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
        folder = socket_folder(self._run)
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
            raise ClusterError(f"{folder} belongs to somebody else; remove it and start again")
        path = folder / str(channel.number)
        self._files.append(path)
        socket.bind(f"ipc://{path}")
        return f"ipc://{path}"

    def connect(self, channel: Channel, address: str) -> None:
        """Opens the sending end."""
        socket = self._context.socket(zmq.PUSH)
        self._push[channel.number] = socket
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, channel.capacity)
        socket.setsockopt(zmq.SNDTIMEO, TURN_MS)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.connect(address)

    def send(self, channel: Channel, signal: Signal) -> None:
        frames = encode(signal, self._run, channel)
        socket = self._push[channel.number]
        while True:
            try:
                socket.send_multipart(frames, copy=False)
            except zmq.Again:
                self._wait(channel, signal.stamp, sending=True)
            else:
                self.waiting = None
                return

    def receive(self, channel: Channel, stamp: Stamp) -> Signal:
        socket = self._pull[channel.number]
        while True:
            try:
                frames = socket.recv_multipart(copy=False)
            except zmq.Again:
                self._wait(channel, stamp, sending=False)
            else:
                self.waiting = None
                if len(frames) != 2:
                    frames = [*frames, zmq.Frame(b""), zmq.Frame(b"")]
                return decode(frames[0].bytes, frames[1].buffer, self._run, channel)

    def _wait(self, channel: Channel, stamp: Stamp, *, sending: bool) -> None:
        if self._abort.is_set():
            raise Aborted
        if self.waiting is None:
            since = time.monotonic() - TURN_MS / 1000
            self.waiting = Waiting(channel, since, stamp, sending)

    def close(self) -> None:
        """Closes all sockets and removes their files."""
        for socket in (*self._pull.values(), *self._push.values()):
            socket.close()
        self._context.term()
        for path in self._files:
            path.unlink(missing_ok=True)
        folder = socket_folder(self._run)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
