"""Blocks that a pulse passes: forward of a sample, later its message backward.

With memory `reversible` the message to a reversible parent brings the parent's state along, as one
tensor (2, B, ...): the message first, then the state.
B: batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hamdist.dynamics.blocks.block import Block, BlockParts, SavesPasses
from hamdist.dynamics.blocks.heads import HeadUpdate
from hamdist.dynamics.blocks.microbatch_reading import MicrobatchReading
from hamdist.dynamics.blocks.readout_loss import Reading, ReadoutLoss, plain, scaled, total
from hamdist.dynamics.modules.reversible import InversePass, pieces_of
from hamdist.dynamics.updates.constants import constant_tau
from hamdist.dynamics.vjp.gradient import with_unused
from hamdist.dynamics.vjp.local_function import ForwardRecord


class PulseBlock(SavesPasses):
    """A state block that a pulse passes: forward of sample n, later backward of n.

        h = f(h_parents; theta)
        z = tau sum_w M_w,            M_v = c (df/dh_v)^T z,     g = c (df/dtheta)^T z

    which is one hop of Hamilton's equations with c tau = 1, eta_z = 0 and s = -1. The trace keeps
    the record of every sample between its two passes. taught: a readout of the block beside the
    messages (heads.py), from which it learns right behind the forward pass. predicts: the block
    passes samples with the weights that it will have after so many updates more, if these go on as
    the last one, and keeps them for the message:

        theta^ = theta - d tau beta omega        (SpecTrain, Chen et al. 2018)
    """

    def __init__(
        self, parts: BlockParts, taught: HeadUpdate | None = None, predicts: int | None = None
    ) -> None:
        super().__init__(parts)
        self.taught = taught
        self._predicts = predicts
        self.h: Tensor | None = None
        self.z: Tensor | None = None
        self._tau = constant_tau(parts.dynamics)

    STATE = ("cell", "weights", "taught", "h", "z")

    def forward(self, sample: int, inputs: Sequence[Tensor]) -> Tensor:
        """Return h of `sample`, and keep its record until its message comes."""
        record = self.trace[sample] = self.run(sample, inputs)
        self.most = max(self.most, len(self.trace))
        self.h = plain(record.output)
        self._guard("h", self.h, inputs)
        return self.h

    def _theta_of(self, sample: int) -> Sequence[Tensor] | None:
        if self._predicts is None:
            return super()._theta_of(sample)
        factor = self._factor(sample // self._parts)
        return self.weights.predicted(self._predicts, factor, self._tau)

    def learn(self, sample: int, label: Tensor | None) -> None:
        """Make a step by the block's head, after `forward`; without a label there is none."""
        if self.taught is not None and label is not None:
            self.taught.learn(sample, self.trace[sample], label, keep=True)

    def backward(self, sample: int, messages: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the messages to the parents; without any message weights do not move."""
        record = self.trace.pop(sample, None)  # (an empty micro-batch has none)
        message = total(messages)
        if message is None or record is None:
            self.learn_from(sample, self.cell.unmessaged(), self._tau)
            return [None] * len(self._wanted)
        self.z = scaled(message, self._tau)
        self._guard("z", self.z)
        at_once = self.at_once(sample, self._tau)
        to_parents, g = self.cell.pull(record, scaled(self.z, self._c), at_once=at_once)
        self.learn_from(sample, g, self._tau)
        return to_parents


class ReversibleBlock(Block):
    """A state block that keeps nothing of a sample: neither its activations nor h and z.

    Forward as `PulseBlock`. Backward its one child sends it (M, h); from the last invertible map
    to the first

        x = p^-1(y),      M_x = c (dp/dx)^T z_y,      g += c (dp/dtheta)^T z_y

    with the weights of the forward pass, for one sample is in the network at a time. Memory: about
    four states, whatever the number of maps. hands_back: the parent is reversible, too.
    """

    def __init__(self, parts: BlockParts, *, hands_back: bool) -> None:
        super().__init__(parts)
        self.h: Tensor | None = None
        self.z: Tensor | None = None
        self._hands_back = hands_back
        self._tau = constant_tau(parts.dynamics)
        self._trained = [p for p in self.cell.module.parameters() if p.requires_grad]
        self._rewinder = InversePass(pieces_of(self.cell.module), self._trained)

    STATE = ("cell", "weights")

    def forward(self, sample: int, inputs: Sequence[Tensor]) -> Tensor:  # noqa: ARG002
        """Return h of `sample`, and keep nothing."""
        (x,) = inputs
        with torch.no_grad():
            h: Tensor = self.cell.module(x)
        self._guard("h", h)
        return h

    def backward(self, sample: int, messages: list[Tensor | None]) -> list[Tensor | None]:
        """Return the message to the parent; without any message weights do not move.

        The child's message is removed from `messages`, so that its memory can be freed.
        """
        from_child = messages.pop()
        if from_child is None:
            self.learn_from(sample, None, self._tau)
            return [None]
        z = scaled(from_child[0], self._tau)
        self._guard("z", z)
        held = [from_child[1], scaled(z, self._c)]
        del from_child, z
        x, to_parent, g = self._rewinder.back(held)
        self._guard("h", x)
        self.learn_from(sample, with_unused(g, self._trained), self._tau)
        if self._wanted == [False]:
            return [None]
        return [with_state(to_parent, x) if self._hands_back else to_parent]


def with_state(message: Tensor, h: Tensor) -> Tensor:
    """Return the message to a reversible parent: that about its state h, and h. Both like h."""
    return torch.stack([message, h])


class PulseReadout(Block):
    """An output net that a pulse reaches: y = f^y(h_parents; theta), M_v = phi dL/dh_v.

    hands_back: by parent, True if it is reversible and gets its state back. microbatches: collects
    the readings of micro-batches, where there are any.
    """

    def __init__(
        self,
        parts: BlockParts,
        loss: ReadoutLoss,
        hands_back: Sequence[bool] = (),
        microbatches: MicrobatchReading | None = None,
    ) -> None:
        super().__init__(parts)
        self._tau = constant_tau(parts.dynamics)
        self._loss = loss
        self._hands_back = list(hands_back) or [False] * len(self._wanted)
        self._item = microbatches
        self.prediction: Tensor | None = None  # the latest

    def take_error(self) -> Tensor | None:
        """Return phi dL/dy of the latest target, and keep it no longer."""
        error, self._loss.error = self._loss.error, None
        return error

    STATE: ClassVar[tuple[str, ...]] = ("cell", "weights", "_loss", "_item")
    ADDED: ClassVar[Mapping[str, Any]] = {"_item": None}

    def read(
        self, sample: int, inputs: Sequence[Tensor], target: Tensor | None
    ) -> tuple[list[Tensor | None], Reading | None]:
        """Return the messages to the parents, and the reading (None without a target).

        Of micro-batches the target comes with the first one, and the reading of the sample is
        returned with the last one.
        """
        if self._item is None:
            return self._learn(sample, inputs, target)
        part_target, share = self._item.begin(sample, target)
        messages, reading = self._learn(sample, inputs, part_target, share)
        prediction = self.prediction if inputs else None
        self.prediction, reading = self._item.end(sample, prediction, reading)
        if reading is not None and self.moves(sample):
            self._loss.past_first()
        return messages, reading

    def _learn(
        self, sample: int, inputs: Sequence[Tensor], target: Tensor | None, share: float = 1.0
    ) -> tuple[list[Tensor | None], Reading | None]:
        """Run one pass. inputs: none of an empty micro-batch. share: of the loss of its sample."""
        messages, reading = self._step(sample, self._forward(sample, inputs), target, share)
        if any(self._hands_back):
            messages = [
                with_state(message, h) if back and message is not None else message
                for message, h, back in zip(messages, inputs, self._hands_back, strict=True)
            ]
        return messages, reading

    def _forward(self, sample: int, inputs: Sequence[Tensor]) -> ForwardRecord | None:
        record = self.run(sample, inputs) if inputs else None
        if record is not None:
            self.prediction = plain(record.output)
        return record

    def _step(
        self, sample: int, record: ForwardRecord | None, target: Tensor | None, share: float = 1.0
    ) -> tuple[list[Tensor | None], Reading | None]:
        if record is None or target is None:
            self.learn_from(sample, self.cell.unmessaged(), self._tau)
            return [None] * len(self._wanted), None
        to_parents, g, reading = self._loss.take(
            self.cell,
            record,
            target,
            sample // self._parts,
            share=share / self._group,
            moves=self._item is None and self.moves(sample),
            at_once=self.at_once(sample, self._tau),
        )
        self.learn_from(sample, g, self._tau)
        return to_parents, reading

    def scored(self, prediction: Tensor, reading: Reading) -> Reading:
        """Return `reading` with an earlier prediction, compared with the target that was read."""
        value, _ = self._loss.value(prediction, reading.weighted)
        return replace(reading, prediction=prediction, loss=value)


class KeepingReadout(SavesPasses, PulseReadout):
    """An output net that keeps the records of samples whose labels are to come."""

    def __init__(self, parts: BlockParts, loss: ReadoutLoss) -> None:
        PulseReadout.__init__(self, parts, loss)
        self.trace = {}

    def read(
        self, sample: int, inputs: Sequence[Tensor], target: Tensor | None
    ) -> tuple[list[Tensor | None], Reading | None]:
        """Predict where there are inputs; learn with a target, by the record of the pass."""
        record = self._forward(sample, inputs)
        if record is not None:
            self.trace[sample] = record
            self.most = max(self.most, len(self.trace))
        return self._step(sample, None if target is None else self.trace.get(sample), target)
