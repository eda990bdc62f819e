"""A torch module as f(h_1, ..., h_P; theta) with its vector-Jacobian products.

A local function is linearised at the activations of its forward pass. The backward pass multiplies
with today's weights: they move in place through `.data`, which autograd's graphs alias, so a graph
that is some ticks old meets today's weights and the activations of its forward pass (docs:
concepts/staleness, memory `trace`); of a weight that the module transforms first, as weight norm
does, it keeps the transformed one of its forward pass. With `stash` every forward pass keeps the
weights that it used (`trace+weights`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd

from hamdist.dynamics.graph.graph import EXTRA, Combine, combined
from hamdist.dynamics.objective.losses import CrossEntropy, LossFunction, mse
from hamdist.dynamics.saved_state.remember import (
    Remembers,
    Slot,
    check_names,
    fill,
    graph_slots,
    held,
    nested_slots,
)
from hamdist.dynamics.tracing.traced_module import TracedModule
from hamdist.dynamics.user_modules.python_state import SETS_REQUIRES_GRAD
from hamdist.dynamics.vjp.gradient import AtOnce, Gradient
from hamdist.dynamics.vjp.layer_inputs import LayerInputs
from hamdist.errors import GraphError, SnapshotError

_RANDOM = (_DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


class OwnGenerator(Remembers):
    """Context in which torch's random numbers come from a separate generator.

    It continues where it stopped, and leaves the generators outside unchanged. device: of the
    numbers; a GPU has a separate generator, too.
    """

    def __init__(self, seed: int, device: torch.device | None = None) -> None:
        self._own = torch.Generator().manual_seed(seed).get_state()
        self._outside = self._own
        self._gpu = device if device is not None and device.type == "cuda" else None
        if self._gpu is not None:
            self._own_gpu = torch.Generator(self._gpu).manual_seed(seed).get_state()
            self._outside_gpu = self._own_gpu

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the generator; on a GPU that of its generator, too."""
        return {"cpu": self._own, "gpu": None if self._gpu is None else self._own_gpu}

    def restore(self, state: Mapping[str, Any]) -> None:
        check_names(type(self).__name__, state, ("cpu", "gpu"))
        try:
            torch.Generator().set_state(state["cpu"])
        except (RuntimeError, TypeError) as error:
            raise SnapshotError(f"the state of a random generator is none: {error}") from None
        self._own = state["cpu"]
        if self._gpu is not None and state["gpu"] is not None:
            self._own_gpu = state["gpu"]

    def __enter__(self) -> None:
        self._outside = torch.get_rng_state()
        torch.set_rng_state(self._own)
        if self._gpu is not None:
            self._outside_gpu = torch.cuda.get_rng_state(self._gpu)
            torch.cuda.set_rng_state(self._own_gpu, self._gpu)

    def __exit__(self, *_: object) -> None:
        self._own = torch.get_rng_state()
        torch.set_rng_state(self._outside)
        if self._gpu is not None:
            self._own_gpu = torch.cuda.get_rng_state(self._gpu)
            torch.cuda.set_rng_state(self._outside_gpu, self._gpu)


def seeded_loss(loss: LossFunction, seed: int, device: torch.device | None = None) -> LossFunction:
    """Return a user's loss, which may draw random numbers, so that all engines draw the same."""
    if loss is mse or isinstance(loss, CrossEntropy):
        return loss
    return SeededLoss(loss, OwnGenerator(seed, device))


@dataclass(frozen=True, slots=True)
class SeededLoss:
    """A loss with a random generator of its own."""

    loss: LossFunction
    generator: OwnGenerator

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        with self.generator:
            return self.loss(prediction, target)


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


