"""Norms and losses by the C code of native/rows.c, and the product of matrices that it calls.

A step of a small batch is bound by what a call costs. Where torch's library does not hide its BLAS,
products on several rows are those of torch. native/chain.py has the chains of operations.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch
from torch import Tensor, float32, float64, int64

try:
    from hamdist.dynamics.native import _rows
except ImportError:  # installed where there was no C compiler
    _rows = None  # type: ignore[assignment]

LAYOUT = 6  # of rows.c's arguments: a library that was built from an earlier one is not used
if getattr(_rows, "LAYOUT", 1) != LAYOUT:
    _rows = None  # type: ignore[assignment]
library = _rows

FLAGS = {float32: 0, float64: 1}
SMALL = 512  # logits, up to which exp() one by one is faster than five calls of torch


def built() -> bool:
    """Return True if the C code was built."""
    return library is not None


def has_products(rows: int) -> bool:
    """Return True if the products of so many rows are those of native/products.h, not of a BLAS.

    That follows from the processor (`product_rows` in rows.c), and from torch's number of threads.
    """
    return built() and 1 < rows <= library.PRODUCT_ROWS and torch.get_num_threads() == 1


@cache
def gemm(dtype: torch.dtype) -> int:
    """Return the address of torch's own function for products of matrices; 0 if it is hidden.

    With it bits are those of torch.mm, as both call it alike.
    """
    if sys.byteorder != "little":
        return 0
    name = {float32: "sgemm_", float64: "dgemm_"}[dtype]
    for file in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            function = getattr(ctypes.CDLL(f"{torch.__path__[0]}/lib/{file}"), name)
        except (OSError, AttributeError):  # on another system, or hidden
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def add_outer(tensor: Tensor, z: Tensor, x: Tensor, alpha: float, beta: float) -> bool:
    """Set tensor (O, I) = beta tensor + alpha z^T x, of z (R, O) and x (R, I), by products.h.

    With beta 0 the tensor is not read. Returns False where those products do not serve.
    """
    serves = has_products(len(z)) and alpha != 0 and all(map(reads, (tensor, z, x)))
    if serves and tensor.dtype == z.dtype == x.dtype:
        pointers = tensor.data_ptr(), z.data_ptr(), x.data_ptr()
        sizes = len(z), x.shape[1], z.shape[1], FLAGS[x.dtype]
        library.add_outer(*pointers, *sizes, alpha, beta)
        return True
    return False


def norm(x: Tensor) -> float | None:
    """Return |x|; None for a tensor that the C code cannot read."""
    return library.norm(x.data_ptr(), x.numel(), FLAGS[x.dtype]) if reads(x) else None


def reads(x: Tensor) -> bool:
    """Return True if the C code can read x."""
    return built() and x.dtype in FLAGS and x.is_cpu and x.is_contiguous()


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
    targets = library.cross_entropy(
        y.data_ptr(),
        classes.data_ptr(),
        loss.data_ptr(),
        d.data_ptr(),
        y.shape[0],
        y.shape[1],
        -ignored,
        FLAGS[y.dtype],
    )
    return (loss, d) if targets else None
