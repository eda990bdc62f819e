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
   waits only for a signal of an earlier tick, too (`Bundle` in dynamics/schedule). Every wait
   leads to a strictly earlier tick; ticks are bounded from below, so somebody can go on.
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
from time import perf_counter

import numpy as np

from hamdist.dynamics.schedule.events import Stamp
from hamdist.errors import ClusterError, WireError
from hamdist.runtime.signals.packing import MAX_HEADER, Packer
from hamdist.runtime.signals.signal import ALIGNMENT, Channel, Signal, on_host
from hamdist.runtime.transport.endpoint import TURN_MS, EndpointContext
from hamdist.runtime.transport.gpu_ring import ANSWER_BYTES, GpuRingSender

SEALS = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")
_TURN = struct.pack("ll", 0, TURN_MS * 1000)

SCHEME = "shm://"
GPU_SCHEME = "gpu://"  # the same, to a receiver that can map memory of a GPU
# Bytes up to which a payload travels in the packet. Measured (2 cores, both neighbours' signals,
# medians of a tick, packet / slot): 47 / 56 us at 4 KiB, 42 / 46 at 8, 58 / 56 at 16, 61 / 64 at
# 32. Up to 8 KiB the packet wins, then it is equal, and short packets need less of the buffer.
INLINE_BYTES = 8192
PACKET_BYTES = 65536
RING_HEADER = struct.Struct(
    "<2sBBIQIQ"
)  # magic, format, padding, channel, run, slots, bytes of a slot
RING_MAGIC = b"HR"
RING_FORMAT = 1
CREDIT = struct.Struct("<I")
PEER = struct.Struct("3i")  # pid, uid, gid
MAX_CAPACITY = 128  # packets that the kernel's smallest usual buffer (416 KiB) has room for
BUFFER_BYTES = 2**22  # asked for; the kernel gives what net.core.wmem_max allows


def prepare_socket(connection: socket.socket) -> None:
    """Limit how long a socket waits, in either direction."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TURN)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TURN)


class Ring:
    """Slots of equal size in a memory file that two processes map.

    The file cannot be shrunk or grown (seals), so that no access behind its end is possible.
    """

    def __init__(self, fd: int, slots: int, slot_bytes: int, *, writes: bool) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0)
        self._map = mmap.mmap(fd, slots * slot_bytes, mmap.MAP_SHARED, protection)
        # (the array is gone at once: it would keep the map from being closed)
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data

    def at(self, slot: int, nbytes: int) -> int:
        """Return the address of a slot that is about to take or give `nbytes`."""
        if not (0 <= slot < self.slots and nbytes <= self.slot_bytes) or self._map.closed:
            raise ValueError(f"{nbytes} bytes at slot {slot} of {self.slots}")
        return self._address + slot * self.slot_bytes

    def close(self) -> None:
        self._map.close()


def seals() -> int:
    """Return the seals of a ring's memory, as one number."""
    return int(sum(getattr(fcntl, name) for name in SEALS))


def available() -> bool:
    """Return True if this platform has the system calls for it."""
    return (
        hasattr(os, "memfd_create")
        and hasattr(socket, "AF_UNIX")
        and hasattr(socket, "SO_PEERCRED")
        and all(hasattr(fcntl, name) for name in SEALS)
    )


def takes(channel: Channel) -> bool:
    """Return True if `channel` can use shared memory.

    The platform has to allow it, and the kernel's buffer to have room for as many packets as
    signals may wait.
    """
    return available() and channel.capacity <= MAX_CAPACITY


