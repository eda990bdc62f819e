"""A local function whose parents are slices: joined before the module, taken apart behind it.

    x = [h_1 ... h_m] or sum_i h_i,        M_i = the part of z^T df/dx that is h_i's, or all of it

Both are exact, so a closed form stays one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hamdist.dynamics.graph.graph import Joining
from hamdist.dynamics.saved_state.remember import check_names
from hamdist.dynamics.vjp.gradient import AtOnce, Gradient
from hamdist.dynamics.vjp.local_function import LocalFunction, WrappingFunction


class JoinedFunction(WrappingFunction):
    """Applies `inner` to the joins of `joining`, combined as `joining.then` says."""

    def __init__(self, inner: LocalFunction, joining: Joining) -> None:
        super().__init__(inner, inner.names, inner.theta)
        self._joining = joining
        self._sizes: list[list[int]] = []  # by join, along its axis

    def snapshot(self) -> dict[str, Any]:
        return {"inner": self.inner.snapshot(), "sizes": self._sizes}

    def restore(self, state: Mapping[str, Any]) -> None:
        check_names("joined cell", state, ("inner", "sizes"))
        self.inner.restore(state["inner"])
        self._sizes = state["sizes"]

    def forward(self, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> Any:
        return self.inner.forward(*self._joined(inputs, wanted))

    def forward_at(
        self, theta: Sequence[Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Any:
        return self.inner.forward_at(theta, *self._joined(inputs, wanted))

    def _joined(
        self, inputs: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[list[Tensor], list[bool]]:
        groups = self._joining.groups(inputs)
        if not self._sizes:
            pairs = zip(self._joining.joins, groups, strict=True)
            self._sizes = [[t.shape[j.axis or 0] for t in group] for j, group in pairs]
        wants = [any(group) for group in self._joining.groups(wanted)]
        return self._joining.joined(inputs), wants

    def pull(
        self,
        record: Any,
        cotangent: Tensor,
        *,
        inputs: bool = True,
        weights: bool = True,
        keep: bool = False,
        at_once: AtOnce | None = None,
    ) -> tuple[list[Tensor | None], list[Gradient]]:
        to_inputs, g = self.inner.pull(
            record, cotangent, inputs=inputs, weights=weights, keep=keep, at_once=at_once
        )
        apart: list[Tensor | None] = []
        for join, sizes, message in zip(self._joining.joins, self._sizes, to_inputs, strict=True):
            if message is None or len(sizes) == 1 or join.axis is None:
                apart += [message] * len(sizes)
            else:
                apart += torch.split(message, sizes, dim=join.axis)
        return apart, g
