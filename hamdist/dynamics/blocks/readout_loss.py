"""The parts that all kinds of blocks share: messages, readings, the loss.

A block sees tensors that its neighbours sent, and has h, z, theta and omega; it has no access to
engines, sockets or other blocks. The kinds: hold.py (Hamilton's equations tick by tick),
pulse.py (a travelling wave), sequence.py (a sequence and its reverse), each as a block with a
state and as an output net (HL Eq. 4).

Messages are the neighbours' terms of -(1/s) dz/dt: a state block w sends c_w (df_w/dh_v)^T z_w to
its parent v, an output net sends phi dL/dh_v. `None` stands for a message of zeros.
B: batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hamdist.dynamics.finite import Guard, unguarded
from hamdist.dynamics.objective.losses import LossFunction, Slope, Weighted, loss_and_slope
from hamdist.dynamics.saved_state.stateful import Stateful, check_names, popped
from hamdist.dynamics.updates.constants import Dynamics
from hamdist.dynamics.vjp.gradient import AtOnce, Gradient
from hamdist.dynamics.vjp.local_function import ForwardRecord, LocalFunction
from hamdist.dynamics.vjp.seeding import NO_MEMORY, SeededLoss


@dataclass(frozen=True, slots=True)
class Reading:
    """A readout's prediction (B, ...) of one sample, with target, loss (scalar) and phi;
    weighted: the target with the weights of its rows, if it has some."""

    prediction: Tensor
    target: Tensor
    loss: Tensor
    phi: float
    weighted: Tensor


def total(messages: Sequence[Tensor | None]) -> Tensor | None:
    """Return the sum of the messages in their order; None where all are zero."""
    result: Tensor | None = None
    for message in messages:
        if message is not None:
            result = message if result is None else result + message
    return result


def plain(output: Tensor) -> Tensor:
    """Return an output without autograd's graph."""
    return output.detach() if output.requires_grad else output


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Return factor * tensor; the tensor itself for a factor of 1."""
    return tensor if factor == 1 else tensor * factor


class ReadoutLoss(Stateful):
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
        self.error: Tensor | None = None  # the latest phi dL/dprediction

    def state_dict(self) -> dict[str, Any]:
        return {"first_phi": self._first_phi, **self.memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._first_phi, self.memory = popped(state, "first_phi")

    @property
    def memory(self) -> dict[str, Any]:
        """Return what the calls of a user's loss change, in tensors that they leave alone."""
        return self._loss.memory() if isinstance(self._loss, SeededLoss) else dict(NO_MEMORY)

    @memory.setter
    def memory(self, state: Mapping[str, Any]) -> None:
        state = {**NO_MEMORY, **state}  # (earlier versions have less)
        check_names("loss", state, NO_MEMORY)
        if isinstance(self._loss, SeededLoss) and state["random"] is not None:
            self._loss.remember(state)

    def take(
        self,
        cell: LocalFunction,
        record: ForwardRecord,
        target: Tensor,
        k: int,
        *,
        share: float = 1.0,
        moves: bool = True,
        at_once: AtOnce | None = None,
    ) -> tuple[list[Tensor | None], list[Gradient], Reading]:
        """Return phi_k dL/dh_p per parent and phi_k dL/dtheta of an output net, and the reading.

        share: of phi_k, as the target is part of a sample. moves: the weights move in this tick;
        the first phi lasts until they have. at_once: as in `LocalFunction.pull`.
        """
        prediction, inputs = plain(record.output), record.inputs
        about, reading = self.read(prediction, target, k, share=share, moves=moves, inputs=inputs)
        to_parents, g = cell.pull(record, about, at_once=at_once)
        return to_parents, g, reading

    def read(
        self,
        prediction: Tensor,
        target: Tensor,
        k: int,
        *,
        share: float = 1.0,
        moves: bool = True,
        inputs: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Reading]:
        """Return phi_k dL/dprediction, and the reading.

        share, moves: as in `take`. inputs: of the function that predicts.
        """
        value, slope = self.value(prediction, target, inputs)
        phi = self.phi(k)
        if moves:
            self.past_first()
        self.error = slope(phi * share)
        return self.error, Reading(prediction, self.target(target), value, phi, target)

    def target(self, target: Tensor) -> Tensor:
        """Return a target without the weights of its rows, if it has some."""
        loss = self._loss.loss if isinstance(self._loss, SeededLoss) else self._loss
        return loss.parted(target)[0] if isinstance(loss, Weighted) else target

    def value(
        self, prediction: Tensor, target: Tensor, inputs: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Slope]:
        """Return L, and phi dL/dprediction as a function of phi."""
        value, slope = loss_and_slope(self._loss, prediction, target, native=self._native)
        self._guard("loss", value, [*inputs, target])
        return value, slope

    def phi(self, k: int) -> float:
        """Return phi_k; raise ValueError where a user's function gives no finite number."""
        if self._first_phi is not None:
            return self._first_phi
        phi = float(self._phi(k))
        if not math.isfinite(phi):
            raise ValueError(f"phi({k}) is {phi}; the scale of the loss is a finite number")
        return phi

    def past_first(self) -> None:
        """Record that the first loss has been taken."""
        self._first_phi = None
