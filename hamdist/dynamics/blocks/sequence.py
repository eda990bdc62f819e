"""Blocks through which a sequence travels forward and then, token by token, in reverse.

Backpropagation through time as Hamilton's equations on the reversed stream (docs:
concepts/equations). Reversed token j is token m = n - 1 - j; h_{m+1} is the state behind token m:

    z_{j+1} = tau sum_w M_w - tau eta_z z_j                        z_0 = 0
    omega_{j+1} = omega_j + tau ( g_j - eta_omega omega_j )        omega_0 = mu omega

with M_w from readouts and blocks of the same token and, over recurrent edges, from what came of
token m + 1. The weights rest meanwhile; after the last reversed token theta -= tau beta omega. With
eta = 0 that is one step of gradient descent with momentum mu on the sum of the sequence's losses,
truncated to its last r tokens where r is given. c tau = 1 and s = -1.

Memory: the linearised f of each of the last r tokens (`stored`: the most at once).
B: batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from hamdist.dynamics.blocks.block import BlockParts, SavesPasses
from hamdist.dynamics.blocks.readout_loss import Reading, ReadoutLoss, scaled, total
from hamdist.dynamics.objective.losses import Slope
from hamdist.dynamics.saved_state.stateful import Stateful
from hamdist.dynamics.updates.constants import constant_tau
from hamdist.dynamics.vjp.gradient import Gradient, Unused
from hamdist.dynamics.vjp.local_function import ForwardRecord


class WayBack(Stateful):
    """The weights of one block during the reverse pass of a sequence.

    Where no message came during the whole pass, theta and omega stay as they were; so do those of
    weights that no token has used, as with torch's optimisers.
    """

    def __init__(self, parts: BlockParts) -> None:
        self.weights = parts.weights
        self._momentum = parts.dynamics.momentum
        self._tau = constant_tau(parts.dynamics)
        self._factor = parts.factor
        self._before = parts.weights.omega
        self._came = False
        self._unused: list[int] = []  # places of weights that no gradient of the pass was about

    STATE = ("_before", "_came", "_unused")
    ADDED: ClassVar[Mapping[str, Any]] = {"_unused": []}

    def begin(self) -> None:
        """Set omega_0 = mu omega."""
        self._before = self.weights.omega
        self._came, self._unused = False, list(range(len(self._before)))
        self.weights.fade(self._momentum)

    def add(self, g: Sequence[Gradient] | None) -> None:
        """Set omega_{j+1}, with g_j (None: zero)."""
        if g is not None:
            self._came = True
            self._unused = [i for i in self._unused if isinstance(g[i], Unused)]
        self.weights.integrate(g, self._tau)

    def end(self, sample: int) -> None:
        """Move theta. sample: the last token."""
        if not self._came:
            self.weights.omega = self._before
            self.weights.rest()
            return
        self.weights.conclude(self._factor(sample), self._tau, self._unused)
        if self._unused:
            omega = list(self.weights.omega)
            for i in self._unused:
                omega[i] = self._before[i]
            self.weights.omega = omega


class SequenceBlock(SavesPasses):
    """A state block: h_{m+1} = f(h_parents; theta) forward, and in reverse

        M_v = c (df/dh_v)^T z_{j+1},        g_j = c (df/dtheta)^T z_{j+1}

    h: of the latest token; before the first one the initial state.
    """

    def __init__(self, parts: BlockParts, h: Tensor, truncation: int | None = None) -> None:
        super().__init__(parts)
        self.h = h
        self.z: Tensor | None = None
        self.stored = 0
        self._way_back = WayBack(parts)
        self._trace: deque[ForwardRecord] = deque(maxlen=truncation)
        self._tau = constant_tau(parts.dynamics)
        self._keeps = -self._tau * parts.dynamics.eta_z

    STATE = ("cell", "weights", "_way_back", "h", "z", "stored")

    def held(self) -> Any:
        return [self.cell.held(record) for record in self._trace]

    def rebuild(self, records: Any) -> None:
        self._trace.clear()
        self._trace.extend(self.cell.rebuilt(record) for record in records)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return h_{m+1}, and keep its record for the reverse pass."""
        record = self.run(0, inputs)
        self._trace.append(record)
        self.stored = self.most = max(self.stored, len(self._trace))
        self.h = record.output.detach()
        self._guard("h", self.h, inputs)
        return self.h

    def begin(self) -> None:
        """Begin the reverse pass with z_0 = 0."""
        self.z = None
        self._way_back.begin()

    def backward(self, messages: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the messages of one reversed token to the parents."""
        record = self._trace.pop()
        self.z = self._costate(total(messages))
        if self.z is None:
            self._way_back.add(None)
            return [None] * len(self._wanted)
        self._guard("z", self.z)
        to_parents, g = self.cell.pull(record, scaled(self.z, self._c))
        self._way_back.add(g)
        return to_parents

    def _costate(self, message: Tensor | None) -> Tensor | None:
        """Return z_{j+1}; None for zeros."""
        decayed = None if self.z is None or self._keeps == 0 else scaled(self.z, self._keeps)
        if message is None:
            return decayed
        arrived = scaled(message, self._tau)
        return arrived if decayed is None else decayed + arrived

    def end(self, sample: int) -> None:
        """End the reverse pass with the weights' one step. sample: the sequence's last token."""
        self._way_back.end(sample)


class _Read(NamedTuple):
    """One token as a readout saw it. memory: of the loss, before it."""

    record: ForwardRecord
    slope: Slope | None
    target: Tensor | None
    memory: dict[str, Any] | None


class SequenceReadout(SavesPasses):
    """An output net: predicts and compares in the forward pass, learns in the reverse pass.

        y_m = f^y(h_parents; theta),    M_v = phi dL_m/dh_v,    g_j = phi dL_m/dtheta

    L_m is computed once, in the forward pass.
    """

    def __init__(self, parts: BlockParts, loss: ReadoutLoss, truncation: int | None = None) -> None:
        super().__init__(parts)
        self.stored = 0
        self._way_back = WayBack(parts)
        self._trace: deque[_Read] = deque(maxlen=truncation)
        self._loss = loss
        self._taken = False
        self.prediction: Tensor | None = None  # the latest

    STATE = ("cell", "weights", "_way_back", "stored", "_loss", "_taken")

    def held(self) -> Any:
        return [(self.cell.held(r.record), r.target, r.memory) for r in self._trace]

    def rebuild(self, records: Any) -> None:
        now = self._loss.memory
        self._trace.clear()
        for record, target, memory in records:
            slope = None
            if target is not None:  # the slope is made anew, as the loss was then
                if memory is not None:  # (earlier versions have its random numbers alone)
                    self._loss.memory = memory if "random" in memory else {"random": memory}
                slope = self._loss.value(record["output"], target)[1]
            self._trace.append(_Read(self.cell.rebuilt(record), slope, target, memory))
        self._loss.memory = now

    def forward(
        self, sample: int, inputs: Sequence[Tensor], target: Tensor | None
    ) -> Reading | None:
        """Return the reading (None without a target)."""
        record = self.run(sample, inputs)
        prediction = self.prediction = record.output.detach()
        memory = None if target is None else self._loss.memory
        loss = None if target is None else self._loss.value(prediction, target)
        self._trace.append(_Read(record, None if loss is None else loss[1], target, memory))
        self.stored = self.most = max(self.stored, len(self._trace))
        if target is None or loss is None:
            return None
        y, phi = self._loss.target(target), self._loss.phi(sample)
        return Reading(prediction, y, loss[0], phi, target)

    def begin(self) -> None:
        """Begin the reverse pass."""
        self._taken = any(read.slope is not None for read in self._trace)
        self._way_back.begin()

    def backward(self, sample: int) -> list[Tensor | None]:
        """Return the messages of one reversed token to the parents."""
        record, slope, _, _ = self._trace.pop()
        if slope is None:
            self._way_back.add(None)
            return [None] * len(self._wanted)
        to_parents, g = self.cell.pull(record, slope(self._loss.phi(sample)))
        self._way_back.add(g)
        return to_parents

    def end(self, sample: int) -> None:
        """End the reverse pass with the weights' one step. sample: the sequence's last token."""
        if self._taken:
            self._loss.past_first()
        self._way_back.end(sample)
