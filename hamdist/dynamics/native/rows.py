"""Linear layers by the C code of native/rows.c.

A step of a small batch is bound by reading and writing W, and by what a call costs: one call makes
f(W x + b) of all layers, one both vector-Jacobian products and the updates. One row has code of its
own; the products of several are those of torch's own BLAS, where its library offers them.
R: rows; I, O: inputs and outputs.
"""

from __future__ import annotations

import ctypes
import sys
from array import array
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, float32, float64, int64

try:
    from hamdist.dynamics.native import _rows
except ImportError:  # installed where there was no C compiler
    _rows = None  # type: ignore[assignment]

_FLAGS = {float32: 0, float64: 1}
NARROW = 1 << 14
SMALL = 512  # logits, up to which exp() one by one is faster than five calls of torch
_PAD = 16  # numbers: 64 bytes of the smaller type


def built() -> bool:
    """Return True if the C code was built."""
    return _rows is not None


@cache
def _gemm(dtype: torch.dtype) -> int:
    """Return the address of torch's own function for products of matrices; 0 if it is hidden.

    With it bits are those of torch.mm, as both call it alike.
    """
    if sys.byteorder != "little":
        return 0
    name = {float32: "sgemm_", float64: "dgemm_"}[dtype]
    for library in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            function = getattr(ctypes.CDLL(f"{torch.__path__[0]}/lib/{library}"), name)
        except (OSError, AttributeError):  # on another system, or hidden
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


class NativeLayers:
    """Layers each of which reads the one before; their weights move in place.

    layers: by layer W (O, I), the bias, and True if a relu is behind them.
    """

    MOST = 64  # layers

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor | None, bool]]) -> None:
        self._kept = layers  # whose memory this reads and writes
        self.dtype = layers[0][0].dtype
        self.many = len(layers)
        outs = [w.shape[0] for w, _, _ in layers]
        rows = [
            (w.data_ptr(), 0 if b is None else b.data_ptr(), *w.shape, relu)
            for w, b, relu in layers
        ]
        self._layers = array("Q", [number for row in rows for number in row])
        self._at = self._layers.buffer_info()[0]
        self._flags = _FLAGS[self.dtype]
        self._gemm = _gemm(self.dtype)
        self._outs = outs
        self._out = outs[-1]

    @classmethod
    def of(cls, layers: Sequence[tuple[Tensor, Tensor | None, bool]]) -> NativeLayers | None:
        """Return the layers; None for weights that the C code cannot step."""
        dtype = layers[0][0].dtype
        known = [t for w, b, _ in layers for t in (w, b) if t is not None]
        plain = all(reads(t) and t.dtype is dtype for t in known)
        return cls(layers) if plain and all(_pays(w) for w, _, _ in layers) else None

    def reads(self, x: Tensor) -> bool:
        """Return True if x, of the right shape, is memory that the C code can read."""
        return x.dtype is self.dtype and x.is_cpu and x.is_contiguous()

    def room(self, rows: int) -> tuple[int, int, int]:
        """Return the numbers of `inner`, d and m, of `forward` and `pull`, for so many rows."""
        filled = [_filled(rows * out) for out in self._outs]
        widest = rows * max(self._outs) if self.many > 1 else 1  # (one layer has no m)
        return max(sum(filled[:-1]), 1), sum(filled), widest

    def takes(self, rows: int) -> bool:
        """Return True if so many rows can be stepped."""
        return rows == 1 or (rows > 1 and self._gemm != 0)

    def forward(self, x: Tensor, inner: Tensor, y: Tensor) -> None:
        """Write the output of the last layer to y, (R, O), those of the others to `inner`.

        inner, and d and m of `pull`: as `room` says.
        """
        torch.get_num_threads()  # tells OpenMP torch's number, once in each Python thread
        _rows.chain_forward(
            self._at,
            self.many,
            x.data_ptr(),
            inner.data_ptr(),
            y.data_ptr(),
            y.numel() // self._out,
            self._gemm,
            self._flags,
        )

    def pull(
        self,
        x: Tensor,
        inner: Tensor,
        y: Tensor,
        z: Tensor,
        d: Tensor,
        m: Tensor,
        to: Tensor | None,
        rates: array[float] | None,
        limit: float,
    ) -> int:
        """Compute products and updates by layer, from the last one on.

        d = z, 0 behind a relu whose result is not above 0; the message d W, that of the first
        layer to `to`; then W += alpha d^T x and b += beta times the sum of d's rows, unless the
        norm of d^T (x, 1), of the parts that move, is above the limit.

        rates: alpha and beta of every layer; None: nothing moves. Returns a number whose bit l is
        set if layer l has moved.
        """
        torch.get_num_threads()  # (as in `forward`)
        return _rows.chain_pull(
            self._at,
            self.many,
            x.data_ptr(),
            inner.data_ptr(),
            y.data_ptr(),
            z.data_ptr(),
            d.data_ptr(),
            m.data_ptr(),
            0 if to is None else to.data_ptr(),
            0 if rates is None else rates.buffer_info()[0],
            y.numel() // self._out,
            self._gemm,
            self._flags,
            limit,
        )

    def outputs(self, inner: Tensor, layers: int, rows: int = 1) -> list[Tensor]:
        """Return the results of `forward`, or d of `pull`, for the first `layers`: (R, O) each."""
        found, at = [], 0
        for out in self._outs[:layers]:
            found.append(inner[at : at + rows * out].view(rows, -1))
            at += _filled(rows * out)
        return found


