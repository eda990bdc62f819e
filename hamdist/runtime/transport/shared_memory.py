"""Shared memory between processes of one host: a socket and a ring of slots per channel.

A message is one packet of an AF_UNIX socket (SOCK_SEQPACKET). Small payloads lie in the packet,
larger ones in a slot of a memory file that both processes map; the packet then names the slot. No
thread, no polling: who waits sleeps in the kernel. Sockets lie in a private folder (mode 0700); the
memory file has no name, its descriptor crosses the socket.

    sender   ── signals: headers, small payloads, numbers of slots ──▶   receiver
             ── a ring: how many slots of how many bytes; its descriptor ──▶
             ◀── credit: how many signals were taken ──

Back-pressure counts signals. A channel has room for C = `capacity` of them; the sender takes as
much room as a message has signals, and the receiver gives it back when signals are taken, by groups
of g = max(1, slack // 2), so that not every signal costs a packet back. Nobody waits for ever:

1. A sender waits for room only if w + u + n > C, with w signals waiting, n in its message, and
   u <= g - 1 taken but not yet given back. The schedule needs in_flight = C - slack of them under
   way, and g <= slack: so w + n > in_flight, as in a channel of capacity C - g + 1. The oldest
   waiting signal is then one that the receiver needs in a tick before the sender's own. A receiver
   waits only for a signal of an earlier tick, too (`Bundle` in schedule.py). Every wait leads to a
   strictly earlier tick; ticks are bounded from below, so somebody can go on.
2. The kernel's buffer never blocks before C signals wait: `inline_limit` lets only so much payload
   into a packet that C packets fit, and `takes` leaves channels with very large C to ZeroMQ.
3. A slot is free when its signal's room was given back. The ring has C slots and at most C signals
   are not given back, so there is a free slot whenever there is room.
4. Credits are sent without waiting. Where the sender leaves so many unread that the buffer is full,
   the number grows until the next one; those unread are enough to go on with.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
from torch import Tensor

from hamdist.dynamics.schedule.schedule import Stamp
from hamdist.errors import ClusterError, WireError
from hamdist.runtime.signals.signal import (
    ALIGNMENT,
    MAX_HEADER,
    Channel,
    Packer,
    Signal,
    WireForm,
    on_host,
)
from hamdist.runtime.transport.endpoint import TURN_MS, EndpointContext, socket_file
from hamdist.runtime.transport.gpu_ring import (
    ANSWER_BYTES,
    OFFER,
    GpuMemory,
    GpuRingReceiver,
    GpuRingSender,
)

SCHEME = "shm://"
GPU_SCHEME = "gpu://"  # the same, to a receiver that can be lent memory of a GPU
# Bytes up to which a payload travels in the packet. Measured (2 cores, both neighbours' signals,
# medians of a tick, packet / slot): 47 / 56 us at 4 KiB, 42 / 46 at 8, 58 / 56 at 16, 61 / 64 at
# 32. Up to 8 KiB the packet wins, then it is equal, and short packets need less of the buffer.
INLINE_BYTES = 8192
PACKET_BYTES = 65536
MAX_CAPACITY = 128  # packets that the kernel's smallest usual buffer (416 KiB) has room for
BUFFER_BYTES = 2**22  # asked for; the kernel gives what net.core.wmem_max allows

_RING = struct.Struct("<2sBBIQIQ")  # magic, format, padding, channel, run, slots, bytes of a slot
_RING_MAGIC = b"HR"
_RING_FORMAT = 1
_CREDIT = struct.Struct("<I")
_PEER = struct.Struct("3i")  # pid, uid, gid
_SEALS = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")
_TURN = struct.pack("ll", 0, TURN_MS * 1000)


def available() -> bool:
    """Whether this platform has what it takes."""
    return (
        hasattr(os, "memfd_create")
        and hasattr(socket, "AF_UNIX")
        and hasattr(socket, "SO_PEERCRED")
        and all(hasattr(fcntl, name) for name in _SEALS)
    )


def takes(channel: Channel) -> bool:
    """Whether `channel` can go this way: the platform allows it, and the kernel's buffer has room
    for as many packets as signals may wait."""
    return available() and channel.capacity <= MAX_CAPACITY


def inline_limit(capacity: int, buffer: int) -> int:
    """Bytes of payload up to which `capacity` packets fit into a kernel's buffer of `buffer` bytes.

    A packet of p bytes counts as at most 2 (p + 512) + 512: memory comes in powers of two, with the
    kernel's own notes on it. Half a packet's share is left for credits and the ring's notice.
    """
    share = buffer // (capacity + 2)
    return max(0, min(INLINE_BYTES, (share - 1536) // 2 - MAX_HEADER))


def _prepare(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TURN)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TURN)


class _Ring:
    """Slots of equal size in a memory file that two processes map.

    The file cannot be shrunk or grown (seals), so that no access behind its end can come about.
    """

    def __init__(self, fd: int, slots: int, slot_bytes: int, *, writes: bool) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0)
        self._map = mmap.mmap(fd, slots * slot_bytes, mmap.MAP_SHARED, protection)
        # (the array is gone at once: it would keep the map from being closed)
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data

    def at(self, slot: int, nbytes: int) -> int:
        """The address of a slot that is about to take or give `nbytes`."""
        if not (0 <= slot < self.slots and nbytes <= self.slot_bytes) or self._map.closed:
            raise ValueError(f"{nbytes} bytes at slot {slot} of {self.slots}")
        return self._address + slot * self.slot_bytes

    def close(self) -> None:
        self._map.close()


class SharedSender:
    """connects to `address`, which a SharedReceiver has told. gpu_sender: what it may offer
    memory of a GPU with (lending.py)."""

    def __init__(
        self,
        line: EndpointContext,
        channel: Channel,
        address: str,
        gpu_sender: GpuRingSender | None = None,
    ) -> None:
        self._line = line
        self._channel = channel
        self._gpu_sender = gpu_sender
        self._packer = Packer(line.run, channel)
        self._room = channel.capacity
        self._under_way: deque[int | None] = deque()  # the slots of signals not yet given back
        self._free: list[int] = []
        self._ring: _Ring | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            _prepare(self._socket)
            self._socket.connect(address.removeprefix(SCHEME).removeprefix(GPU_SCHEME))
            given = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        except OSError as error:
            self._socket.close()
            raise ClusterError(f"{channel}: {address} cannot be reached: {error}") from None
        self._inline = inline_limit(channel.capacity, given)
        offer = None if gpu_sender is None else gpu_sender.offer()
        if offer is not None:
            with contextlib.suppress(OSError):  # who is lost is found by the first signal
                self._socket.send(offer, socket.MSG_DONTWAIT)

    def look(self) -> None:
        """Takes an answer to its offer, if it has come."""
        if self._gpu_sender is not None and self._gpu_sender.waiting:
            self._look_for_credit()

    def send(self, signals: Sequence[Signal]) -> None:
        if len(signals) > self._channel.capacity:
            raise ValueError(f"{len(signals)} signals at once on {self._channel}")
        stamp = signals[0].stamp
        while self._room < len(signals):
            self._take_credit(stamp)
        self.look()
        gpu_sender = self._gpu_sender
        signals = on_host(signals, None if gpu_sender is None else gpu_sender.takes)
        parts: list[object] = []
        size = 0
        for signal in signals:
            began = perf_counter()
            payload = signal.payload
            form = None if payload is None else self._packer.form(payload)
            slot = None
            if payload is None or form is None:
                added: tuple[object, ...] = (self._packer.header(signal, None),)
                needed = MAX_HEADER
            elif gpu_sender is not None and gpu_sender.takes(payload):
                self._look_for_credit()
                slot = self._channel.capacity + gpu_sender.put(payload)
                added = (self._packer.header(signal, form, slot),)
                needed = MAX_HEADER
            elif form.nbytes <= self._inline:
                added = self._packer.header(signal, form), form.bytes_of(payload), form.fill
                needed = MAX_HEADER + form.nbytes + 8
            else:
                self._line.packed += perf_counter() - began
                ring = self._ring
                if ring is None or form.nbytes > ring.slot_bytes:
                    self._deliver(parts, stamp)  # what is packed already names slots of the old one
                    size = 0
                    ring = self._open_ring(form.nbytes, stamp)
                self._look_for_credit()
                began = perf_counter()
                slot = self._free.pop()
                ctypes.memmove(ring.at(slot, form.nbytes), payload.data_ptr(), form.nbytes)
                added = (self._packer.header(signal, form, slot),)
                needed = MAX_HEADER
            self._line.packed += perf_counter() - began
            if size + needed > PACKET_BYTES:
                self._deliver(parts, stamp)
                size = 0
            parts += added
            size += needed
            self._room -= 1
            self._under_way.append(slot)
        self._deliver(parts, stamp)

    def _deliver(self, parts: list[object], stamp: Stamp) -> None:
        """Sends what is packed, if anything is."""
        if parts:
            if self._gpu_sender is not None:
                self._gpu_sender.settle()
            self._packet(b"".join(parts), stamp)  # type: ignore[arg-type]
            parts.clear()

    def _packet(self, data: bytes, stamp: Stamp, fd: int | None = None) -> None:
        line = self._line
        began = perf_counter()
        while True:
            try:
                if fd is None:
                    self._socket.send(data)
                else:
                    socket.send_fds(self._socket, [data], [fd])
            except BlockingIOError:
                line.turn(self._channel, stamp, sending=True, midway=True)
            except (BrokenPipeError, ConnectionResetError):
                line.lost(self._channel, stamp, sending=True)
            else:
                break
        line.waiting = None
        line.waited += perf_counter() - began

    def _take_credit(self, stamp: Stamp) -> None:
        """Sleeps until the receiver gives room back."""
        line = self._line
        began = perf_counter()
        while True:
            try:
                data = self._socket.recv(ANSWER_BYTES)
            except BlockingIOError:
                line.turn(self._channel, stamp, sending=True)
            except ConnectionResetError:
                line.lost(self._channel, stamp, sending=True)
            else:
                if data:
                    break
                line.lost(self._channel, stamp, sending=True)
        line.waiting = None
        line.waited += perf_counter() - began
        self._credit(data)

    def _look_for_credit(self) -> None:
        """Takes room that was given back already: the slot that was freed last is still in the
        processor's cache, and a ring of which few slots are used takes little memory."""
        try:
            data = self._socket.recv(ANSWER_BYTES, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionResetError):
            return  # (a lost receiver is found by the packet that follows)
        if data:
            self._credit(data)

    def _credit(self, data: bytes) -> None:
        gpu_sender = self._gpu_sender
        if gpu_sender is not None and len(data) > _CREDIT.size:
            gpu_sender.answered(data)
            return
        taken = _CREDIT.unpack(data)[0] if len(data) == _CREDIT.size else 0
        if not 0 < taken <= len(self._under_way):
            raise WireError(f"{self._channel}: {data!r} is no number of signals that were taken")
        self._room += taken
        for _ in range(taken):
            slot = self._under_way.popleft()
            if slot is not None and slot < self._channel.capacity:
                self._free.append(slot)
            elif slot is not None and gpu_sender is not None:
                gpu_sender.free(slot - self._channel.capacity)

    def _open_ring(self, nbytes: int, stamp: Stamp) -> _Ring:
        """A ring for payloads of `nbytes`. The receiver reads what came before from its old one:
        packets keep their order."""
        slots = self._channel.capacity
        slot_bytes = -(-nbytes // ALIGNMENT) * ALIGNMENT
        fd = os.memfd_create(
            f"hamdist-{self._channel.number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        )
        try:
            os.ftruncate(fd, slots * slot_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _seals())
            ring = _Ring(fd, slots, slot_bytes, writes=True)
            if self._ring is not None:
                self._ring.close()
            self._ring = ring
            self._free = list(reversed(range(slots)))
            channel = self._channel
            lent = (s if s is not None and s >= channel.capacity else None for s in self._under_way)
            self._under_way = deque(lent)
            head = (_RING_MAGIC, _RING_FORMAT, 0, channel.number, self._line.run, slots, slot_bytes)
            self._packet(_RING.pack(*head), stamp)
            self._packet(_RING_MAGIC, stamp, fd)
        finally:
            os.close(fd)
        return ring

    def move(self, line: EndpointContext) -> None:
        self._line = line

    def close(self) -> None:
        self._socket.close()
        if self._ring is not None:
            self._ring.close()
        if self._gpu_sender is not None:
            self._gpu_sender.close()


class SharedReceiver:
    """Listens at a file of the run's folder, for one sender. memory: of the GPU that its block
    computes on, if other processes may lend it theirs."""

    def __init__(
        self, line: EndpointContext, channel: Channel, memory: GpuMemory | None = None
    ) -> None:
        self._line = line
        self._channel = channel
        self._packer = Packer(line.run, channel)
        self._group = max(1, channel.slack // 2)
        self._most = PACKET_BYTES if channel.bundle > 1 else MAX_HEADER + INLINE_BYTES + 8
        self._came: deque[Signal] = deque()
        self._taken = 0
        self._ring: _Ring | None = None
        self._gpu_receiver = None if memory is None else GpuRingReceiver(memory, channel, line.run)
        self._sender = 0  # its process
        self._lost = False  # with signals that cannot be trusted: nothing behind them counts
        self._socket: socket.socket | None = None
        self._file: Path = socket_file(line.run, channel)
        self.address = f"{SCHEME if memory is None else GPU_SCHEME}{self._file}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(str(self._file))
            self._listener.listen(1)
            _prepare(self._listener)
        except OSError as error:
            self._listener.close()
            raise ClusterError(f"{channel}: no socket at {self._file}: {error}") from None

    def receive(self, stamp: Stamp) -> Signal:
        if not self._came:
            self._receive(stamp)
        signal = self._came.popleft()
        self._taken += 1
        if self._taken >= self._group:
            self._give_back()
        return signal

    def _receive(self, stamp: Stamp) -> None:
        """Sleeps until the next message."""
        line = self._line
        while not self._came:
            if self._lost:
                line.lost(self._channel, stamp, sending=False)
            data = self._packet(stamp)
            if data[:2] == _RING_MAGIC:
                self._take_ring(data, stamp)
                continue
            gpu_receiver = self._gpu_receiver
            if gpu_receiver is not None and data[:2] == OFFER:
                self._answer(gpu_receiver, data)
                continue
            began = perf_counter()
            if len(data) > self._most:
                raise WireError(f"{self._channel}: a packet of more than {self._most} bytes")
            signals = self._packer.unpack(data, self._take)
            if gpu_receiver is not None and not gpu_receiver.settled():
                self._lost = True
                continue
            self._came.extend(signals)
            line.packed += perf_counter() - began

    def answer(self) -> None:
        """Answers an offer that was sent before this call, if one was, and nothing else."""
        if self._gpu_receiver is None:
            return
        try:
            connection = self._socket or self._accept()
            data = connection.recv(self._most + 1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
            if data[:2] == OFFER:
                self._answer(self._gpu_receiver, connection.recv(self._most + 1))
        except (BlockingIOError, ConnectionResetError):
            return  # nobody has connected, or offered anything; who is lost is found by `receive`

    def _answer(self, gpu_receiver: GpuRingReceiver, offer: bytes) -> None:
        answer = gpu_receiver.answer(offer, self._sender)
        try:
            if self._socket is not None:
                self._socket.send(answer, socket.MSG_DONTWAIT)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            pass  # a sender that hears nothing uses host memory

    def _packet(self, stamp: Stamp) -> bytes:
        line = self._line
        began = perf_counter()
        while True:
            try:
                connection = self._socket or self._accept()
                data = connection.recv(self._most + 1)
            except BlockingIOError:
                line.turn(self._channel, stamp, sending=False)
            except ConnectionResetError:
                continue  # the sender has left credits unread; what it sent is still there
            else:
                if data:
                    break
                line.lost(self._channel, stamp, sending=False)
        line.waiting = None
        line.waited += perf_counter() - began
        return data

    def _accept(self) -> socket.socket:
        connection, _ = self._listener.accept()
        _prepare(connection)
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        self._sender, user, _ = _PEER.unpack(peer)
        if user != os.getuid():
            connection.close()
            raise WireError(f"{self._channel}: a process of another user has connected")
        self._socket = connection
        self._listener.close()
        self._file.unlink(missing_ok=True)
        return connection

    def _give_back(self) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(_CREDIT.pack(self._taken), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return  # the number goes with the next one (4)
        except (BrokenPipeError, ConnectionResetError):
            pass  # nobody is left to need it
        self._taken = 0

    def _take_ring(self, data: bytes, stamp: Stamp) -> None:
        """Maps the memory whose descriptor comes in the next packet."""
        channel = self._channel
        if len(data) != _RING.size:
            raise WireError(f"{channel}: {len(data)} bytes announce a ring")
        _, form, _, number, run, slots, slot_bytes = _RING.unpack(data)
        if form != _RING_FORMAT or number != channel.number or run != self._line.run:
            raise WireError(f"{channel}: a ring of format {form} for channel {number}, run {run:x}")
        fd = self._descriptor(stamp)
        try:
            held = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            size = os.fstat(fd).st_size
            whole = slots * slot_bytes == size and slot_bytes % ALIGNMENT == 0 and size > 0
            if not whole or slots > channel.capacity or held & _seals() != _seals():
                raise WireError(
                    f"{channel}: a ring of {size} bytes with {slots} slots of {slot_bytes}, seals "
                    f"{held:#x}"
                )
            ring = _Ring(fd, slots, slot_bytes, writes=False)
        except OSError as error:  # no memory file: it has no seals
            raise WireError(f"{channel}: the memory of a ring cannot be mapped: {error}") from None
        finally:
            os.close(fd)
        if self._ring is not None:
            self._ring.close()
        self._ring = ring

    def _descriptor(self, stamp: Stamp) -> int:
        if self._socket is None:
            raise WireError(f"{self._channel}: a ring without a connection")
        while True:
            try:
                data, fds, flags, _ = socket.recv_fds(self._socket, len(_RING_MAGIC) + 1, 1)
            except BlockingIOError:
                self._line.turn(self._channel, stamp, sending=False, midway=True)
            except ConnectionResetError:
                continue
            else:
                if data or fds:
                    break
                self._line.lost(self._channel, stamp, sending=False)
        self._line.waiting = None
        if data != _RING_MAGIC or len(fds) != 1 or flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            raise WireError(f"{self._channel}: a ring without a descriptor")
        return int(fds[0])

    def _take(self, form: WireForm, slot: int) -> Tensor:
        """Copies the payload out of its slot: whoever keeps the tensor pins no slot."""
        if self._gpu_receiver is not None and slot >= self._channel.capacity:
            return self._gpu_receiver.take(form, slot - self._channel.capacity)
        ring = self._ring
        if ring is None or slot >= ring.slots or form.nbytes > ring.slot_bytes:
            raise WireError(f"{self._channel}: no slot {slot} that holds {form.nbytes} bytes")
        tensor = form.new()
        ctypes.memmove(tensor.data_ptr(), ring.at(slot, form.nbytes), form.nbytes)
        return tensor

    def close(self) -> None:
        self._listener.close()
        if self._socket is not None:
            self._socket.close()
        if self._ring is not None:
            self._ring.close()
        if self._gpu_receiver is not None:
            self._gpu_receiver.close()
        self._file.unlink(missing_ok=True)


def _seals() -> int:
    return int(sum(getattr(fcntl, name) for name in _SEALS))
