"""Linear layers on one row (batch 1), by the C code of native/rows.c.

There a step is bound by reading and writing W, and by what a call costs: one call makes f(W x + b),
one both vector-Jacobian products and the update. B = 1; I, O: inputs and outputs.
"""

from __future__ import annotations

from torch import Tensor, float32, float64

try:
    from hamdist.dynamics.native import _rows
except ImportError:  # installed where there was no C compiler
    _rows = None  # type: ignore[assignment]

_FLAGS = {float32: 0, float64: 2}


def built() -> bool:
    """Whether the C code is there."""
    return _rows is not None


class Layer:
    """The weights W (O, I) and the bias of one layer, which move in place."""

    __slots__ = ("_b", "_flags", "_kept", "_sizes", "_w", "dtype")

    def __init__(self, w: Tensor, b: Tensor | None) -> None:
        self.dtype = w.dtype
        self._kept = (w, b)  # whose memory this reads and writes
        self._w = w.data_ptr()
        self._b = 0 if b is None else b.data_ptr()
        self._sizes = (w.shape[0], w.shape[1])
        self._flags = _FLAGS[w.dtype]

    @classmethod
    def of(cls, w: Tensor, b: Tensor | None) -> Layer | None:
        """None for weights that the C code cannot step."""
        known = [t for t in (w, b) if t is not None]
        plain = all(t.is_cpu and t.is_contiguous() and t.dtype is w.dtype for t in known)
        return cls(w, b) if built() and plain and w.dtype in _FLAGS else None

    def reads(self, x: Tensor) -> bool:
        """Whether x, of the right shape, is memory that the C code can read."""
        return x.dtype is self.dtype and x.is_cpu and x.is_contiguous()

    def forward(self, x: Tensor, y: Tensor, *, relu: bool) -> None:
        """y = W x + b, or the relu of it. x: I numbers, y: O."""
        out, into = self._sizes
        _rows.forward(self._w, self._b, x.data_ptr(), y.data_ptr(), out, into, self._flags | relu)

    def pull(
        self,
        x: Tensor,
        z: Tensor,
        y: Tensor | None,
        d: Tensor,
        m: Tensor | None,
        alpha: float,
        beta: float,
        limit: float,
    ) -> bool:
        """d = z, 0 where y <= 0 (y: behind a relu); m = W^T d (where wanted); then
        W += alpha d x^T and b += beta d, unless the norm of d (x, 1)^T, of what moves, is above
        the limit. Returns whether W and b have moved; with rates of 0 they do not."""
        out, into = self._sizes
        return _rows.pull(
            self._w,
            self._b,
            x.data_ptr(),
            z.data_ptr(),
            0 if y is None else y.data_ptr(),
            d.data_ptr(),
            0 if m is None else m.data_ptr(),
            out,
            into,
            self._flags,
            alpha,
            beta,
            limit,
        )


def norm(x: Tensor) -> float | None:
    """|x|; None for a tensor that this cannot read."""
    flags = _FLAGS.get(x.dtype)
    if _rows is None or flags is None or not x.is_cpu or not x.is_contiguous():
        return None
    return _rows.norm(x.data_ptr(), x.numel(), flags)
