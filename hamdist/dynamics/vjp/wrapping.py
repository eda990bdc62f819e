"""Local functions that ask another one: of parents that are slices, and of shared weights.

Slices are joined before the module, and its messages taken apart behind it:

    x = [h_1 ... h_m] or sum_i h_i,        M_i = the part of z^T df/dx that is h_i's, or all of it

Both are exact, so a closed form stays one. (Shared weights: graph/ties.py.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hamdist.dynamics.graph.graph import Joining
from hamdist.dynamics.graph.ties import names_of
from hamdist.dynamics.saved_state.stateful import check_names
from hamdist.dynamics.vjp.gradient import Gradient, Gradients, dense
from hamdist.dynamics.vjp.local_function import LocalFunction, Products, PullArguments

if TYPE_CHECKING:
    from typing_extensions import Unpack


class WrappingFunction(LocalFunction):
    """A local function that asks `inner`, another one of the same module."""

    def __init__(self, inner: LocalFunction, names: Sequence[str], theta: Sequence[Tensor]) -> None:
        super().__init__(inner.module, names, theta)
        self.inner = inner

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def forward(self, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> Any:
        return self.inner.forward(inputs, wanted)

    def saved_tensors(self) -> AbstractContextManager[list[Tensor] | None]:
        return self.inner.saved_tensors()

    def held(self, record: Any) -> dict[str, Any]:
        return self.inner.held(record)

    def rebuilt(self, state: Mapping[str, Any]) -> Any:
        return self.inner.rebuilt(state)


class JoinedFunction(WrappingFunction):
    """Applies `inner` to the joins of `joining`, combined as `joining.then` says."""

    def __init__(self, inner: LocalFunction, joining: Joining) -> None:
        super().__init__(inner, inner.names, inner.theta)
        self._joining = joining
        self._sizes: list[list[int]] = []  # by join, along its axis

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "sizes": self._sizes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_names("joined cell", state, ("inner", "sizes"))
        self.inner.load_state_dict(state["inner"])
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

    def pull(self, record: Any, cotangent: Tensor, **how: Unpack[PullArguments]) -> Products:
        to_inputs, g = self.inner.pull(record, cotangent, **how)
        apart: list[Tensor | None] = []
        for join, sizes, message in zip(self._joining.joins, self._sizes, to_inputs, strict=True):
            if message is None or len(sizes) == 1 or join.axis is None:
                apart += [message] * len(sizes)
            else:
                apart += torch.split(message, sizes, dim=join.axis)
        return apart, g


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all elements of `tensors` as a new vector (N,), in the widest of their types."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def split_vector(numbers: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the elements of a vector of `flat`, in the shapes, dtypes and devices of `like`."""
    parts = torch.split(numbers, [t.numel() for t in like])
    return [part.view(t.shape).to(t) for part, t in zip(parts, like, strict=True)]


class TiedFunction(WrappingFunction):
    """`inner` with weights that belong to other blocks (foreign: their names) or are used by them.

    `names`, `theta` and the gradients that `pull` returns are those of the weights that belong to
    the block. Within one event: `add` the gradients of users, `pull`, `take` those for the owners.
    """

    def __init__(self, inner: LocalFunction, shared: Iterable[str]) -> None:
        keys = set(shared)
        keep = [i for i, name in enumerate(inner.names) if name not in keys]
        super().__init__(inner, [inner.names[i] for i in keep], [inner.theta[i] for i in keep])
        self.foreign = names_of(inner.module, keys)
        self._all = dict(zip(inner.names, inner.theta, strict=True))
        self._added: dict[str, Tensor] = {}
        self._for_owners: dict[str, Tensor] | None = None

    def weights(self, names: Iterable[str]) -> list[Tensor]:
        """Return weights by name, foreign ones included."""
        return [self._all[name] for name in names]

    def pull(self, record: Any, cotangent: Tensor, **how: Unpack[PullArguments]) -> Products:
        """Return the products as `LocalFunction.pull`, for the weights that belong to the block.

        None of these moves at once: others have a say in it.
        """
        how["at_once"] = None
        to_parents, g = self.inner.pull(record, cotangent, **how)
        if not how.get("weights", True):
            return to_parents, g
        if isinstance(g, Gradients):
            g.complete()
        by_name = dict(zip(self.inner.names, g, strict=True))
        self._for_owners = {n: dense(by_name[n]) for n in self.inner.names if n in self.foreign}
        return to_parents, self._with_added([by_name[name] for name in self.names])

    def unmessaged(self) -> list[Gradient] | None:
        """Return the gradients that users have sent for a sample without a message."""
        return self._with_added([torch.zeros_like(t) for t in self.theta]) if self._added else None

    def _with_added(self, g: Sequence[Gradient]) -> list[Gradient]:
        added, self._added = self._added, {}
        pairs = zip(self.names, g, strict=True)
        return [dense(g_i) + added[n] if n in added else g_i for n, g_i in pairs]

    def add(self, names: Sequence[str], numbers: Tensor) -> None:
        """Add a user's gradients of shared weights to those of the next pull."""
        for name, g in zip(names, split_vector(numbers, self.weights(names)), strict=True):
            self._added[name] = self._added[name] + g if name in self._added else g

    def take(self) -> dict[str, Tensor] | None:
        """Return the gradients of foreign weights from the latest pull; None without one."""
        gradients, self._for_owners = self._for_owners, None
        return gradients

    def overwrite(self, names: Sequence[str], numbers: Tensor) -> None:
        """Overwrite foreign weights with the values of their owner."""
        weights = self.weights(names)
        for weight, new in zip(weights, split_vector(numbers, weights), strict=True):
            weight.copy_(new)
