"""What all kinds of blocks share: messages, readings, the loss.

A block sees tensors that its neighbours sent, and owns h, z, theta and omega; it knows no engine,
no socket and no other block. The kinds: dynamics/hold.py (Hamilton's equations tick by tick),
pulse.py (a travelling wave), sequence.py (a sequence and its reverse), each as a block with a
state and as an output net (HL Eq. 4).

Messages are the neighbours' terms of -(1/s) dz/dt: a state block w sends c_w (df_w/dh_v)^T z_w to
its parent v, an output net sends phi dL/dh_v. `None` stands for a message of zeros.
B: batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Protocol

import torch
from torch import Tensor

from hamdist.dynamics import rows
from hamdist.dynamics.cell import Cell, Record, SeededLoss
from hamdist.dynamics.constants import Dynamics
from hamdist.dynamics.gradient import AtOnce, Gradient
from hamdist.dynamics.losses import LossFunction, Slope, loss_and_slope
from hamdist.dynamics.piece import LARGE
from hamdist.dynamics.saving import Remembers, check_names

Scale = Callable[[int], float]


class Guard(Protocol):
    """Called with 'h', 'z' or 'loss' and its value before the value is used; raises where it has
    left the finite range. data: what it was made of, for an error to speak of: the parents' h,
    and of a loss the target behind them."""

    def __call__(self, quantity: str, value: Tensor, data: Sequence[Tensor] = ()) -> None: ...


class OutOfRange(ArithmeticError):
    """`quantity` ('h', 'z', 'omega' or 'loss') has left the finite range; norm: its own; cause:
    what it comes from, where that is known."""

    def __init__(self, quantity: str, norm: float, cause: str = "") -> None:
        super().__init__(f"the norm of {quantity} is {norm:g}")
        self.quantity = quantity
        self.norm = norm
        self.cause = cause


def unguarded(quantity: str, value: Tensor, data: Sequence[Tensor] = ()) -> None:
    """A guard that lets everything pass."""


def bounded(limit: float, from_stream: Sequence[bool] = ()) -> Guard:
    """A guard that raises OutOfRange for a norm above `limit`, or for NaN. from_stream: the parents
    that are inputs of the network."""

    def guard(quantity: str, value: Tensor, data: Sequence[Tensor] = ()) -> None:
        if value.is_floating_point():
            fast = rows.norm(value)
            norm = float(torch.linalg.vector_norm(value)) if fast is None else fast
            if not norm <= limit:
                parents = len(data) - (quantity == "loss")
                given = compress(data, [*from_stream[:parents], True])
                raise OutOfRange(quantity, norm, _cause(value, given))

    return guard


def _cause(value: Tensor, data: Iterable[Tensor]) -> str:
    """What a value that left the finite range comes from, where it is not the steps."""
    for given in data:
        largest = float(given.abs().max()) if given.is_floating_point() and given.numel() else 0.0
        if largest > LARGE:
            return (
                f"the stream's item holds values up to {largest:.3g}: scale it, or leave such "
                "items out"
            )
    if is_masked(value):
        return (
            f"it holds {float(value.min()):.3g} as a mask does, beside ordinary values, and a mask "
            "cannot travel between blocks: cut before the line that applies it or behind the "
            "softmax that reads it (partition), or apply the mask where it is read"
        )
    return ""


def is_masked(value: Tensor) -> bool:
    """Whether all numbers are ordinary but those that are one and the same large negative one, as
    a mask's are: -inf, the smallest of a type, or a round number."""
    large = value[~(value.abs() <= LARGE)]
    if not large.numel() or not bool((large == large[0]).all()):
        return False
    one = float(large[0])
    smallest = [torch.finfo(t).min for t in (torch.float64, torch.float32, torch.bfloat16)]
    known = [-math.inf, *smallest, *(s / 2 for s in smallest)]
    return one < 0 and (one in known or float(f"{one:.0e}") == one)


@dataclass(frozen=True, slots=True)
class Reading:
    """A readout's look at one sample: prediction (B, ...), target, loss (scalar), phi."""

    prediction: Tensor
    target: Tensor
    loss: Tensor
    phi: float


def total(messages: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of the messages in their order; None where all are zero."""
    result: Tensor | None = None
    for message in messages:
        if message is not None:
            result = message if result is None else result + message
    return result


def plain(output: Tensor) -> Tensor:
    """A cell's output without autograd's graph."""
    return output.detach() if output.requires_grad else output


def scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


class LossTaker(Remembers):
    """The loss of one readout, and its scale phi. native: see `loss_and_slope`."""

    def __init__(
        self,
        loss: LossFunction,
        dynamics: Dynamics,
        guard: Guard = unguarded,
        *,
        native: bool = False,
    ) -> None:
        self._loss = loss
        self._native = native
        self._phi = dynamics.phi
        self._first_phi = dynamics.first_phi
        self._guard = guard

    def snapshot(self) -> dict[str, Any]:
        return {"first_phi": self._first_phi, "random": self.random}

    def restore(self, state: Mapping[str, Any]) -> None:
        check_names("loss", state, ("first_phi", "random"))
        self._first_phi = state["first_phi"]
        self.random = state["random"]

    @property
    def random(self) -> dict[str, Any] | None:
        """Where the random numbers of a user's loss stand."""
        loss = self._loss
        return loss.generator.snapshot() if isinstance(loss, SeededLoss) else None

    @random.setter
    def random(self, state: Mapping[str, Any] | None) -> None:
        if isinstance(self._loss, SeededLoss) and state is not None:
            self._loss.generator.restore(state)

    def take(
        self,
        cell: Cell,
        record: Record,
        target: Tensor,
        k: int,
        *,
        moves: bool = True,
        at_once: AtOnce | None = None,
    ) -> tuple[list[Tensor | None], list[Gradient], Reading]:
        """phi_k dL/dh_p per parent and phi_k dL/dtheta of an output net, and what was read.

        moves: the weights move in this tick; the first phi lasts until they have. at_once: as in
        `Cell.pull`."""
        prediction, inputs = plain(record.output), record.inputs
        about, reading = self.look(prediction, target, k, moves=moves, inputs=inputs)
        to_parents, g = cell.pull(record, about, at_once=at_once)
        return to_parents, g, reading

    def look(
        self,
        prediction: Tensor,
        target: Tensor,
        k: int,
        *,
        moves: bool = True,
        inputs: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Reading]:
        """phi_k dL/dprediction, and what was read. inputs: of the cell that predicts."""
        value, slope = self.value(prediction, target, inputs)
        phi = self.phi(k)
        if moves:
            self.past_first()
        return slope(phi), Reading(prediction, target, value, phi)

    def value(
        self, prediction: Tensor, target: Tensor, inputs: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Slope]:
        """L, and phi dL/dprediction as a function of phi."""
        value, slope = loss_and_slope(self._loss, prediction, target, native=self._native)
        self._guard("loss", value, [*inputs, target])
        return value, slope

    def phi(self, k: int) -> float:
        """phi_k. Raises ValueError where a function of the user's gives no finite number."""
        if self._first_phi is not None:
            return self._first_phi
        phi = float(self._phi(k))
        if not math.isfinite(phi):
            raise ValueError(f"phi({k}) is {phi}; the scale of the loss is a finite number")
        return phi

    def past_first(self) -> None:
        """The first loss has been taken."""
        self._first_phi = None
