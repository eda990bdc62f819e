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

RELU = 1
_FLAGS = {float32: 0, float64: 2}


def built() -> bool:
    """Whether the C code is there."""
    return _rows is not None


def fits(w: Tensor) -> bool:
    """Whether a layer with these weights (O, I) can be stepped here."""
    return built() and w.dtype in _FLAGS and w.is_cpu and w.is_contiguous()


def forward(w: Tensor, b: Tensor | None, x: Tensor, y: Tensor, *, relu: bool) -> None:
    """y = W x + b, or the relu of it. x: I numbers, y: O, contiguous and of the type of W."""
    _rows.forward(
        w.data_ptr(),
        0 if b is None else b.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        w.shape[0],
        w.shape[1],
        _FLAGS[w.dtype] | relu,
    )


def pull(
    w: Tensor,
    b: Tensor | None,
    x: Tensor,
    z: Tensor,
    y: Tensor | None,
    d: Tensor,
    m: Tensor | None,
    rates: tuple[float, float],
    limit: float,
) -> bool:
    """d = z, 0 where y <= 0 (y: behind a relu); m = W^T d (where wanted); then W += rates[0] d x^T
    and b += rates[1] d, unless |d| (|x|^2 + 1)^(1/2), of what moves, is above the limit. Returns
    whether W and b have moved; with rates of 0 they do not."""
    return _rows.pull(
        w.data_ptr(),
        0 if b is None else b.data_ptr(),
        x.data_ptr(),
        z.data_ptr(),
        0 if y is None else y.data_ptr(),
        d.data_ptr(),
        0 if m is None else m.data_ptr(),
        w.shape[0],
        w.shape[1],
        _FLAGS[w.dtype],
        rates[0],
        rates[1],
        limit,
    )


def norm(x: Tensor) -> float | None:
    """|x|; None for a tensor that this cannot read."""
    flags = _FLAGS.get(x.dtype)
    if _rows is None or flags is None or not x.is_cpu or not x.is_contiguous():
        return None
    return _rows.norm(x.data_ptr(), x.numel(), flags)