class LocalFunction(Remembers):
    """f(h_parents; theta), and z^T df/dh_parent, z^T df/dtheta.

    seed: of its random generator (dropout draws the same masks in every engine). device: of the
    module and of its random numbers. watched: gradients come with the inputs of their layers
    (layer_inputs.py). borrowed: names of weights that belong to another block (graph/ties.py).
    """

    borrowed: Collection[str] = ()

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
        self.module = module
        self._combine = combine
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.names = [n for n, _ in named]
        self._parameters: list[Tensor] = [p for _, p in named]
        self.theta: list[Tensor] = [p.data for p in self._parameters]
        self._stash = stash
        self._watch = LayerInputs(module, self._parameters) if watched else None
        self._random = OwnGenerator(seed, device) if draws(module) else nullcontext()
        self._foreign = _foreign(module)
        self._weights_at = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._pieces = any(isinstance(m, TracedModule) for m in module.modules())
        self._copies = self._foreign or any(
            getattr(m, "inplace", False) or (isinstance(m, TracedModule) and m.hamdist_writes)
            for m in module.modules()
        )

    def forward(self, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> ForwardRecord:
        """Run a forward pass. wanted: by input, whether its product will be needed."""
        theta = self._parameters
        if self._stash:
            theta = [t.clone().requires_grad_() for t in self.theta]
        return self._forward(theta, inputs, wanted)

    def forward_at(
        self, theta: Sequence[Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool]
    ) -> ForwardRecord:
        """Run a forward pass with other weights, which the record keeps (with `stash`)."""
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
    ) -> tuple[list[Tensor | None], list[Gradient]]:
        """Return (cotangent^T df/dh_p per parent, cotangent^T df/dtheta per weight).

        keep: the record will be pulled again. at_once: permission to move weights as soon as their
        gradient is computed; such a gradient is marked as one whose weight has moved.
        """
        wrt = [leaf for leaf in record.leaves if leaf is not None] if inputs else []
        wanted = len(wrt)
        wrt += record.theta if weights else []
        output = record.output
        pulled: Sequence[Tensor | None] = [None] * len(wrt)
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
        grads = [
            torch.zeros_like(w) if g is None else g.to_dense() if g.is_sparse else g
            for g, w in zip(pulled, wrt, strict=True)
        ]
        to_inputs = iter(grads[:wanted])
        per_parent = [
            None if leaf is None or not inputs else next(to_inputs) for leaf in record.leaves
        ]
        g: list[Gradient] = list(grads[wanted:])
        if self._watch is not None and weights:
            g = self._watch.watched(g, record.read)
        return per_parent, g

    def unmessaged(self) -> list[Gradient] | None:
        """Return the gradients of a sample without a message; None if nothing moves."""
        return None

    # -- state ----------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Return weights and buffers of the module, its extra state, and that of its generator."""
        state = self.module.state_dict()
        return {
            "parameters": dict(self.module.named_parameters()),
            "buffers": dict(self.module.named_buffers()),
            "extra": {k: v for k, v in state.items() if k.endswith(EXTRA)},
            "random": self._random.snapshot() if isinstance(self._random, OwnGenerator) else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore in place: all aliases of a weight's memory stay valid."""
        check_names("cell", state, ("parameters", "buffers", "extra", "random"))
        _write(dict(self.module.named_parameters()), state["parameters"])
        _write(dict(self.module.named_buffers()), state["buffers"])
        for key, extra in state["extra"].items():
            self.module.get_submodule(key[: -len(EXTRA)].rstrip(".")).set_extra_state(extra)
        if isinstance(self._random, OwnGenerator) and state["random"] is not None:
            self._random.restore(state["random"])

    def held(self, record: Any) -> dict[str, Any]:
        """Return a record as plain data (saved_state/)."""
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

    def _wants(self, record: Any) -> list[bool]:
        return [leaf is not None for leaf in record.leaves]

    def _slots(self, record: Any) -> Iterator[Slot]:
        yield from graph_slots(record.output)
        yield from nested_slots(record.read, "read")


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


def block_seed(run_seed: int, name: str) -> int:
    """Return the seed of a block's generator: a function of the run's seed and its name alone."""
    digest = hashlib.blake2b(f"{run_seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _foreign(module: nn.Module) -> bool:
    """Return True if a part is not torch's own, so that it may do anything to its input.

    An invertible map counts as known.
    """
    return any(
        m.hamdist_whole
        if isinstance(m, TracedModule)
        else not type(m).__module__.startswith("torch.nn.modules.")
        for m in module.modules()
    )


def draws(module: nn.Module) -> bool:
    """Return True if a forward pass may draw random numbers.

    Torch's own layers without dropout do not; a user's module may.
    """
    return _foreign(module) or bool(random_parts(module))


def random_parts(module: nn.Module) -> list[nn.Module]:
    """Return the parts of `module` that draw random numbers: torch's layers, invertible maps."""
    parts = []
    for part in module.modules():
        rate = getattr(part, "dropout", 0.0)  # a number (attention, recurrent nets), or a module
        chance = isinstance(part, TracedModule) and part.hamdist_draws
        if chance or isinstance(part, _RANDOM) or (isinstance(rate, (int, float)) and rate):
            parts.append(part)
    return parts
