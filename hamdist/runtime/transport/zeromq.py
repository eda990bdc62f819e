"""ZeroMQ between processes: one PUSH and one PULL socket per channel.

Each channel has its own queue of bounded length, so a slow receiver holds exactly its senders
back. ipc sockets lie in a private folder (mode 0700); tcp sockets bind to one address and an
ephemeral port, and admit peers with an allowed key (encryption.py).
"""

from __future__ import annotations

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
from hamdist.runtime.signals.packing import Packer, WireForm
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


class ZmqSender:
    """The sending end of a channel by ZeroMQ; frames have at most `limit` bytes.

    Connects to the `address` of a ZmqReceiver, with `keys` if the address carries a key. Raises
    ClusterError for an address with a key if there are no keys.
    """

    def __init__(
        self,
        line: EndpointContext,
        channel: Channel,
        context: Any,
        address: str,
        keys: Keys | None = None,
        limit: int = NO_LIMIT,
    ) -> None:
        bare, server = split_key(address)
        if server is not None and keys is None:
            raise ClusterError(f"{channel}: its receiver asks for a key, and this process has none")
        self._line = line
        self._limit = limit
        self._channel = channel
        self._packer = Packer(line.run, channel)
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        # (counts messages, of which each holds `bundle` signals where they come in bundles)
        self._socket.setsockopt(zmq.SNDHWM, -(-channel.capacity // channel.bundle))
        self._socket.setsockopt(zmq.SNDTIMEO, TURN_MS)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.copy_threshold = FRAME_BYTES
        if server is not None and keys is not None:
            authenticate(self._socket, keys, server)
        self._socket.setsockopt(zmq.IPV6, int("[" in bare))
        self._socket.connect(bare)

    def send(self, signals: Sequence[Signal]) -> None:
        line = self._line
        began = perf_counter()
        signals = on_host(signals)
        frames = self._pack(signals)
        packed = perf_counter()
        line.packed += packed - began
        while True:
            try:
                if len(frames) == 1:
                    self._socket.send(frames[0])
                else:
                    self._socket.send_multipart(frames, copy=False)
            except zmq.Again:
                line.turn(self._channel, signals[0].stamp, sending=True)
            else:
                line.waiting = None
                line.waited += perf_counter() - packed
                return

    def _pack(self, signals: Sequence[Signal]) -> list[Any]:
        """Return the frames: the signals, and then the separate payloads, numbered from 1."""
        parts: list[Any] = []
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

    def move(self, line: EndpointContext) -> None:
        self._line = line

    def close(self) -> None:
        self._socket.close()


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
        line: EndpointContext,
        channel: Channel,
        context: Any,
        host: str | None,
        key_gate: KeyGate | None = None,
        limit: int = NO_LIMIT,
        ports: range | None = None,
    ) -> None:
        self._line = line
        self._channel = channel
        self._packer = Packer(line.run, channel)
        self._came: deque[Signal] = deque()
        self._file: Path | None = None
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, -(-channel.capacity // channel.bundle))
        self._socket.setsockopt(zmq.RCVTIMEO, TURN_MS)
        if host is not None:
            self._socket.setsockopt(zmq.MAXMSGSIZE, limit if limit == NO_LIMIT else limit + SEAL)
            if key_gate is not None:
                key_gate.guard(self._socket)
            _bind(self._socket, host, ports)
            bare = str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
            self.address = bare if key_gate is None else f"{bare} {key_gate.public}"
            return
        self._file = socket_file(line.run, channel)
        self.address = f"ipc://{self._file}"
        self._socket.bind(self.address)

    def receive(self, stamp: Stamp) -> Signal:
        if self._came:
            return self._came.popleft()
        line = self._line
        began = perf_counter()
        while True:
            try:
                frames = self._socket.recv_multipart(copy=False)
            except zmq.Again:
                line.turn(self._channel, stamp, sending=False)
            else:
                break
        line.waiting = None
        came = perf_counter()
        line.waited += came - began
        self._came.extend(self._packer.unpack(frames[0].bytes, self._taker(frames)))
        line.packed += perf_counter() - came
        return self._came.popleft()

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


def bracketed(host: str) -> str:
    """Return a host as addresses with a port have it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def _bind(socket: Any, host: str, ports: range | None) -> None:
    """Open a socket on a free port of a host. Raises ClusterError if none of `ports` is."""
    socket.setsockopt(zmq.IPV6, int(":" in host))
    host = bracketed(host)
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
