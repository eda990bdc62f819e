"""Signals that stay in GPU memory on their way from one process of a host to another.

The sender of a channel shares a ring of slots in the memory of its own GPU with its receiver.
Stamps and headers cross by the socket (shared_memory.py); the content of a slot never touches the
host.

    sender   ── offer: how many slots of how many bytes, and how to reach them ──▶       receiver
             ◀── answer: a digest of what lies there, or why they cannot be reached ──
             ── signals: headers with numbers of slots, from C on (below: host memory) ──▶
             ◀── credit, as in shared_memory.py ──

No end waits for an answer. Until it has come signals go through host memory, and so do all signals
if the receiver does not read what the sender has written. A run lets all ends answer before its
first tick; an end that is opened anew (ray_engine/replacement.py) is answered while it runs.

1. A slot is written again only when its signal's room was given back, which is after the receiver
   has copied it out and its GPU has finished. C slots, and at most C signals that are not given
   back: there is a free one whenever there is room. A full ring holds the sender back.
2. A packet leaves when the sender's GPU has finished writing. No events between processes.
3. Shared memory of a dead process may be gone, or hold anything. So after copying and before
   handing out, a receiver checks whether its sender is about to end; if it is, nothing of that
   message is used. The sender's successor sends it again, out of its own snapshot and log: the
   log (signals/sent_log.py) keeps the sender's own tensors, never slots.
4. A signal that is larger than a slot, or that lies elsewhere, goes through host memory.

All but `CudaMemory` runs, and is tested, without a GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from hamdist.errors import WireError
from hamdist.runtime.signals.packing import WireForm
from hamdist.runtime.signals.signal import Channel

SLOT_ALIGNMENT = 512  # bytes, as CUDA's own allocations
OFFER = b"HO"
ANSWER = b"HA"
ANSWER_BYTES = 512
_OFFER_FORMAT = 1
_HEAD = struct.Struct("<2sBBIQIQ")  # magic, format, padding, channel, run, slots, bytes of a slot
_FOUND, _REFUSED = b"+", b"-"
_NOISE = 4096  # bytes that are written at either end of a ring, to be found there
_PF_EXITING = 0x4
_FLAGS = 6  # of the fields of /proc/PID/stat, behind the process's name


class GpuMemoryError(RuntimeError):  # as all that torch raises of a GPU
    """Raised where GPU memory cannot be reached from another process; the text says why."""


class GpuMemory(Protocol):
    """The memory of one device; what it shares is of type uint8."""

    def holds(self, tensor: Tensor) -> bool:
        """Return True for a tensor on the device."""

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return uninitialised memory of the device."""

    def export(self, nbytes: int) -> tuple[Tensor, bytes]:
        """Allocate memory, and return it with plain data by which another process can reach it.

        Raises GpuMemoryError.
        """

    def reach(self, handle: bytes) -> Tensor:
        """Map the memory that another process shares. Raises GpuMemoryError."""

    def synchronise(self) -> None:
        """Wait until all copies that were started here have finished."""


MemoryOf: TypeAlias = Callable[[torch.device], GpuMemory | None]


class Refusal(NamedTuple):
    """A channel between two GPUs whose signals go through host memory, and why."""

    channel: str
    reason: str


