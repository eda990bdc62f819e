"""Signals between processes: the receiver's address names what carries a channel.

shm://FILE         shared memory, between processes of one host (shared_memory.py)
gpu://FILE         the same; signals on a GPU stay there, if both ends agree (gpu_ring.py)
ipc://FILE         ZeroMQ, between processes of one host (zeromq.py)
tcp://HOST:PORT    ZeroMQ, between hosts; with the receiver's public key behind it (encryption.py);
                   IPv6 in brackets, as in tcp://[::1]:40000
"""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from hamdist.dynamics.schedule.events import Stamp
from hamdist.errors import ClusterError
from hamdist.runtime.process.leftovers import claim, release
from hamdist.runtime.signals.sent_log import ChannelLog
from hamdist.runtime.signals.signal import Channel, Interrupted, Signal
from hamdist.runtime.transport.endpoint import (
    BlockedCall,
    EndpointContext,
    Receiver,
    Sender,
    ThreadCalls,
    socket_folder,
)
from hamdist.runtime.transport.gpu_ring import GpuMemory, GpuRingSender
from hamdist.runtime.transport.shared_memory import GPU_SCHEME, SCHEME, SharedSender, takes
from hamdist.runtime.transport.shared_receiver import SharedReceiver
from hamdist.runtime.transport.threaded_ends import DelayedReceiver, ReplaySender

if TYPE_CHECKING:
    import zmq

    from hamdist.runtime.transport.encryption import KeyGate, Keys

SHM = "shm"
IPC = "ipc"
TCP = "tcp://"


def local_way(channel: Channel) -> str:
    """Return the best transport of `channel` between two processes of this host."""
    return SHM if takes(channel) else IPC


