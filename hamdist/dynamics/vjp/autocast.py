"""A block that computes in bfloat16 where that is safe, with weights and signals as they are.

Under autocast matrix products take bfloat16 (8 bits of mantissa), sums and norms float32; the
output of the block has the dtype that it has without. The backward pass goes through the same
roundings. A product keeps the rounded weights of its own forward pass, as autograd does with every
weight that is transformed first (autograd.py).

The distance from float32 is measured: in forward passes number 1, 2, 4, 8, ... a copy of the
block computes the same without autocast.
B: batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hamdist.dynamics.graph.graph import Combine
from hamdist.dynamics.saved_state.stateful import check_names
from hamdist.dynamics.user_modules.copies import copied
from hamdist.dynamics.vjp.autograd import AutogradFunction


@dataclass(frozen=True, slots=True)
class Rounding:
    """|f with autocast - f| / |f|, f without: mean and largest of `passes` measurements."""

    passes: int
    mean: float
    worst: float


class AutocastFunction(AutogradFunction):
    """A local function whose forward pass runs under bfloat16 autocast, on 'cpu' or 'cuda'."""

    def __init__(
        self,
        module: nn.Module,
        combine: Combine,
        seed: int,
        device: torch.device,
        *,
        stash: bool = False,
        watched: bool = False,
    ) -> None:
        super().__init__(module, combine, seed, stash=stash, device=device, watched=watched)
        self._device = device.type
        self._calls = 0
        self._measured: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        counts = {"calls": self._calls, "measured": self._measured}
        return {"cell": super().state_dict(), **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_names("cell under autocast", state, ("cell", "calls", "measured"))
        super().load_state_dict(state["cell"])
        self._calls, self._measured = state["calls"], list(state["measured"])

    @property
    def rounding(self) -> Rounding | None:
        """Return the measured rounding; None before the first pass."""
        measured = self._measured
        if not measured:
            return None
        return Rounding(len(measured), sum(measured) / len(measured), max(measured))

    def _call(self, arguments: list[Tensor], theta: list[Tensor]) -> object:
        self._calls += 1
        due = self._calls & (self._calls - 1) == 0
        exact = self._without(arguments) if due else None
        with torch.autocast(self._device, torch.bfloat16):
            output = super()._call(arguments, theta)
        if not isinstance(output, Tensor):
            return output
        like = self._parameters[0].dtype if self._parameters else arguments[0].dtype
        rounded = output.to(like) if output.is_floating_point() else output
        if isinstance(exact, Tensor):
            self._note(rounded.detach(), exact)
        return rounded

    @torch.no_grad()
    def _without(self, arguments: Sequence[Tensor]) -> object:
        """Run the same pass by a copy, with the same random numbers and without side effects."""
        module = copied(self.module)
        inputs = [argument.detach().clone() for argument in arguments]
        with copy.deepcopy(self._random):
            return module(*inputs)

    def _note(self, output: Tensor, exact: Tensor) -> None:
        size = float(torch.linalg.vector_norm(exact, dtype=torch.float64))
        if size > 0:
            apart = float(torch.linalg.vector_norm(output - exact, dtype=torch.float64))
            self._measured.append(apart / size)