class GpuRingSender:
    """The sender's slots on `channel`.

    Attributes:
        refusal: why the slots are not used, or not for all signals; None as long as they are, or
            the receiver has not answered.
    """

    def __init__(self, memory: GpuMemory, channel: Channel, run: int, slot_bytes: int) -> None:
        self.refusal: str | None = None
        self._memory = memory
        self._channel = channel
        self._run = run
        self._slot_bytes = -(-slot_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        self._ring: Tensor | None = None
        self._expected = b""
        self._free: list[int] = []
        self._written = False
        self.used = False  # the receiver has found what was written
        self.waiting = False  # for an answer

    def offer(self) -> bytes | None:
        """Return the packet that offers the slots; None if there is no memory for them."""
        slots = self._channel.capacity
        try:
            ring, handle = self._memory.export(slots * self._slot_bytes)
            for end in (ring[:_NOISE], ring[-_NOISE:]):
                end.copy_(torch.frombuffer(bytearray(os.urandom(len(end))), dtype=torch.uint8))
            self._expected = _digest(ring)
            self._memory.synchronise()
        except RuntimeError as error:
            self.refusal = _first_line(error)
            return None
        self._ring, self.waiting = ring, True
        head = (OFFER, _OFFER_FORMAT, 0, self._channel.number, self._run, slots, self._slot_bytes)
        return _HEAD.pack(*head) + handle

    def answered(self, data: bytes) -> None:
        """Take the receiver's answer. Raises WireError if it is none to this offer."""
        kind, body = data[2:3], data[3:]
        if not self.waiting or data[:2] != ANSWER or kind not in (_FOUND, _REFUSED):
            raise WireError(f"{self._channel}: {data[:16]!r} answers no offer of memory")
        self.waiting = False
        if kind == _REFUSED:
            self.refusal = body.decode(errors="replace")
        elif body != self._expected:
            self.refusal = "its receiver reads something else there than its sender has written"
        if self.refusal is not None:
            self._ring = None
            return
        self._free = list(reversed(range(self._channel.capacity)))
        self.used = True

    def takes(self, payload: Tensor) -> bool:
        """Return True if a payload can go through the ring."""
        if not self.used or not payload.nbytes or not self._memory.holds(payload):
            return False
        if payload.nbytes > self._slot_bytes:
            self.refusal = (
                f"{payload.nbytes:,} bytes do not fit into slots of {self._slot_bytes:,}, which "
                "the stream's first batch has set"
            )
            return False
        return True

    def put(self, payload: Tensor) -> int:
        """Copy `payload`, which is contiguous, into a free slot, and return the slot's number."""
        if self._ring is None:
            raise ValueError(f"no memory is offered on {self._channel}")
        slot = self._free.pop()
        _part(self._ring, slot, self._slot_bytes, payload.nbytes).copy_(_bytes(payload))
        self._written = True
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back that its receiver has read."""
        self._free.append(slot)

    def synchronise(self) -> None:
        """Wait until all payloads lie in their slots."""
        if self._written:
            self._memory.synchronise()
            self._written = False

    def close(self) -> None:
        self._ring = None
        self.used = False


class GpuRingReceiver:
    """The slots that a receiver on `channel` reads."""

    def __init__(self, memory: GpuMemory, channel: Channel, run: int) -> None:
        self._memory = memory
        self._channel = channel
        self._run = run
        self._ring: Tensor | None = None
        self._slots = self._slot_bytes = 0
        self._sender = 0
        self._read = False

    def answer(self, offer: bytes, sender: int) -> bytes:
        """Return the packet that answers an offer of process `sender`. Raises WireError if it is
        none on this channel."""
        channel = self._channel
        if len(offer) < _HEAD.size:
            raise WireError(f"{channel}: {len(offer)} bytes offer memory of a GPU")
        _, form, _, number, run, slots, slot_bytes = _HEAD.unpack_from(offer)
        if form != _OFFER_FORMAT or number != channel.number or run != self._run:
            raise WireError(
                f"{channel}: an offer of format {form} for channel {number}, run {run:x}"
            )
        self._ring, self._sender = None, sender
        self._slots, self._slot_bytes = slots, slot_bytes
        try:
            if ending(sender):
                raise GpuMemoryError(
                    f"its receiver does not see its sender's process {sender} in /proc"
                )
            ring = self._memory.reach(offer[_HEAD.size :])
            if not 0 < slots <= channel.capacity or ring.numel() != slots * slot_bytes:
                raise WireError(
                    f"{channel}: {slots} slots of {slot_bytes} bytes in {ring.numel()} of a GPU"
                )
            digest = _digest(ring)
        except RuntimeError as error:
            return (ANSWER + _REFUSED + _first_line(error).encode())[:ANSWER_BYTES]
        self._ring = ring
        return ANSWER + _FOUND + digest

    def take(self, form: WireForm, slot: int) -> Tensor:
        """Copy the payload out of a slot; the copy has finished once `settled` has returned."""
        ring = self._ring
        if ring is None or slot >= self._slots or form.nbytes > self._slot_bytes:
            raise WireError(
                f"{self._channel}: no slot {slot} of a GPU that holds {form.nbytes} bytes"
            )
        tensor = self._memory.new(form.shape, form.dtype)
        _bytes(tensor).copy_(_part(ring, slot, self._slot_bytes, form.nbytes))
        self._read = True
        return tensor

    def settled(self) -> bool:
        """Wait for all copies, and return True if they are valid because the sender lives."""
        if not self._read:
            return True
        self._memory.synchronise()
        self._read = False
        return not ending(self._sender)

    def close(self) -> None:
        self._ring = None


def ending(process: int) -> bool:
    """Return True if a process is gone or about to end.

    Linux sets PF_EXITING before it takes the process's memory and files.
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return True
    return int(stat.rpartition(b")")[2].split()[_FLAGS]) & _PF_EXITING != 0


def _first_line(error: RuntimeError) -> str:
    words = (str(error).strip() or type(error).__name__).split("\n")[0]
    return words if isinstance(error, GpuMemoryError) else f"{type(error).__name__}: {words}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _part(ring: Tensor, slot: int, slot_bytes: int, nbytes: int) -> Tensor:
    return ring[slot * slot_bytes : slot * slot_bytes + nbytes]


def _digest(ring: Tensor) -> bytes:
    """Return a digest of the probe bytes at the ends of a ring."""
    ends = torch.cat([ring[:_NOISE].cpu(), ring[-_NOISE:].cpu()])
    return hashlib.sha256(bytes(ends.numpy())).digest()


class CudaMemory:
    """Memory of one GPU, named by its number in this process, which others can reach by CUDA IPC.

    It was written without a GPU at hand. The code above uses no memory before it has read back what
    was written there; the tests that need a GPU are in tests/runtime/transport.

    torch's own mechanism is used: it keeps shared memory until the reader has released it (if the
    reader was killed, until this process ends), and maps an allocation once a process. Its handle
    is plain data, and is sent as such.
    """

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device == self._device

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def export(self, nbytes: int) -> tuple[Tensor, bytes]:
        with _gpu_errors("shared"):
            memory = self.new((nbytes,), torch.uint8)
            # (the number of the device means something in this process alone; the event is not
            # needed, for what is written is waited for)
            storage = memory.untyped_storage()
            _, handle, size, offset, counter, place, event, _ = storage._share_cuda_()  # type: ignore[no-untyped-call]
        fields = [handle.hex(), size, offset, counter.hex(), place, event.hex()]
        return memory, json.dumps(fields).encode()

    def reach(self, handle: bytes) -> Tensor:
        with _gpu_errors("reached"):
            allocation, size, offset, counter, place, event = json.loads(handle)
            torch.cuda.init()  # type: ignore[no-untyped-call]
            # (the driver maps memory of GPUs that this process does not see, too)
            storage = torch.UntypedStorage._new_shared_cuda(
                self._device.index,
                bytes.fromhex(allocation),
                size,
                offset,
                bytes.fromhex(counter),
                place,
                bytes.fromhex(event),
                False,
            )
            return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)

    def synchronise(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


def cuda_memory(device: torch.device) -> GpuMemory | None:
    """Return the memory of `device`; None if it is no GPU."""
    return CudaMemory(device.index or 0) if device.type == "cuda" else None


@contextmanager
def _gpu_errors(step: str) -> Iterator[None]:
    """Turn errors of CUDA, a torch without sharing, and wrong handles into GpuMemoryError."""
    try:
        yield
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        first = (str(error).strip() or "no reason given").split("\n")[0]
        raise GpuMemoryError(
            f"memory of a GPU cannot be {step}: {type(error).__name__}: {first}"
        ) from None
