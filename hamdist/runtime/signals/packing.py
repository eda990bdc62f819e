"""Signals as bytes.

A message is one packed signal, or several in the order of their sending (a bundle, see `Bundle` in
dynamics/schedule). A packed signal is a header and then its payload, filled up to a multiple of
8 bytes. A payload that travels separately (a frame, a slot of shared memory) is replaced by its
number. Header, little-endian: magic 'HD', format, kind, flags, type, number of dimensions (1 byte
each), a byte of padding, run (8), channel (4), number of the separate payload (4), tick, sample,
version (8 each), then 8 bytes per dimension.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamdist.dynamics.schedule.events import Stamp
from hamdist.errors import WireError
from hamdist.runtime.signals.signal import Channel, Signal

FORMAT = 2
HEADER = struct.Struct("<2sBBBBBxQIIqqq")
_FIXED = struct.Struct("<2sBBBBBxQI")  # what repeats in a channel, and what does not:
_VARYING = struct.Struct("<Iqqq")
_DIMS_AT = 6
MAGIC = b"HD"
MAX_DIMS = 16
END = 1
EMPTY = 2
SEQUENCE_END = 4
APART = 8
MAX_BYTES = 2**40  # of one payload: beyond it a header is no signal's
# How much larger than planned a payload may be: batches may be larger than the first one was; a
# message may be wider than the state that it answers (float64 for float32), and bring that state
# along (memory 'reversible').
TIMES = 16
MAX_HEADER = HEADER.size + 8 * MAX_DIMS
_REMEMBERED = 64  # forms of signals that a channel's packer knows by heart
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


class WireForm(NamedTuple):
    """Shape, type and size of a payload.

    Attributes:
        shape, dtype: of the tensor.
        nbytes: size of the tensor.
        array: ctypes type of its bytes.
        fill: bytes up to a multiple of 8.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    array: Any
    fill: bytes

    def new(self) -> Tensor:
        """Return an empty tensor of this form."""
        return torch.empty(self.shape, dtype=self.dtype)

    def bytes_of(self, tensor: Tensor) -> Any:
        """Return the memory of the tensor, not a copy; the tensor has to outlive it."""
        return self.array.from_address(tensor.data_ptr())


class Packed(NamedTuple):
    """A signal as it lies in a message.

    Attributes:
        form: of the payload; None without one.
        apart: number of a payload that travels separately, else None.
        start: where the signal's own payload begins, in bytes.
        end: where the next signal begins.
    """

    stamp: Stamp
    flags: int
    form: WireForm | None
    apart: int | None
    start: int
    end: int


