"""A block's module as f(h_1, ..., h_P; theta), with its vector-Jacobian products.

`LocalFunction` says what blocks ask for. One of a module is made by autograd (autograd.py) or in
closed form (closed.py); one of another local function joins slices or shares weights (wrapping.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from torch import Tensor, nn

from hamdist.dynamics.graph.graph import EXTRA, Combine
from hamdist.dynamics.saved_state.stateful import Slot, Stateful, check_names, fill, held
from hamdist.dynamics.vjp.gradient import AtOnce, Gradient
from hamdist.dynamics.vjp.seeding import OwnGenerator
from hamdist.errors import SnapshotError

if TYPE_CHECKING:
    from typing_extensions import Unpack

Products: TypeAlias = tuple[list[Tensor | None], list[Gradient]]  # of `LocalFunction.pull`


class PullArguments(TypedDict, total=False):
    """Arguments of `LocalFunction.pull`: the products that are wanted, True by default.

    keep: the record will be pulled again. at_once: permission to move weights as soon as their
    gradient is computed; such a gradient is marked as one whose weight has moved.
    """

    inputs: bool
    weights: bool
    keep: bool
    at_once: AtOnce | None


@dataclass(slots=True)
class ForwardRecord:
    """The record of a forward pass for its vector-Jacobian products.

    leaves: the inputs (a leaf of the graph where a product is wanted, else None); theta: the
    weights in the graph; output: f, (B, ...). inputs: as they came, for `LocalFunction.rebuilt`.
    read: by observed layer, its inputs.
    """

    leaves: list[Tensor | None]
    theta: list[Tensor]
    output: Tensor
    inputs: Sequence[Tensor]
    read: list[list[Tensor]] = field(default_factory=list)


class LocalFunction(Stateful, ABC):
    """f(h_parents; theta), and z^T df/dh_parent, z^T df/dtheta.

    Attributes:
        module: computes f.
        names, theta: of the weights that learn and belong to the block, in one order.
        foreign: names of weights that belong to another block (graph/ties.py).
    """

    foreign: Collection[str] = ()

    def __init__(self, module: nn.Module, names: Sequence[str], theta: Sequence[Tensor]) -> None:
        self.module = module
        self.names = list(names)
        self.theta = list(theta)

    @abstractmethod
    def forward(self, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> Any:
        """Run a forward pass; return its record. wanted: by input, if its product is needed."""

    def forward_at(  # (not abstract: only what `stash` was given to can)
        self,
        theta: Sequence[Tensor],  # noqa: ARG002
        inputs: Sequence[Tensor],  # noqa: ARG002
        wanted: Sequence[bool],  # noqa: ARG002
    ) -> Any:
        """Run a forward pass with other weights, which the record keeps.

        Raises TypeError where the local function cannot, as it was made without `stash`.
        """
        raise TypeError(f"{type(self).__name__} has no forward pass with other weights")

    @abstractmethod
    def pull(self, record: Any, cotangent: Tensor, **how: Unpack[PullArguments]) -> Products:
        """Return (cotangent^T df/dh_p per parent, cotangent^T df/dtheta per weight)."""

    def saved_tensors(self) -> AbstractContextManager[list[Tensor] | None]:
        """Return a context whose list gets the tensors that a forward pass leaves in no record.

        None instead of a list where they cannot be told.
        """
        return nullcontext([])

    def unmessaged(self) -> list[Gradient] | None:
        """Return the gradients of a sample without a message; None if nothing moves."""
        return None

    @abstractmethod
    def held(self, record: Any) -> dict[str, Any]:
        """Return a record as plain data (saved_state/)."""

    @abstractmethod
    def rebuilt(self, state: Mapping[str, Any]) -> Any:
        """Return the record from the data of `held`."""


class ModuleFunction(LocalFunction):
    """A local function that runs a module itself, with random numbers from `random`."""

    def __init__(
        self, module: nn.Module, combine: Combine, random: AbstractContextManager[None]
    ) -> None:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        super().__init__(module, [n for n, _ in named], [p.data for _, p in named])
        self._parameters: list[Tensor] = [p for _, p in named]
        self._combine = combine
        self._random = random

    @abstractmethod
    def _wants(self, record: Any) -> list[bool]:
        """Return by input whether its product is needed."""

    @abstractmethod
    def _slots(self, record: Any) -> Iterator[Slot]:
        """Yield the tensors that a record keeps, in an order that the module alone gives."""

    def state_dict(self) -> dict[str, Any]:
        """Return weights and buffers of the module, its extra state, and that of its generator."""
        state = self.module.state_dict()
        return {
            "parameters": dict(self.module.named_parameters()),
            "buffers": dict(self.module.named_buffers()),
            "extra": {k: v for k, v in state.items() if k.endswith(EXTRA)},
            "random": self._random.state_dict() if isinstance(self._random, OwnGenerator) else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore in place: all aliases of a weight's memory stay valid."""
        check_names("cell", state, ("parameters", "buffers", "extra", "random"))
        _write(dict(self.module.named_parameters()), state["parameters"])
        _write(dict(self.module.named_buffers()), state["buffers"])
        for key, extra in state["extra"].items():
            self.module.get_submodule(key[: -len(EXTRA)].rstrip(".")).set_extra_state(extra)
        if isinstance(self._random, OwnGenerator) and state["random"] is not None:
            self._random.load_state_dict(state["random"])

    def held(self, record: Any) -> dict[str, Any]:
        live = {t.untyped_storage().data_ptr() for t in self.module.parameters()}
        live |= {t.untyped_storage().data_ptr() for t in self.module.buffers()}
        return {
            "inputs": list(record.inputs),
            "wanted": self._wants(record),
            "output": record.output,
            "kept": held(self._slots(record), live),
        }

    def rebuilt(self, state: Mapping[str, Any]) -> Any:
        """Return the record from the data of `held`.

        The module runs once more: buffers and random numbers have to be restored afterwards.
        """
        check_names("record", state, ("inputs", "wanted", "output", "kept"))
        record = self.forward(state["inputs"], state["wanted"])
        fill(self._slots(record), state["kept"])
        record.output.data.copy_(state["output"])  # (a late loss reads it)
        return record


def _write(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors; raise SnapshotError where names or shapes differ."""
    check_names("module", saved, tensors)
    for name, tensor in tensors.items():
        if tensor.shape != saved[name].shape:
            raise SnapshotError(
                f"{name!r} has shape {tuple(tensor.shape)}, the saved one "
                f"{tuple(saved[name].shape)}"
            )
        tensor.data.copy_(saved[name])
