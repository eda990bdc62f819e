"""Guards of the finite range of h, z, omega and losses: they raise for a value that has left it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Protocol

import torch
from torch import Tensor

from hamdist.dynamics.native import rows

StepFactor = Callable[[int], float]


class Guard(Protocol):
    """Function that is called with 'h', 'z' or 'loss' and its value before the value is used.

    It raises where the value has left the finite range. data: the tensors from which it was
    computed, for the error: the parents' h, and for a loss the target behind them.
    """

    def __call__(self, quantity: str, value: Tensor, data: Sequence[Tensor] = ()) -> None: ...


class OutOfRange(ArithmeticError):
    """`quantity` ('h', 'z', 'omega' or 'loss') has left the finite range.

    norm: its norm; cause: the likely cause, where it is known.
    """

    def __init__(self, quantity: str, norm: float, cause: str = "") -> None:
        super().__init__(f"the norm of {quantity} is {norm:g}")
        self.quantity = quantity
        self.norm = norm
        self.cause = cause


def unguarded(quantity: str, value: Tensor, data: Sequence[Tensor] = ()) -> None:
    """Accept every value."""


def bounded(limit: float, from_stream: Sequence[bool] = ()) -> Guard:
    """Return a guard that raises OutOfRange for a norm above `limit`, or for NaN.

    from_stream: the parents that are inputs of the network.
    """

    def guard(quantity: str, value: Tensor, data: Sequence[Tensor] = ()) -> None:
        if value.is_floating_point():
            fast = rows.norm(value)
            norm = float(torch.linalg.vector_norm(value)) if fast is None else fast
            if not norm <= limit:
                parents = len(data) - (quantity == "loss")
                from_stream_data = compress(data, [*from_stream[:parents], True])
                raise OutOfRange(quantity, norm, _cause(value, from_stream_data))

    return guard


def _cause(value: Tensor, data: Iterable[Tensor]) -> str:
    """Return the likely cause of a value out of range, where it is not the step size."""
    for tensor in data:
        largest = (
            float(tensor.abs().max()) if tensor.is_floating_point() and tensor.numel() else 0.0
        )
        if largest > LARGE:
            return (
                f"the stream's sample holds values up to {largest:.3g}: scale it, or leave such "
                "samples out"
            )
    if is_masked(value):
        return (
            f"it holds {float(value.min()):.3g} as a mask does, beside ordinary values, and a mask "
            "cannot travel between blocks: cut before the line that applies it or behind the "
            "softmax that reads it (partition), or apply the mask where it is read"
        )
    return ""


def is_masked(value: Tensor) -> bool:
    """Return True if all extreme numbers are one and the same large negative number, as in a mask.

    That is -inf, the smallest of a type, or a round number.
    """
    large = value[~(value.abs() <= LARGE)]
    if not large.numel() or not bool((large == large[0]).all()):
        return False
    mask = float(large[0])
    smallest = [torch.finfo(t).min for t in (torch.float64, torch.float32, torch.bfloat16)]
    masks = [-math.inf, *smallest, *(s / 2 for s in smallest)]
    return mask < 0 and (mask in masks or float(f"{mask:.0e}") == mask)


LARGE = 1e8  # no state of a network that learns has such numbers; masks have (-1e9, -inf)