class Endpoints:
    """The ends of all channels that lead out of one process.

    They belong to the thread that sends and receives, except for `bind`, `connect` and `close`,
    which come before and after.

    Args:
        abort: set to make blocked calls raise `Aborted`.
        link_delay: seconds by which received signals are handed out later (threaded_ends.py).
        ports: on which to receive by tcp; None: any.
        keys: of this process, for channels whose address carries a peer's key.
    """

    def __init__(
        self,
        run: int,
        abort: threading.Event,
        link_delay: float = 0.0,
        keys: Keys | None = None,
        requests: ThreadCalls | None = None,
        ports: range | None = None,
    ) -> None:
        self._ports = ports
        self._context = EndpointContext(run, abort, requests)
        self._requests = requests
        self._keys = keys
        self._key_gate: KeyGate | None = None
        self._link_delay = link_delay
        self._in: dict[int, Receiver] = {}
        self._out: dict[int, Sender] = {}
        self._zmq: zmq.Context[Any] | None = None
        self.waits: dict[int, float] = {}  # seconds by number of the channel

    @property
    def waiting(self) -> BlockedCall | None:
        """Return the blocked call, if there is one."""
        return self._context.waiting

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds of 'waiting' (inside calls of the system) and of 'packing'."""
        return {"waiting": self._context.waited, "packing": self._context.packed}

    def _waited(self, channel: Channel, before: float) -> None:
        if self._context.waited > before:
            spent = self._context.waited - before
            self.waits[channel.number] = self.waits.get(channel.number, 0.0) + spent

    def bind(
        self, channel: Channel, way: str, limit: int = -1, memory: GpuMemory | None = None
    ) -> str:
        """Open the receiving end of a channel, and return its address.

        way: 'shm', 'ipc', 'tcp://HOST', or 'tcp://HOST KEY' with the sender's public key.
        limit: the most bytes of a frame by tcp (-1: any). memory: of the receiving block's GPU.
        """
        opens = partial(self._open, channel, way, limit, memory)
        context, delay = self._context, self._link_delay
        receiver = DelayedReceiver(context, channel, delay, opens) if delay else opens(context)
        old = self._in.pop(channel.number, None)
        if old is not None:
            old.close()
        self._in[channel.number] = receiver
        if not way.startswith(TCP):
            claim(socket_folder(self._context.run))  # until `close`
        return receiver.address

    def _open(
        self,
        channel: Channel,
        way: str,
        limit: int,
        memory: GpuMemory | None,
        context: EndpointContext,
    ) -> Receiver:
        if way == SHM:
            return SharedReceiver(context, channel, memory)
        from hamdist.runtime.transport.encryption import split_key
        from hamdist.runtime.transport.zeromq import ZmqReceiver

        bare, key = split_key(way)
        if not bare.startswith(TCP):
            return ZmqReceiver(context, channel, self._zmq_context(), None)
        if key is not None:
            self.allow(key)
        host, gate = bare.removeprefix(TCP), None if key is None else self._key_gate
        return ZmqReceiver(context, channel, self._zmq_context(), host, gate, limit, self._ports)

    def allow(self, key: str) -> None:
        """Allow the holder of a public key to send to this process; called before it connects."""
        if self._key_gate is None:
            from hamdist.runtime.transport.encryption import KeyGate

            if self._keys is None:
                raise ClusterError("a sender with a key, but this process has none")
            self._key_gate = KeyGate(self._zmq_context(), self._keys)
        self._key_gate.allow(key)

    def withdraw(self, key: str) -> None:
        """Revoke `allow`, for connections to come."""
        if self._key_gate is not None:
            self._key_gate.withdraw(key)

    def connect(
        self,
        channel: Channel,
        address: str,
        limit: int = -1,
        log: ChannelLog | None = None,
        first: int = 1,
        gpu_sender: GpuRingSender | None = None,
    ) -> None:
        """Open the sending end of a channel.

        Args:
            channel: the channel.
            address: of the receiving end.
            limit: as at the other end.
            log: signals to replay to a restarted receiver, from number `first` on.
            first: number of the first signal to send.
            gpu_sender: of GPU memory, for an address that asks for it.
        """
        old = self._out.pop(channel.number, None)
        if old is not None:
            old.close()
        reach = partial(self._reach, channel, address, limit, gpu_sender)
        self._out[channel.number] = (
            reach(self._context)
            if log is None
            else ReplaySender(self._context, channel, log, first, reach)
        )

    def answer_offers(self) -> None:
        """Answer the offers of memory that have come; before any signal is received."""
        for end in self._in.values():
            if isinstance(end, SharedReceiver):
                end.answer()

    def read_answers(self) -> None:
        """Take the answers to this process's own offers; before any signal is sent."""
        for end in self._out.values():
            if isinstance(end, SharedSender):
                end.poll()

    def _reach(
        self,
        channel: Channel,
        address: str,
        limit: int,
        gpu_sender: GpuRingSender | None,
        context: EndpointContext,
    ) -> Sender:
        if address.startswith((SCHEME, GPU_SCHEME)):
            return SharedSender(context, channel, address, gpu_sender)
        from hamdist.runtime.transport.zeromq import ZmqSender

        most = limit if address.startswith(TCP) else -1
        return ZmqSender(context, channel, self._zmq_context(), address, self._keys, most)

    def _zmq_context(self) -> zmq.Context[Any]:
        """Return ZeroMQ's context, which has a thread: only where a channel needs it."""
        if self._zmq is None:
            import zmq

            self._zmq = zmq.Context()
        return self._zmq

    def send(self, channel: Channel, *signals: Signal) -> None:
        """Send signals as one message.

        Shared memory copies the payloads before this returns. ZeroMQ may read large ones later, so
        they must not be written to.
        """
        before = self._context.waited
        while True:
            end = self._out[channel.number]
            try:
                end.send(signals)
            except Interrupted:
                self._serve()
                if self._out[channel.number] is end:
                    continue  # (nothing of it was sent yet)
            break  # a new end sends what is in the log, and so this
        self._waited(channel, before)

    def receive(self, channel: Channel, stamp: Stamp) -> Signal:
        before = self._context.waited
        while True:
            try:
                signal = self._in[channel.number].receive(stamp)
            except Interrupted:
                self._serve()
            else:
                self._waited(channel, before)
                return signal

    def _serve(self) -> None:
        self._context.waiting = None
        if self._requests is not None:
            self._requests.serve()

    def close(self) -> None:
        """Close all ends and remove their files."""
        ends: list[Receiver | Sender] = [*self._in.values(), *self._out.values()]
        for end in ends:
            end.close()
        if self._key_gate is not None:
            self._key_gate.close()
            self._key_gate = None
        if self._zmq is not None:
            self._zmq.destroy(linger=0)
            self._zmq = None
        folder = socket_folder(self._context.run)
        release(folder)
        with contextlib.suppress(OSError):  # others' sockets are there, or they were faster
            folder.rmdir()
