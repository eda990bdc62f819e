"""The reading of a sample that comes in micro-batches (schedule/microbatches.py).

The loss of a sample is a mean over its rows, or over those of its class targets that are not
ignored; with n_i of n of them in part i

    L = sum_i (n_i / n) L_i,        so that phi n_i/n stands in the place of phi.

B: rows of the sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hamdist.dynamics.blocks.readout_loss import Reading, ReadoutLoss
from hamdist.dynamics.graph.inputs import rows_of
from hamdist.dynamics.objective.losses import counts
from hamdist.dynamics.saved_state.stateful import Stateful


class MicrobatchReading(Stateful):
    """The target of the present sample, and what was read of its parts so far.

    loss: knows the target from the weights of its rows.
    """

    def __init__(self, parts: int, ignore_index: int, loss: ReadoutLoss) -> None:
        self._parts = parts
        self._ignore_index = ignore_index
        self._alone = loss.target
        self._target: Tensor | None = None
        self._share = 0.0  # n_i / n of the present part
        self._predictions: list[Tensor] = []
        self._loss: Tensor | None = None

    STATE = ("_target", "_share", "_predictions", "_loss")

    def begin(self, sample: int, target: Tensor | None) -> tuple[Tensor | None, float]:
        """Begin with part `sample` of a sample, whose whole target comes with the first one.

        Returns:
            The target of the part (None where nothing is learned of it), and n_i / n.
        """
        part = sample % self._parts
        if not part:
            self._target = target
        if self._target is None:
            return None, 0.0
        rows = rows_of(len(self._target), self._parts, part)
        rows_target = self._target[rows.start : rows.stop]
        counted = counts(self._alone(rows_target), self._ignore_index)
        self._share = counted / max(1, counts(self._alone(self._target), self._ignore_index))
        return (rows_target if counted else None), self._share

    def end(
        self, sample: int, prediction: Tensor | None, reading: Reading | None
    ) -> tuple[Tensor | None, Reading | None]:
        """End the part: its prediction (None: it is empty), and what was read of it.

        Returns:
            The prediction of all rows so far, (B, ...), and, with the last part, what was read of
            the sample.
        """
        if prediction is not None:
            self._predictions.append(prediction)
        if reading is not None:
            part_loss = reading.loss * self._share
            self._loss = part_loss if self._loss is None else self._loss + part_loss
        if (sample + 1) % self._parts:
            return prediction, None
        whole = torch.cat(self._predictions)
        target, loss = self._target, self._loss
        self._predictions, self._target, self._loss = [], None, None
        if target is None or loss is None:
            return whole, None
        phi = 0.0 if reading is None else reading.phi
        return whole, Reading(whole, self._alone(target), loss, phi, target)
