"""What a block does: the mathematics of one block, in the phases that a schedule names.

The four kinds are the two presentations, each as a block with a state and as an output net (HL
Eq. 4). A block sees tensors that its neighbours sent, and owns h, z, theta and omega; it knows no
engine, no socket and no other block.

Messages are the neighbours' terms of -(1/s) dz/dt: a state block w sends c_w (df_w/dh_v)^T z_w to
its parent v, an output net sends phi dL/dh_v. `None` stands for a message of zeros.
B: batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hamdist.config import Order
from hamdist.dynamics.cell import Cell, Record
from hamdist.dynamics.locality import Dynamics
from hamdist.dynamics.losses import LossFunction
from hamdist.dynamics.weights import Weights

Scale = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Reading:
    """A readout's look at one sample: prediction (B, ...), target, loss (scalar)."""

    prediction: Tensor
    target: Tensor
    loss: Tensor


def total(messages: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of the messages in their order; None where all are zero."""
    result: Tensor | None = None
    for message in messages:
        if message is not None:
            result = message if result is None else result + message
    return result


def scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


def take_loss(
    cell: Cell, record: Record, loss: LossFunction, target: Tensor, phi: float
) -> tuple[list[Tensor | None], list[Tensor], Reading]:
    """phi dL/dh_p per parent and phi dL/dtheta of an output net, and what was read."""
    with torch.enable_grad():
        value = loss(record.output, target)
    to_parents, g = cell.pull(record, torch.full_like(value, phi), of=value)
    return to_parents, g, Reading(record.output.detach(), target, value.detach())


class PulseBlock:
    """A state block that a pulse passes: forward of sample n, later backward of n.

        h = f(h_parents; theta)
        z = tau sum_w M_w,            M_v = c (df/dh_v)^T z,     g = c (df/dtheta)^T z

    which is one hop of Hamilton's equations with c tau = 1, eta_z = 0 and s = -1. The trace keeps
    the record of every sample between its two passes.
    """

    def __init__(
        self, cell: Cell, weights: Weights, wanted: Sequence[bool], dynamics: Dynamics, scale: Scale
    ) -> None:
        self.cell = cell
        self.weights = weights
        self.h: Tensor | None = None
        self.z: Tensor | None = None
        self.trace: dict[int, Record] = {}
        self._wanted = list(wanted)
        self._tau = dynamics.tau
        self._c = dynamics.c
        self._scale = scale

    def forward(self, sample: int, inputs: Sequence[Tensor]) -> Tensor:
        record = self.cell.forward(inputs, self._wanted)
        self.trace[sample] = record
        self.h = record.output.detach()
        return self.h

    def backward(self, sample: int, messages: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The messages to the parents; weights do not move for a sample without any message."""
        record = self.trace.pop(sample)
        message = total(messages)
        if message is None:
            self.weights.updates += 1
            return [None] * len(self._wanted)
        self.z = scaled(message, self._tau)
        to_parents, g = self.cell.pull(record, scaled(self.z, self._c))
        self.weights.move(g, self._scale(sample))
        return to_parents


class PulseReadout:
    """An output net that a pulse reaches: y = f^y(h_parents; theta), M_v = phi dL/dh_v."""

    def __init__(
        self,
        cell: Cell,
        weights: Weights,
        wanted: Sequence[bool],
        dynamics: Dynamics,
        scale: Scale,
        loss: LossFunction,
    ) -> None:
        self.cell = cell
        self.weights = weights
        self._wanted = list(wanted)
        self._phi = dynamics.phi
        self._scale = scale
        self._loss = loss

    def read(
        self, sample: int, inputs: Sequence[Tensor], target: Tensor | None
    ) -> tuple[list[Tensor | None], Reading | None]:
        """The messages to the parents, and what was read (None without a target)."""
        record = self.cell.forward(inputs, self._wanted)
        if target is None:
            self.weights.updates += 1
            return [None] * len(self._wanted), None
        to_parents, g, reading = take_loss(self.cell, record, self._loss, target, self._phi)
        self.weights.move(g, self._scale(sample))
        return to_parents, reading


@dataclass(frozen=True, slots=True)
class Tick:
    """The knobs of one tick of a held block.

    sample: shown at the input. moves: whether the state moves (m_k). updates: whether the weights
    do. target: of the loss that is taken in this tick, if one is.
    """

    sample: int
    moves: bool = True
    updates: bool = True
    target: Tensor | None = None


class HoldBlock:
    """A state block that integrates Hamilton's equations tick by tick (HL Algorithm 1).

        h_{k+1} = h_k + tau m_k c ( -h_k + f(h_parents,k; theta_k) )
        z_{k+1} = z_k + tau ( -s [ own_k - m_k c z_k + sum_w M_w,k ] - eta_z z_k )
        M_v,k   = m_k c (df/dh_v)^T z_k,        g_k = m_k c (df/dtheta)^T z_k

    z_{k+1} is completed at the start of tick k + 1, when M_k has arrived. In the sequential order
    g_k takes z_{k+1}, so the weights of tick k move then, too. own_k is phi dL/dh of a readout with
    a state: at h_k, in the sequential order at h_{k+1}.
    """

    def __init__(
        self,
        cell: Cell,
        weights: Weights,
        wanted: Sequence[bool],
        dynamics: Dynamics,
        order: Order,
        scale: Scale,
        h: Tensor,
        z: Tensor | None = None,
        loss: LossFunction | None = None,
        output: Cell | None = None,
        output_weights: Weights | None = None,
    ) -> None:
        self.cell = cell
        self.weights = weights
        self.h = h
        self.z = torch.zeros_like(h) if z is None else z
        self.output = output
        self.output_weights = output_weights
        self._wanted = list(wanted)
        self._dynamics = dynamics
        self._sequential = order is Order.SEQUENTIAL
        self._scale = scale
        self._loss = loss
        self._own: Tensor | None = None
        self._moved: bool | None = None  # m of the tick before; None before the first tick
        self._pending: tuple[Record | None, Tick] | None = None

    def complete(self, messages: Sequence[Tensor | None]) -> None:
        """Finishes the tick before: z, and in the sequential order the weights."""
        if self._moved is None:
            return
        d = self._dynamics
        keeps = 1 + d.sign * d.step * self._moved - d.tau * d.eta_z
        arrived = total([*messages, self._own])
        z = None if keeps == 0 else scaled(self.z, keeps)
        if arrived is not None:
            arrived = scaled(arrived, -d.sign * d.tau)
            z = arrived if z is None else z + arrived
        self.z = torch.zeros_like(self.z) if z is None else z
        if self._pending is not None:
            record, tick = self._pending
            self._pending = None
            g = None
            if record is not None:
                _, g = self.cell.pull(record, scaled(self.z, d.c), inputs=False)
            self.weights.move(g, self._scale(tick.sample))

    def tick(
        self, inputs: Sequence[Tensor], tick: Tick
    ) -> tuple[list[Tensor | None], Reading | None]:
        """One tick, after `complete`; `h` is then the state of the next. Returns the messages to
        the parents, and what a readout read."""
        reading = None if self._sequential else self._compare(tick)
        record: Record | None = None
        to_parents: list[Tensor | None] = [None] * len(self._wanted)
        g: list[Tensor] | None = None
        d = self._dynamics
        if tick.moves:
            record = self.cell.forward(inputs, self._wanted)
            now = tick.updates and not self._sequential
            later = tick.updates and self._sequential
            cotangent = scaled(self.z, d.c)
            to_parents, g = self.cell.pull(record, cotangent, weights=now, keep=later)
            f = record.output.detach()
            self.h = f if d.step == 1 else self.h + d.step * (f - self.h)
        self._moved = tick.moves
        if tick.updates and self._sequential:
            self._pending = (record, tick)
        elif tick.updates:
            self.weights.move(g if tick.moves else None, self._scale(tick.sample))
        if self._sequential:
            reading = self._compare(tick)
        return to_parents, reading

    def _compare(self, tick: Tick) -> Reading | None:
        """own = phi dL/dh at the present h, and the step of the output module's weights."""
        self._own = None
        if self._loss is None:
            return None
        reading = None
        g: list[Tensor] | None = None
        if tick.target is not None:
            if self.output is None:
                h = self.h.detach().requires_grad_()
                record = Record([h], [], h)
                cell = self.cell
            else:
                cell = self.output
                record = cell.forward([self.h], [True])
            (self._own,), g, reading = take_loss(
                cell, record, self._loss, tick.target, self._dynamics.phi
            )
        if self.output_weights is not None and tick.updates:
            self.output_weights.move(g, self._scale(tick.sample))
        return reading


class HoldReadout:
    """An output net of a held sample (HL Eq. 4): predicts from its parents' h_k and takes the loss
    in the same tick.

        y_k = f^y(h_parents,k; theta_k),    M_v,k = phi dL/dh_v,    g_k = phi dL/dtheta
    """

    def __init__(
        self,
        cell: Cell,
        weights: Weights,
        wanted: Sequence[bool],
        dynamics: Dynamics,
        scale: Scale,
        loss: LossFunction,
    ) -> None:
        self.cell = cell
        self.weights = weights
        self._wanted = list(wanted)
        self._phi = dynamics.phi
        self._scale = scale
        self._loss = loss

    def tick(
        self, inputs: Sequence[Tensor], tick: Tick
    ) -> tuple[list[Tensor | None], Reading | None]:
        to_parents: list[Tensor | None] = [None] * len(self._wanted)
        reading = None
        g: list[Tensor] | None = None
        if tick.target is not None:
            record = self.cell.forward(inputs, self._wanted)
            to_parents, g, reading = take_loss(
                self.cell, record, self._loss, tick.target, self._phi
            )
        if tick.updates:
            self.weights.move(g, self._scale(tick.sample))
        return to_parents, reading
