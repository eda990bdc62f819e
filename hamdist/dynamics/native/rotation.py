"""Rotations of vectors, and their 4-bit form, by the C code of native/rotation.h.

The same as dynamics/modules/subspace.py and runtime/signals/codes.py by torch, but for the order of
sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hamdist.dynamics.native import rows


def rotate(x: Tensor, signs: Tensor, *, back: bool) -> Tensor | None:
    """Return R x of vectors x (N, n), or R^T x; None for tensors that the C code cannot read.

    Args:
        x: the vectors.
        signs: +-1, (n,), of x's type.
        back: whether R^T is asked for.
    """
    if not rows.reads(x):
        return None
    y, (many, n) = torch.empty_like(x), x.shape
    pointers = x.data_ptr(), signs.data_ptr(), y.data_ptr()
    rows.library.rotate(*pointers, many, n, back, rows.FLAGS[x.dtype])
    return y


def to_nibbles(x: Tensor, signs: Tensor) -> tuple[Tensor | None] | None:
    """Return the 4-bit form of vectors x (N, n), uint8 (N, (n + 1) // 2 + 2), in a tuple.

    The tuple holds None where a scale is not finite. None for tensors as of `rotate`.
    """
    if not rows.reads(x):
        return None
    many, n = x.shape
    sent = torch.empty(many, (n + 1) // 2 + 2, dtype=torch.uint8)
    pointers = x.data_ptr(), signs.data_ptr(), sent.data_ptr()
    finite = rows.library.to_nibbles(*pointers, many, n, rows.FLAGS[x.dtype])
    return (sent if finite else None,)


def from_nibbles(sent: Tensor, signs: Tensor, n: int) -> Tensor | None:
    """Return the vectors (N, n), of the type of `signs`, of what `to_nibbles` returns.

    None for tensors as of `rotate`, and for bytes that are not of this form.
    """
    fits = sent.dtype == torch.uint8 and sent.shape[1:] == ((n + 1) // 2 + 2,)
    if not rows.reads(signs) or not fits or not sent.is_cpu or not sent.is_contiguous():
        return None
    y = torch.empty(len(sent), n, dtype=signs.dtype)
    pointers = sent.data_ptr(), signs.data_ptr(), y.data_ptr()
    rows.library.from_nibbles(*pointers, len(sent), n, rows.FLAGS[signs.dtype])
    return y
