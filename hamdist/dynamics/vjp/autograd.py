"""A torch module as f(h_1, ..., h_P; theta) with its vector-Jacobian products.

A local function is linearised at the activations of its forward pass. The backward pass multiplies
with today's weights: they move in place through `.data`, which autograd's graphs alias, so a graph
that is some ticks old meets today's weights and the activations of its forward pass (docs:
concepts/staleness, memory `trace`); of a weight that the module transforms first, as weight norm
does, it keeps the transformed one of its forward pass. With `stash` every forward pass keeps the
weights that it used (`trace+weights`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hamdist.dynamics.graph.graph import Combine, combined
from hamdist.dynamics.saved_state.stateful import Slot, graph_slots, nested_slots
from hamdist.dynamics.tracing.traced_module import TracedModule
from hamdist.dynamics.user_modules.python_state import SETS_REQUIRES_GRAD
from hamdist.dynamics.vjp.gradient import AtOnce, with_unused
from hamdist.dynamics.vjp.layer_inputs import LayerInputs
from hamdist.dynamics.vjp.local_function import ForwardRecord, ModuleFunction, Products
from hamdist.dynamics.vjp.seeding import TORCHS, OwnGenerator, draws, foreign
from hamdist.errors import GraphError


def may_write(module: nn.Module) -> bool:
    """Return True if a forward pass of the module may write to its inputs."""
    return foreign(module) or any(
        getattr(m, "inplace", False) or (isinstance(m, TracedModule) and m.hamdist_writes)
        for m in module.modules()
    )


class AutogradFunction(ModuleFunction):
    """A local function of any module, by autograd.

    stash: each forward pass keeps the weights that it used. watched: gradients come with the inputs
    of their layers (layer_inputs.py).
    """

    def __init__(
        self,
        module: nn.Module,
        combine: Combine,
        seed: int,
        *,
        stash: bool = False,
        device: torch.device | None = None,
        watched: bool = False,
    ) -> None:
        random = OwnGenerator(seed, device) if draws(module) else nullcontext()
        super().__init__(module, combine, random)
        self._stash = stash
        self._watch = LayerInputs(module, self._parameters) if watched else None
        self._foreign = foreign(module)
        self._weights_at = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._pieces = any(isinstance(m, TracedModule) for m in module.modules())
        self._copies = may_write(module)

    def forward(self, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> ForwardRecord:
        theta = self._parameters
        if self._stash:
            theta = [t.clone().requires_grad_() for t in self.theta]
        return self._forward(theta, inputs, wanted)

    def forward_at(
        self, theta: Sequence[Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool]
    ) -> ForwardRecord:
        return self._forward([t.requires_grad_() for t in theta], inputs, wanted)

    def _forward(
        self, theta: list[Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool]
    ) -> ForwardRecord:
        leaves: list[Tensor | None] = []
        arguments = []
        for tensor, want in zip(inputs, wanted, strict=True):
            leaf = tensor.detach().requires_grad_() if want and tensor.is_floating_point() else None
            leaves.append(leaf)
            argument = tensor.detach() if leaf is None else leaf
            arguments.append(argument.clone() if self._copies else argument)
        reading: AbstractContextManager[list[list[Tensor]]] = nullcontext([])
        if self._watch is not None:
            reading = self._watch.reading()
        with torch.enable_grad(), reading as read:
            output = self._call(combined(self._combine, arguments), theta)
        if not isinstance(output, Tensor):
            raise GraphError(
                f"the module returned {type(output).__name__}, not a tensor; return the one tensor "
                "that its children read"
            )
        apart = output.clone() if self._is_own(output) else output
        return ForwardRecord(leaves, theta, apart, inputs, read)

    def _is_own(self, output: Tensor) -> bool:
        """Return True if the module may write to the memory of `output` later.

        That is a weight, a buffer, or a tensor that a user's module keeps. A signal must not
        change.
        """
        if output.is_leaf or (self._foreign and not output.requires_grad):
            return True
        if not self._foreign and not self._pieces:
            return False
        storage = output.untyped_storage().data_ptr()
        return storage in self._weights_at or any(
            storage == buffer.untyped_storage().data_ptr() for buffer in self.module.buffers()
        )

    def _call(self, arguments: list[Tensor], theta: list[Tensor]) -> object:
        with self._random:
            return self._apply(arguments, theta)

    def _apply(self, arguments: list[Tensor], theta: list[Tensor]) -> object:
        if self._stash:
            stashed = dict(zip(self.names, theta, strict=True))
            return functional_call(self.module, stashed, tuple(arguments))
        return self.module(*arguments)

    def pull(
        self,
        record: ForwardRecord,
        cotangent: Tensor,
        *,
        inputs: bool = True,
        weights: bool = True,
        keep: bool = False,
        at_once: AtOnce | None = None,  # noqa: ARG002  (the gradients come all at one time)
    ) -> Products:
        """Return the products as `LocalFunction.pull`, gradients as tensors."""
        wrt = [leaf for leaf in record.leaves if leaf is not None] if inputs else []
        wanted = len(wrt)
        wrt += record.theta if weights else []
        output = record.output
        pulled: Sequence[Tensor | None] = [None] * len(wrt)
        if self._watch is not None:
            self._watch.forget()
        if wrt and output.requires_grad:
            try:
                pulled = torch.autograd.grad(
                    output, wrt, cotangent, allow_unused=True, retain_graph=keep
                )
            except RuntimeError:
                for name, weight in zip(self.names, record.theta, strict=False):
                    if not weight.requires_grad:
                        raise RuntimeError(SETS_REQUIRES_GRAD.format(name)) from None
                raise
        grads = [g.to_dense() if g is not None and g.is_sparse else g for g in pulled]
        to_inputs = (
            torch.zeros_like(leaf) if m is None else m
            for m, leaf in zip(grads[:wanted], wrt[:wanted], strict=True)
        )
        per_parent = [
            None if leaf is None or not inputs else next(to_inputs) for leaf in record.leaves
        ]
        g = with_unused(grads[wanted:], wrt[wanted:])
        if self._watch is not None and weights:
            g = self._watch.watched(g, record.read)
        return per_parent, g

    @contextmanager
    def saved_tensors(self) -> Iterator[list[Tensor] | None]:
        """Collect what autograd saves, by its hooks, which torch.func in a user's code forbids."""
        saved: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        if foreign(self.module, (*TORCHS, "hamdist.")):
            yield None
        else:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                yield saved

    def _wants(self, record: Any) -> list[bool]:
        return [leaf is not None for leaf in record.leaves]

    def _slots(self, record: Any) -> Iterator[Slot]:
        yield from graph_slots(record.output)
        yield from nested_slots(record.read, "read")
