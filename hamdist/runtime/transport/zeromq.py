"""ZeroMQ between processes: one PULL socket per channel, and a PUSH socket per connection to it.

Each channel has its own queue of bounded length, so a slow receiver holds exactly its senders
back. A channel over which more bytes may be under way than one connection holds has several, which
take turns: message n goes by connection n mod N. Each keeps its order, and messages begin with n
there, by which the receiver restores the order of all and notices if one is missing.

ipc sockets lie in a private folder (mode 0700); tcp sockets bind to one address and an ephemeral
port, and admit peers with an allowed key (encryption.py).
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import zmq
from torch import Tensor

from hamdist.dynamics.schedule.events import Stamp
from hamdist.errors import ClusterError, WireError
from hamdist.runtime.signals.packing import TIMES, Packer, WireForm
from hamdist.runtime.signals.signal import Channel, Signal, on_host
from hamdist.runtime.transport.encryption import KeyGate, Keys, authenticate, split_key
from hamdist.runtime.transport.endpoint import TURN_MS, EndpointContext, socket_file

# Bytes from which a payload is a frame of its own, which ZeroMQ sends from the tensor's memory, and
# for which it needs a second frame and word from its own thread that it is done. Measured (2 cores,
# both signals over ipc, medians of a tick, copied / apart): 117 / 169 us at 16 KiB, 193 / 241 at
# 256, 323 / 322 at 512, 1,207 / 811 at 1 MiB.
FRAME_BYTES = 2**19
NO_LIMIT = -1  # of the bytes of a frame, as ZeroMQ says it
SEAL = 64  # bytes that encryption adds to a frame, at most
NUMBER = struct.Struct("<Q")  # of a message, where connections take turns
# Linux lets a connection grow to 4 MiB of unacknowledged messages (tcp_wmem), of which 2.7 MB are
# ours: at 0.3 s there and back 9 MB/s. What may be under way one way is unacknowledged for twice as
# long, and connections are seldom all full.
CONNECTION_BYTES = 2**20
MOST_CONNECTIONS = 8


def connections(channel: Channel, limit: int) -> int:
    """Return how many connections a channel takes; `limit`: as its ends are opened with."""
    if limit == NO_LIMIT:
        return 1
    nbytes = _messages(channel) * limit / TIMES
    if channel.codec is not None:  # (`limit` is of exact signals)
        nbytes *= channel.codec.bytes_share
    return min(MOST_CONNECTIONS, 1 + int(nbytes / CONNECTION_BYTES))


def _messages(channel: Channel) -> int:
    """Return the messages that may wait: each holds `bundle` signals."""
    return -(-channel.capacity // channel.bundle)


def _room(channel: Channel, number: int) -> int:
    """Return the messages that may wait by each of so many connections, at either end.

    With room for one alone, an encrypted connection delivers nothing (libzmq 4.3.5).
    """
    return max(2, -(-_messages(channel) // number))


class ZmqSender:
    """The sending end of a channel by ZeroMQ; frames have at most `limit` bytes.

    Connects to the `address` of a ZmqReceiver, with `keys` if the address carries a key. Raises
    ClusterError for an address with a key if there are no keys.
    """

    def __init__(
        self,
        context: EndpointContext,
        channel: Channel,
        zmq_context: Any,
        address: str,
        keys: Keys | None = None,
        limit: int = NO_LIMIT,
    ) -> None:
        bare, server = split_key(address)
        if server is not None and keys is None:
            raise ClusterError(f"{channel}: its receiver asks for a key, and this process has none")
        self._context = context
        self._limit = limit
        self._channel = channel
        self._packer = Packer(context.run, channel)
        self._sent = 0
        number = connections(channel, limit)
        self._sockets = [zmq_context.socket(zmq.PUSH) for _ in range(number)]
        for socket in self._sockets:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, _room(channel, number))
            socket.setsockopt(zmq.SNDTIMEO, TURN_MS)
            socket.setsockopt(zmq.IMMEDIATE, 1)
            socket.copy_threshold = FRAME_BYTES
            if server is not None and keys is not None:
                authenticate(socket, keys, server)
            socket.setsockopt(zmq.IPV6, int("[" in bare))
            socket.connect(bare)

    def send(self, signals: Sequence[Signal]) -> None:
        context = self._context
        began = perf_counter()
        signals = on_host(signals)
        frames = self._pack(signals)
        packed = perf_counter()
        context.packed += packed - began
        socket = self._sockets[self._sent % len(self._sockets)]
        while True:
            try:
                if len(frames) == 1:
                    socket.send(frames[0])
                else:
                    socket.send_multipart(frames, copy=False)
            except zmq.Again:
                context.turn(self._channel, signals[0].stamp, sending=True)
            else:
                self._sent += 1
                context.waiting = None
                context.waited += perf_counter() - packed
                return

    def _pack(self, signals: Sequence[Signal]) -> list[Any]:
        """Return the frames: the signals, and then the separate payloads, numbered from 1."""
        parts: list[Any] = [NUMBER.pack(self._sent)] if len(self._sockets) > 1 else []
        frames: list[Any] = [b""]
        for signal in signals:
            payload = signal.payload
            form = None if payload is None else self._packer.form(payload)
            if payload is None or form is None:
                parts.append(self._packer.header(signal, None))
            elif form.nbytes < FRAME_BYTES:
                parts += (self._packer.header(signal, form), form.bytes_of(payload), form.fill)
            else:
                parts.append(self._packer.header(signal, form, len(frames)))
                # (holds the tensor, as long as ZeroMQ holds this)
                frames.append(payload.view(-1).view(torch.uint8).numpy().data)
        frames[0] = b"".join(parts)
        largest = max(map(len, frames))
        if largest > self._limit != NO_LIMIT:
            raise WireError(
                f"{self._channel}: a frame of {largest:,} bytes, where the plan knows of "
                f"{self._limit:,} at most: give the stream's first batch the size that later ones "
                "have"
            )
        return frames

    def move(self, context: EndpointContext) -> None:
        self._context = context

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()


class ZmqReceiver:
    """The receiving end of a channel by ZeroMQ.

    Args:
        host: of a tcp address; None: an ipc socket.
        key_gate: admits the allowed senders (None: any).
        limit: the most bytes of a frame; a sender of a larger one is disconnected.
        ports: of which a free one is taken; None: any.

    Raises:
        ClusterError: none of the ports is free.
    """

    def __init__(
        self,
        context: EndpointContext,
        channel: Channel,
        zmq_context: Any,
        host: str | None,
        key_gate: KeyGate | None = None,
        limit: int = NO_LIMIT,
        ports: range | None = None,
    ) -> None:
        self._context = context
        self._channel = channel
        self._packer = Packer(context.run, channel)
        self._came: deque[Signal] = deque()
        number = connections(channel, limit)
        self._next = 0  # number of the message that is handed out next
        self._newest = [i - number for i in range(number)]  # that has come by each connection
        self._early: dict[int, Sequence[Any]] = {}  # messages before their turn
        self._file: Path | None = None
        self._socket = zmq_context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, _room(channel, number))
        self._socket.setsockopt(zmq.RCVTIMEO, TURN_MS)
        if host is not None:
            self._socket.setsockopt(zmq.MAXMSGSIZE, limit if limit == NO_LIMIT else limit + SEAL)
            if key_gate is not None:
                key_gate.guard(self._socket)
            _bind(self._socket, host, ports)
            bare = str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
            self.address = bare if key_gate is None else f"{bare} {key_gate.public}"
            return
        self._file = socket_file(context.run, channel)
        self.address = f"ipc://{self._file}"
        self._socket.bind(self.address)

    def receive(self, stamp: Stamp) -> Signal:
        if self._came:
            return self._came.popleft()
        context = self._context
        began = perf_counter()
        while self._next not in self._early:
            try:
                frames = self._socket.recv_multipart(copy=False)
            except zmq.Again:
                context.turn(self._channel, stamp, sending=False)
            else:
                self._early[self._number(frames)] = frames
        frames = self._early.pop(self._next)
        self._next += 1
        context.waiting = None
        arrival = perf_counter()
        context.waited += arrival - began
        message = frames[0].buffer[NUMBER.size if len(self._newest) > 1 else 0 :].tobytes()
        self._came.extend(self._packer.unpack(message, self._taker(frames)))
        context.packed += perf_counter() - arrival
        return self._came.popleft()

    def _number(self, frames: Sequence[Any]) -> int:
        """Return the number of a message. Raises WireError if one before it has been lost."""
        number = len(self._newest)
        if number == 1:
            return self._next
        if len(frames[0]) < NUMBER.size:
            raise WireError(f"{self._channel}: a message of {len(frames[0])} bytes")
        (n,) = NUMBER.unpack_from(frames[0].buffer)
        if n - self._newest[n % number] != number:
            raise WireError(
                f"{self._channel}: message {n} came after {self._newest[n % number]} by one of "
                f"{number} connections: those between were lost with a connection"
            )
        self._newest[n % number] = n
        return int(n)

    def _taker(self, frames: Sequence[Any]) -> Callable[[WireForm, int], Tensor]:
        """Return a function that copies the payload in frame `index`."""

        def take(form: WireForm, index: int) -> Tensor:
            payload = frames[index].buffer if 0 < index < len(frames) else b""
            if len(payload) != form.nbytes:
                raise WireError(
                    f"{self._channel}: frame {index} with {len(payload)} bytes does not make shape "
                    f"{form.shape} of {form.dtype}"
                )
            tensor = form.new()
            if form.nbytes:
                tensor.view(-1).view(torch.uint8).numpy()[:] = memoryview(payload).cast("B")
            return tensor

        return take

    def close(self) -> None:
        self._socket.close()
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _bind(socket: Any, host: str, ports: range | None) -> None:
    """Open a socket on a free port of a host. Raises ClusterError if none of `ports` is."""
    socket.setsockopt(zmq.IPV6, int(":" in host))
    host = f"[{host}]" if ":" in host else host
    if ports is None:
        socket.bind(f"tcp://{host}:*")
        return
    for port in ports:
        try:
            socket.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE:
                raise
        else:
            return
    socket.close()
    raise ClusterError(
        f"engine.ports {ports[0]}-{ports[-1]}: all {len(ports)} ports are taken on {host}; give "
        "more: every edge that comes from another host takes one for each direction"
    )