class Packer:
    """Packs and unpacks the signals of one channel of one run.

    Headers of one channel differ in their stamps alone, as long as type and shape stay the same.
    The other bytes are made and checked once, and recognised by their value from then on.
    """

    def __init__(self, run: int, channel: Channel) -> None:
        self._run = run
        self._channel = channel
        self._templates: dict[tuple[Any, ...], tuple[bytes, bytes]] = {}
        self._forms: dict[tuple[Any, ...], WireForm] = {}
        self._seen: dict[bytes, tuple[int, WireForm | None]] = {}

    def form(self, payload: Tensor) -> WireForm:
        """Return the form of a payload. Raises WireError if it cannot be sent."""
        key = (payload.dtype, payload.shape)
        form = self._forms.get(key)
        if form is None:
            if payload.dtype not in _CODES or payload.dim() > MAX_DIMS or payload.is_meta:
                raise WireError(
                    f"{self._channel}: type {payload.dtype} with {payload.dim()} dimensions on "
                    f"{payload.device} cannot be sent"
                )
            form = _form(tuple(payload.shape), payload.dtype)
            _remember(self._forms, key, form)
        if not payload.is_contiguous():
            raise WireError(f"{self._channel}: a payload has to be contiguous, see ready()")
        return form

    def header(self, signal: Signal, form: WireForm | None, index: int | None = None) -> bytes:
        """Return the header of a signal; `index`: of a payload that travels separately."""
        flags = (
            (END if signal.end else 0)
            | (SEQUENCE_END if signal.sequence_end else 0)
            | (EMPTY if form is None else 0)
            | (0 if index is None else APART)
        )
        key = (flags, form)
        template = self._templates.get(key)
        if template is None:
            shape = () if form is None else form.shape
            code = 0 if form is None else _CODES[form.dtype]
            number, kind = self._channel.number, self._channel.kind
            fixed = (MAGIC, FORMAT, kind, flags, code, len(shape), self._run, number)
            template = _FIXED.pack(*fixed), struct.pack(f"<{len(shape)}q", *shape)
            _remember(self._templates, key, template)
        return template[0] + _VARYING.pack(index or 0, *signal.stamp) + template[1]

    def read(self, message: bytes, at: int) -> Packed:
        """Return the signal at byte `at`. Raises WireError if no whole one of this channel is."""
        if len(message) < at + HEADER.size:
            raise WireError(f"{self._channel}: a header of {len(message) - at} bytes")
        start = at + HEADER.size + 8 * message[at + _DIMS_AT]
        key = message[at : at + _FIXED.size] + message[at + HEADER.size : start]
        layout = self._seen.get(key)
        if layout is None:
            layout = self._checked(message, at)
            _remember(self._seen, key, layout)
        flags, form = layout
        index, *stamp = _VARYING.unpack_from(message, at + _FIXED.size)
        if flags & APART or form is None:
            return Packed(
                Stamp(*stamp), flags, form, index if flags & APART else None, start, start
            )
        end = start + form.nbytes + len(form.fill)
        if end > len(message):
            raise WireError(
                f"{self._channel}: {len(message) - start} bytes do not make shape {form.shape} of "
                f"{form.dtype}"
            )
        return Packed(Stamp(*stamp), flags, form, None, start, end)

    def _checked(self, message: bytes, at: int) -> tuple[int, WireForm | None]:
        """Return flags and form of a header that is new to this packer."""
        channel = self._channel
        magic, form, kind, flags, code, dims, run, number = _FIXED.unpack_from(message, at)
        if magic != MAGIC or form != FORMAT:
            raise WireError(f"{channel}: not a signal of format {FORMAT}")
        if run != self._run:
            raise WireError(f"{channel}: a signal of run {run:x}, this is run {self._run:x}")
        if kind != channel.kind or number != channel.number:
            raise WireError(f"{channel}: a signal of kind {kind} for channel {number} arrived")
        if dims > MAX_DIMS or len(message) < at + HEADER.size + 8 * dims or code >= len(_DTYPES):
            raise WireError(f"{channel}: a header with {dims} dimensions, type {code}")
        if flags >= 2 * APART:
            raise WireError(f"{channel}: a header with flags {flags:#x}")
        if flags & EMPTY:
            if flags & APART or dims:
                raise WireError(f"{channel}: an empty signal with a payload")
            return flags, None
        shape = struct.unpack_from(f"<{dims}q", message, at + HEADER.size)
        widest = math.prod(max(n, 1) for n in shape) * _DTYPES[code].itemsize
        if any(n < 0 for n in shape) or widest > MAX_BYTES:
            raise WireError(f"{channel}: bytes do not make shape {shape} of {_DTYPES[code]}")
        return flags, _form(shape, _DTYPES[code])

    def unpack(self, message: bytes, apart: Callable[[WireForm, int], Tensor]) -> list[Signal]:
        """Return the signals of a message, their payloads copied into aligned memory.

        apart: fetches a payload that travelled separately, by form and number.
        """
        signals = []
        at = 0
        while True:
            stamp, flags, form, index, start, at = self.read(message, at)
            payload = None
            if form is not None and index is not None:
                payload = apart(form, index)
            elif form is not None:
                payload = form.new()
                # (to ctypes a bytes object is the address of its first byte)
                ctypes.memmove(payload.data_ptr(), message[start:at], form.nbytes)
            end = flags & END != 0
            signals.append(Signal(stamp, payload, end, flags & SEQUENCE_END != 0))
            if at == len(message):
                return signals


def _form(shape: tuple[int, ...], dtype: torch.dtype) -> WireForm:
    nbytes = math.prod(shape) * dtype.itemsize
    return WireForm(shape, dtype, nbytes, ctypes.c_char * nbytes, bytes(-nbytes % 8))


def _remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    """Cache a value, within a bounded number of entries."""
    if len(cache) >= _REMEMBERED:
        cache.clear()
    cache[key] = value
