"""The receiving end of a ring in shared memory."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
from collections import deque
from pathlib import Path
from time import perf_counter

from torch import Tensor

from hamdist.dynamics.schedule.events import Stamp
from hamdist.errors import ClusterError, WireError
from hamdist.runtime.signals.packing import MAX_HEADER, Packer, WireForm
from hamdist.runtime.signals.signal import ALIGNMENT, Channel, Signal
from hamdist.runtime.transport.endpoint import EndpointContext, socket_file
from hamdist.runtime.transport.gpu_ring import OFFER, GpuMemory, GpuRingReceiver
from hamdist.runtime.transport.shared_memory import (
    CREDIT,
    GPU_SCHEME,
    INLINE_BYTES,
    PACKET_BYTES,
    PEER,
    RING_FORMAT,
    RING_HEADER,
    RING_MAGIC,
    SCHEME,
    Ring,
    prepare_socket,
    seals,
)


class SharedReceiver:
    """Listens at a file of the run's folder, for one sender.

    `memory` belongs to the GPU that the receiving block computes on, if it may map shared memory.
    """

    def __init__(
        self, context: EndpointContext, channel: Channel, memory: GpuMemory | None = None
    ) -> None:
        self._context = context
        self._channel = channel
        self._packer = Packer(context.run, channel)
        self._group = max(1, channel.slack // 2)
        self._most = PACKET_BYTES if channel.bundle > 1 else MAX_HEADER + INLINE_BYTES + 8
        self._came: deque[Signal] = deque()
        self._received = 0
        self._ring: Ring | None = None
        self._gpu_receiver = (
            None if memory is None else GpuRingReceiver(memory, channel, context.run)
        )
        self._sender = 0  # its process
        self._lost = False  # with signals that cannot be trusted: nothing behind them counts
        self._socket: socket.socket | None = None
        self._file: Path = socket_file(context.run, channel)
        self.address = f"{SCHEME if memory is None else GPU_SCHEME}{self._file}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(str(self._file))
            self._listener.listen(1)
            prepare_socket(self._listener)
        except OSError as error:
            self._listener.close()
            raise ClusterError(f"{channel}: no socket at {self._file}: {error}") from None

    def receive(self, stamp: Stamp) -> Signal:
        if not self._came:
            self._receive(stamp)
        signal = self._came.popleft()
        self._received += 1
        if self._received >= self._group:
            self._give_back()
        return signal

    def _receive(self, stamp: Stamp) -> None:
        """Sleep until the next message."""
        context = self._context
        while not self._came:
            if self._lost:
                context.lost(self._channel, stamp, sending=False)
            data = self._packet(stamp)
            if data[:2] == RING_MAGIC:
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
            context.packed += perf_counter() - began

    def answer(self) -> None:
        """Answer an offer that was sent before this call, if any, and read nothing else."""
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
        context = self._context
        began = perf_counter()
        while True:
            try:
                connection = self._socket or self._accept()
                data = connection.recv(self._most + 1)
            except BlockingIOError:
                context.turn(self._channel, stamp, sending=False)
            except ConnectionResetError:
                continue  # the sender has left credits unread; what it sent is still there
            else:
                if data:
                    break
                context.lost(self._channel, stamp, sending=False)
        context.waiting = None
        context.waited += perf_counter() - began
        return data

    def _accept(self) -> socket.socket:
        connection, _ = self._listener.accept()
        prepare_socket(connection)
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
        self._sender, user, _ = PEER.unpack(peer)
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
            self._socket.send(CREDIT.pack(self._received), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return  # the number goes with the next one (4)
        except (BrokenPipeError, ConnectionResetError):
            pass  # nobody is left to need it
        self._received = 0

    def _take_ring(self, data: bytes, stamp: Stamp) -> None:
        """Map the memory whose descriptor comes in the next packet."""
        channel = self._channel
        if len(data) != RING_HEADER.size:
            raise WireError(f"{channel}: {len(data)} bytes announce a ring")
        _, form, _, number, run, slots, slot_bytes = RING_HEADER.unpack(data)
        if form != RING_FORMAT or number != channel.number or run != self._context.run:
            raise WireError(f"{channel}: a ring of format {form} for channel {number}, run {run:x}")
        fd = self._descriptor(stamp)
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            size = os.fstat(fd).st_size
            whole = slots * slot_bytes == size and slot_bytes % ALIGNMENT == 0 and size > 0
            if not whole or slots > channel.capacity or sealed & seals() != seals():
                raise WireError(
                    f"{channel}: a ring of {size} bytes with {slots} slots of {slot_bytes}, seals "
                    f"{sealed:#x}"
                )
            ring = Ring(fd, slots, slot_bytes, writes=False)
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
                data, fds, flags, _ = socket.recv_fds(self._socket, len(RING_MAGIC) + 1, 1)
            except BlockingIOError:
                self._context.turn(self._channel, stamp, sending=False, midway=True)
            except ConnectionResetError:
                continue
            else:
                if data or fds:
                    break
                self._context.lost(self._channel, stamp, sending=False)
        self._context.waiting = None
        if data != RING_MAGIC or len(fds) != 1 or flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            raise WireError(f"{self._channel}: a ring without a descriptor")
        return int(fds[0])

    def _take(self, form: WireForm, slot: int) -> Tensor:
        """Copy the payload out of its slot, so that no tensor occupies a slot."""
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
