"""Signals between processes: each channel goes its own way, which its receiver's address names.

shm://FILE         shared memory, between processes of one host (shared.py)
ipc://FILE         ZeroMQ, between processes of one host (zeromq.py)
tcp://HOST:PORT    ZeroMQ, between hosts
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from hamdist.dynamics.schedule import Stamp
from hamdist.runtime import shared
from hamdist.runtime.feeder import Feeder
from hamdist.runtime.late import LateReceiver
from hamdist.runtime.ledger import Log
from hamdist.runtime.line import Line, Receiver, Sender, Waiting, socket_folder
from hamdist.runtime.requests import Interrupted, Requests
from hamdist.runtime.signal import Channel, Signal

if TYPE_CHECKING:
    import zmq

SHM = "shm"
IPC = "ipc"
TCP = "tcp://"


def local_way(channel: Channel) -> str:
    """How `channel` best goes between two processes of this host."""
    return SHM if shared.takes(channel) else IPC


class Wires:
    """The ends of all channels that lead out of one process. abort: set to make blocked calls raise
    `Aborted`. link_delay: seconds by which what comes is handed out later (late.py).

    They belong to the thread that sends and receives, but for `bind`, `connect` and `close`, which
    come before and after.
    """

    def __init__(
        self,
        run: int,
        abort: threading.Event,
        link_delay: float = 0.0,
        requests: Requests | None = None,
    ) -> None:
        self._line = Line(run, abort, requests)
        self._requests = requests
        self._link_delay = link_delay
        self._in: dict[int, Receiver] = {}
        self._out: dict[int, Sender] = {}
        self._zmq: zmq.Context[Any] | None = None

    @property
    def waiting(self) -> Waiting | None:
        """The blocked call, if there is one."""
        return self._line.waiting

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time of sending and receiving went: waiting, which is all that happens inside
        calls of the operating system, and packing."""
        return {"waiting": self._line.waited, "packing": self._line.packed}

    def bind(self, channel: Channel, way: str) -> str:
        """Opens the receiving end: 'shm', 'ipc' or 'tcp://HOST'. Returns its address."""
        if self._link_delay:
            receiver: Receiver = LateReceiver(
                self._line, channel, self._link_delay, lambda own: self._open(own, channel, way)
            )
        else:
            receiver = self._open(self._line, channel, way)
        old = self._in.pop(channel.number, None)
        if old is not None:
            old.close()
        self._in[channel.number] = receiver
        return receiver.address

    def _open(self, line: Line, channel: Channel, way: str) -> Receiver:
        if way == SHM:
            return shared.SharedReceiver(line, channel)
        from hamdist.runtime.zeromq import ZmqReceiver

        host = way.removeprefix(TCP) if way.startswith(TCP) else None
        return ZmqReceiver(line, channel, self._context(), host)

    def connect(
        self, channel: Channel, address: str, log: Log | None = None, first: int = 1
    ) -> None:
        """Opens the sending end. log: what a receiver that begins again is sent before all else,
        from signal `first` on."""
        old = self._out.pop(channel.number, None)
        if old is not None:
            old.close()
        if log is None:
            self._out[channel.number] = self._reach(self._line, channel, address)
            return
        self._out[channel.number] = Feeder(
            self._line, channel, log, first, lambda own: self._reach(own, channel, address)
        )

    def _reach(self, line: Line, channel: Channel, address: str) -> Sender:
        if address.startswith(shared.SCHEME):
            return shared.SharedSender(line, channel, address)
        from hamdist.runtime.zeromq import ZmqSender

        return ZmqSender(line, channel, self._context(), address)

    def _context(self) -> zmq.Context[Any]:
        """ZeroMQ's, with its thread: only in processes that have a channel for it."""
        if self._zmq is None:
            import zmq

            self._zmq = zmq.Context()
        return self._zmq

    def send(self, channel: Channel, *signals: Signal) -> None:
        """One message. Where it goes by shared memory the payloads are copied before this returns;
        ZeroMQ may read large ones later, so nobody may write to them."""
        while True:
            end = self._out[channel.number]
            try:
                end.send(signals)
            except Interrupted:
                self._serve()
                if self._out[channel.number] is end:
                    continue  # (nothing of it was sent yet)
            return  # a new end sends what is in the log, and so this

    def receive(self, channel: Channel, stamp: Stamp) -> Signal:
        while True:
            try:
                return self._in[channel.number].receive(stamp)
            except Interrupted:
                self._serve()

    def _serve(self) -> None:
        self._line.waiting = None
        if self._requests is not None:
            self._requests.serve()

    def close(self) -> None:
        """Closes all ends and removes their files."""
        ends: list[Receiver | Sender] = [*self._in.values(), *self._out.values()]
        for end in ends:
            end.close()
        if self._zmq is not None:
            self._zmq.destroy(linger=0)
            self._zmq = None
        with contextlib.suppress(OSError):  # others' sockets are there, or they were faster
            socket_folder(self._line.run).rmdir()
