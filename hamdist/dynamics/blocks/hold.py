"""Blocks that integrate Hamilton's equations tick by tick (HL Algorithm 1).

B: batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hamdist.config import Order
from hamdist.dynamics.blocks.block import Block, BlockParts, SavesPasses
from hamdist.dynamics.blocks.energy import Energy
from hamdist.dynamics.blocks.gate import RetrospectiveInput
from hamdist.dynamics.blocks.readout_loss import Reading, ReadoutLoss, plain, scaled, total
from hamdist.dynamics.saved_state.stateful import registered
from hamdist.dynamics.updates.weights import Weights
from hamdist.dynamics.vjp.gradient import Gradient
from hamdist.dynamics.vjp.local_function import ForwardRecord, LocalFunction


@registered("Tick")
class Tick(NamedTuple):
    """The knobs of one tick of a held block.

    k: its number. sample: shown at the input. tau: seconds. moves: True if the state moves (m_k).
    updates: True if the weights do. target: of the loss that is taken in this tick, if one is.
    measures: True if the energies are recorded. answers: True if a prediction is asked for.
    """

    k: int
    sample: int
    tau: float
    moves: bool = True
    updates: bool = True
    target: Tensor | None = None
    measures: bool = False
    answers: bool = False


def _unchanged(h: Tensor) -> Tensor:
    return h


class HoldBlock(SavesPasses):
    """A state block that integrates Hamilton's equations tick by tick (HL Algorithm 1).

        h_{k+1} = h_k + tau m_k c ( -h_k + f(h_parents,k; theta_k) )
        z_{k+1} = z_k + tau ( -s [ own_k - m_k c z_k + sum_w M_w,k ] - eta_z z_k )
        M_v,k   = m_k c (df/dh_v)^T z_k,        g_k = m_k c (df/dtheta)^T z_k

    z_{k+1} is completed at the start of tick k + 1, when M_k has arrived. In the sequential order
    g_k takes z_{k+1}, so the weights of tick k move then, too. own_k is phi dL/dh of a readout with
    a state: at h_k, in the sequential order at h_{k+1}.

    lead: the block sends h_{k+1} + lead (h_{k+1} - h_k), its state as it will be so many ticks
    later if it goes on like this; a leaky state (c tau = a < 1) sends f_k with lead (1 - a)/a.
    retrospect: makes the input with which g_k is taken (gate.py).

    energy: of the latest tick that measured it.
    """

    def __init__(
        self,
        parts: BlockParts,
        order: Order,
        h: Tensor,
        loss: ReadoutLoss | None = None,
        output: LocalFunction | None = None,
        output_weights: Weights | None = None,
        lead: float = 0.0,
        retrospect: RetrospectiveInput | None = None,
    ) -> None:
        super().__init__(parts)
        self.h = h
        self._lead = lead
        self._retrospect = retrospect
        self.z = torch.zeros_like(h)
        self.output = output
        self.output_weights = output_weights
        self.energy: Energy | None = None
        self._sequential = order is Order.SEQUENTIAL
        self._loss = loss
        self.prediction: Tensor | None = None  # of a readout, the latest
        self._start = h
        self._own: Tensor | None = None
        self._last: Tick | None = None  # the tick before; None before the first
        self._record: ForwardRecord | None = (
            None  # of the tick before, where its weights still wait
        )

    STATE: ClassVar[tuple[str, ...]] = (
        "cell",
        "weights",
        "h",
        "z",
        "output",
        "output_weights",
        "_loss",
        "_own",
        "_last",
        "_retrospect",
    )

    RECORDS = "record"

    def held(self) -> Any:
        return None if self._record is None else self.cell.held(self._record)

    def rebuild(self, records: Any) -> None:
        self._record = None if records is None else self.cell.rebuilt(records)

    def complete(self, messages: Sequence[Tensor | None]) -> None:
        """Finish the tick before: z, and in the sequential order the weights."""
        last = self._last
        if last is None:
            return
        d, tau = self._dynamics, last.tau
        keeps = 1 + d.sign * (d.c * tau) * last.moves - tau * d.eta_z
        arrived = total([*messages, self._own])
        z = None if keeps == 0 else scaled(self.z, keeps)
        if arrived is not None:
            arrived = scaled(arrived, -d.sign * tau)
            z = arrived if z is None else z + arrived
        self.z = torch.zeros_like(self.z) if z is None else z
        self._guard("z", self.z)
        if self._sequential and last.updates:
            g = None
            if self._record is not None:
                _, g = self.cell.pull(self._record, scaled(self.z, d.c), inputs=False)
            self.weights.move(g, self._factor(last.sample), tau)
        self._record = None
        self._last = None

    def clear(self, *, h: bool, z: bool, omega: bool) -> None:
        """Set the named quantities to zero (h to h_0), between `complete` and `tick`."""
        if h:
            self.h = self._start
        if z:
            self.z = torch.zeros_like(self.z)
        if omega:
            for weights in self._all_weights():
                weights.clear()

    def _all_weights(self) -> list[Weights]:
        return [w for w in (self.weights, self.output_weights) if w is not None]

    def tick(
        self, inputs: Sequence[Tensor], tick: Tick, send: Callable[[Tensor], Tensor] = _unchanged
    ) -> tuple[list[Tensor | None], Reading | None]:
        """Run one tick, after `complete`; `h` is then the state of the next.

        Returns the messages to the parents, and the reading of a readout. send: called with the new
        state before the work on the costates begins; returns it as the children receive it.
        """
        # Order of a tick: loss at h_k, forward, send, messages and g with z_k, weights. In the
        # sequential order the loss is at h_{k+1}, and g waits for z_{k+1} (`complete`). The
        # state is sent before the pull, so that children do not wait for it.
        self.energy = measured(self._all_weights()) if tick.measures else None
        reading = None if self._sequential else self._compare(tick)
        to_parents: list[Tensor | None] = [None] * len(self._wanted)
        g: list[Gradient] | None = None
        d = self._dynamics
        record: ForwardRecord | None = None
        ahead: Tensor | None = None
        if tick.moves:
            record = self.cell.forward(inputs, self._wanted)
            f = plain(record.output)
            if self.energy is not None:
                self.energy.work = d.c * float((self.z * (f - self.h)).sum())
            step = d.c * tick.tau
            before = self.h
            self.h = f if step == 1 else self.h + step * (f - self.h)
            self._guard("h", self.h, inputs)
            ahead = self.h + self._lead * (self.h - before) if self._lead else None
        if ahead is None:
            self.h = send(self.h)
        else:
            send(ahead)
        if record is not None:
            now = tick.updates and not self._sequential
            later = tick.updates and self._sequential
            cotangent = scaled(self.z, d.c)
            at_once = self.weights.at_once(self._factor(tick.sample), tick.tau) if now else None
            if self._retrospect is None:
                to_parents, g = self.cell.pull(
                    record, cotangent, weights=now, keep=later, at_once=at_once
                )
            else:
                to_parents, _ = self.cell.pull(record, cotangent, weights=False)
                estimate = self._retrospect.estimate(inputs)
                if now:
                    past = self.cell.forward(estimate, [False] * len(inputs))
                    _, g = self.cell.pull(past, cotangent, inputs=False, at_once=at_once)
            self._record = record if later else None
        self._last = tick
        if tick.updates and not self._sequential:
            self.weights.move(g if tick.moves else None, self._factor(tick.sample), tick.tau)
        if self._sequential:
            reading = self._compare(tick)
        if self.energy is not None and reading is not None:
            self.energy.loss = reading.phi * float(reading.loss)
        return to_parents, reading

    def _compare(self, tick: Tick) -> Reading | None:
        """Set own = phi dL/dh at the present h, and step the weights of the output module."""
        self._own = None
        if self._loss is None:
            return None
        reading = None
        g: list[Gradient] | None = None
        if tick.answers:
            answer = None if self.output is None else self.output.forward([self.h], [False])
            self.prediction = self.h if answer is None else plain(answer.output)
        if tick.target is not None:
            if self.output is None:
                self._own, reading = self._loss.read(
                    self.h, tick.target, tick.k, moves=tick.updates
                )
            else:
                record = self.output.forward([self.h], [True])
                (self._own,), g, reading = self._loss.take(
                    self.output, record, tick.target, tick.k, moves=tick.updates
                )
        if self.output_weights is not None and tick.updates:
            self.output_weights.move(g, self._factor(tick.sample), tick.tau)
        return reading


class HoldReadout(Block):
    """An output net of a held sample (HL Eq. 4): predicts from its parents' h_k, in the sequential
    order from h_{k+1}, and takes the loss in the same tick.

        y_k = f^y(h_parents; theta_k),    M_v,k = phi dL/dh_v,    g_k = phi dL/dtheta

    energy: of the latest tick that measured it.
    """

    def __init__(self, parts: BlockParts, loss: ReadoutLoss) -> None:
        super().__init__(parts)
        self.energy: Energy | None = None
        self.prediction: Tensor | None = None  # the latest
        self._loss = loss

    STATE = ("cell", "weights", "_loss")

    def tick(
        self,
        inputs: Sequence[Tensor],
        tick: Tick,
        send: Callable[[Tensor], Tensor] = _unchanged,  # noqa: ARG002  (it has no state)
    ) -> tuple[list[Tensor | None], Reading | None]:
        """Return the messages to the parents, and the reading."""
        self.energy = measured([self.weights]) if tick.measures else None
        to_parents: list[Tensor | None] = [None] * len(self._wanted)
        reading = None
        g: list[Gradient] | None = None
        if tick.target is not None:
            record = self.cell.forward(inputs, self._wanted)
            updates = tick.updates
            at_once = self.weights.at_once(self._factor(tick.sample), tick.tau) if updates else None
            to_parents, g, reading = self._loss.take(
                self.cell, record, tick.target, tick.k, moves=updates, at_once=at_once
            )
            self.prediction = reading.prediction
            if self.energy is not None:
                self.energy.loss = reading.phi * float(reading.loss)
        elif tick.answers:
            self.prediction = plain(self.cell.forward(inputs, self._wanted).output)
        if tick.updates:
            self.weights.move(g, self._factor(tick.sample), tick.tau)
        return to_parents, reading


def measured(parts: Sequence[Weights]) -> Energy:
    """Return the energies of a block's weights, as they are now."""
    kinetic, cost, norms = zip(*(w.energies() for w in parts), strict=True)
    return Energy(sum(kinetic), sum(cost), sum(n * n for n in norms) ** 0.5)