def _filled(numbers: int) -> int:
    return -(-numbers // _PAD) * _PAD


def _pays(w: Tensor) -> bool:
    """Return True if one row is faster here than by torch: not for many rows of a few numbers."""
    return w.shape[1] >= _PAD or w.numel() <= NARROW


def norm(x: Tensor) -> float | None:
    """Return |x|; None for a tensor that the C code cannot read."""
    return _rows.norm(x.data_ptr(), x.numel(), _FLAGS[x.dtype]) if reads(x) else None


def reads(x: Tensor) -> bool:
    """Return True if the C code can read x."""
    return built() and x.dtype in _FLAGS and x.is_cpu and x.is_contiguous()


def masked(z: Tensor, y: Tensor, d: Tensor) -> float:
    """Set d = z, and 0 where y <= 0; return |d|. All of one shape, dtype, and contiguous."""
    return _rows.masked(z.data_ptr(), y.data_ptr(), d.data_ptr(), d.numel(), _FLAGS[d.dtype])


def add_columns(b: Tensor, d: Tensor, beta: float) -> None:
    """Add beta times the sum of d's rows to b. b: (O,), d: (R, O), of one dtype, contiguous."""
    rows, out = d.shape
    _rows.columns(b.data_ptr(), d.data_ptr(), rows, out, _FLAGS[d.dtype], beta)


def cross_entropy(y: Tensor, classes: Tensor, ignored: int) -> tuple[Tensor, Tensor] | None:
    """Return the mean softmax cross-entropy, (), of y (B, C) and classes (B,), and its slope.

    None where the C code does not apply, or torch is faster. ignored: a class below 0 without a
    loss.
    """
    many = y.numel()
    if not 0 < many <= SMALL or not reads(y) or classes.dtype != int64:
        return None
    if not classes.is_contiguous() or classes.shape != y.shape[:1]:
        return None
    loss, d = y.new_empty(()), y.new_empty(y.shape)
    known = _rows.cross_entropy(
        y.data_ptr(),
        classes.data_ptr(),
        loss.data_ptr(),
        d.data_ptr(),
        y.shape[0],
        y.shape[1],
        -ignored,
        _FLAGS[y.dtype],
    )
    return (loss, d) if known else None