def inline_limit(capacity: int, buffer: int) -> int:
    """Return the bytes of payload up to which `capacity` packets fit into a buffer of `buffer`
    bytes.

    A packet of p bytes counts as at most 2 (p + 512) + 512: the kernel allocates powers of two,
    with headers of its own. Half a packet's share is left for credits and the notice of a ring.
    """
    share = buffer // (capacity + 2)
    return max(0, min(INLINE_BYTES, (share - 1536) // 2 - MAX_HEADER))


class SharedSender:
    """The sending end of a channel in shared memory.

    Connects to `address`, the file of a SharedReceiver. `gpu_sender` offers it GPU memory
    (gpu_ring.py), if the channel may use some.
    """

    def __init__(
        self,
        context: EndpointContext,
        channel: Channel,
        address: str,
        gpu_sender: GpuRingSender | None = None,
    ) -> None:
        self._context = context
        self._channel = channel
        self._gpu_sender = gpu_sender
        self._packer = Packer(context.run, channel)
        self._room = channel.capacity
        self._under_way: deque[int | None] = deque()  # the slots of signals not yet given back
        self._free: list[int] = []
        self._ring: Ring | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            prepare_socket(self._socket)
            self._socket.connect(address.removeprefix(SCHEME).removeprefix(GPU_SCHEME))
            buffer_bytes = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        except OSError as error:
            self._socket.close()
            raise ClusterError(f"{channel}: {address} cannot be reached: {error}") from None
        self._inline = inline_limit(channel.capacity, buffer_bytes)
        offer = None if gpu_sender is None else gpu_sender.offer()
        if offer is not None:
            with contextlib.suppress(OSError):  # who is lost is found by the first signal
                self._socket.send(offer, socket.MSG_DONTWAIT)

    def poll(self) -> None:
        """Take the answer to this end's offer, if it has come."""
        if self._gpu_sender is not None and self._gpu_sender.waiting:
            self._look_for_credit()

    def send(self, signals: Sequence[Signal]) -> None:
        if len(signals) > self._channel.capacity:
            raise ValueError(f"{len(signals)} signals at once on {self._channel}")
        stamp = signals[0].stamp
        while self._room < len(signals):
            self._take_credit(stamp)
        self.poll()
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
                self._context.packed += perf_counter() - began
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
            self._context.packed += perf_counter() - began
            if size + needed > PACKET_BYTES:
                self._deliver(parts, stamp)
                size = 0
            parts += added
            size += needed
            self._room -= 1
            self._under_way.append(slot)
        self._deliver(parts, stamp)

    def _deliver(self, parts: list[object], stamp: Stamp) -> None:
        """Send the packed signals, if there are any."""
        if parts:
            if self._gpu_sender is not None:
                self._gpu_sender.synchronise()
            self._packet(b"".join(parts), stamp)  # type: ignore[arg-type]
            parts.clear()

    def _packet(self, data: bytes, stamp: Stamp, fd: int | None = None) -> None:
        context = self._context
        began = perf_counter()
        while True:
            try:
                if fd is None:
                    self._socket.send(data)
                else:
                    socket.send_fds(self._socket, [data], [fd])
            except BlockingIOError:
                context.turn(self._channel, stamp, sending=True, midway=True)
            except (BrokenPipeError, ConnectionResetError):
                context.lost(self._channel, stamp, sending=True)
            else:
                break
        context.waiting = None
        context.waited += perf_counter() - began

    def _take_credit(self, stamp: Stamp) -> None:
        """Sleep until the receiver gives room back."""
        context = self._context
        began = perf_counter()
        while True:
            try:
                data = self._socket.recv(ANSWER_BYTES)
            except BlockingIOError:
                context.turn(self._channel, stamp, sending=True)
            except ConnectionResetError:
                context.lost(self._channel, stamp, sending=True)
            else:
                if data:
                    break
                context.lost(self._channel, stamp, sending=True)
        context.waiting = None
        context.waited += perf_counter() - began
        self._credit(data)

    def _look_for_credit(self) -> None:
        """Take room that was given back already. The slot that was freed last is still in the
        processor's cache, and a ring of which few slots are used takes little memory."""
        try:
            data = self._socket.recv(ANSWER_BYTES, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionResetError):
            return  # (a lost receiver is found by the packet that follows)
        if data:
            self._credit(data)

    def _credit(self, data: bytes) -> None:
        gpu_sender = self._gpu_sender
        if gpu_sender is not None and len(data) > CREDIT.size:
            gpu_sender.answered(data)
            return
        count = CREDIT.unpack(data)[0] if len(data) == CREDIT.size else 0
        if not 0 < count <= len(self._under_way):
            raise WireError(f"{self._channel}: {data!r} is no number of signals that were taken")
        self._room += count
        for _ in range(count):
            slot = self._under_way.popleft()
            if slot is not None and slot < self._channel.capacity:
                self._free.append(slot)
            elif slot is not None and gpu_sender is not None:
                gpu_sender.free(slot - self._channel.capacity)

    def _open_ring(self, nbytes: int, stamp: Stamp) -> Ring:
        """Make a ring for payloads of `nbytes`. The receiver reads earlier signals from its old
        ring: packets keep their order."""
        slots = self._channel.capacity
        slot_bytes = -(-nbytes // ALIGNMENT) * ALIGNMENT
        fd = os.memfd_create(
            f"hamdist-{self._channel.number}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        )
        try:
            os.ftruncate(fd, slots * slot_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals())
            ring = Ring(fd, slots, slot_bytes, writes=True)
            if self._ring is not None:
                self._ring.close()
            self._ring = ring
            self._free = list(reversed(range(slots)))
            channel = self._channel
            fits = (s if s is not None and s >= channel.capacity else None for s in self._under_way)
            self._under_way = deque(fits)
            head = (
                RING_MAGIC,
                RING_FORMAT,
                0,
                channel.number,
                self._context.run,
                slots,
                slot_bytes,
            )
            self._packet(RING_HEADER.pack(*head), stamp)
            self._packet(RING_MAGIC, stamp, fd)
        finally:
            os.close(fd)
        return ring

    def move(self, context: EndpointContext) -> None:
        self._context = context

    def close(self) -> None:
        self._socket.close()
        if self._ring is not None:
            self._ring.close()
        if self._gpu_sender is not None:
            self._gpu_sender.close()
