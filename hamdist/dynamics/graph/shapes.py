"""Derives the shape of a block's state by a dry run of a copy of its module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, UntypedStorage, nn

from hamdist.dynamics.graph.inputs import is_input
from hamdist.dynamics.graph.spec import BlockSpec, Combine, Joining, ShapeMap, combined
from hamdist.dynamics.user_modules.copies import copied
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.dynamics.user_modules.python_state import changed_in, inside, is_foreign
from hamdist.errors import GraphError

# Modules that are run on zeros in a dry run, up to this many numbers in weights and input: a few
# milliseconds of arithmetic.
PLAIN_MODULES = ("torch.nn.", "hamdist.")
SMALL_WEIGHTS = 2**22
SMALL_INPUT = 2**16


def shape_of(
    block: BlockSpec, parents: ShapeMap, example: Mapping[str, Tensor], moved: set[str]
) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and dtype of a block's h (of an output net: its prediction).

    They come from a dry run on a copy of its module (`_probes`). parents: shapes of its parents,
    batch in front; example: inputs by parent; moved: receives the names of Python state that the
    module's forward changes. Raises GraphError where the module does not take the shapes, or
    returns no tensor with the batch in front.
    """
    name = block.name
    shapes = [parents[p] for p in block.parents]
    received = ", ".join(f"{p} {tuple(s)}" for p, (s, _) in zip(block.parents, shapes, strict=True))
    real = [example.get(p) for p in block.parents]
    leaves = [not is_input(p) for p in block.parents]
    h = _run_on(name, block.module, block.combine, shapes, received, leaves, real, moved)
    if not isinstance(h, Tensor):
        raise GraphError(
            f"block {name!r} returned {type(h).__name__}, not a tensor; return the one tensor "
            "that its children read"
        )
    if h.dim() == 0 or h.shape[0] != shapes[0][0][0]:
        raise GraphError(
            f"block {name!r} turns {received} into {tuple(h.shape)}: the batch must stay in front"
        )
    if block.output is not None:
        state = [(tuple(h.shape), h.dtype)]
        _run_on(name, block.output, block.combine, state, f"its own h {tuple(h.shape)}", [True])
    return tuple(h.shape), h.dtype


def check_initial(block: BlockSpec, shape: tuple[int, ...]) -> None:
    """Raise GraphError for an initial state that does not fit `shape` (of h, batch in front)."""
    name = block.name
    if block.initial is None:
        return
    if not block.has_state:
        raise GraphError(f"block {name!r} is an output net, which has no initial state")
    if tuple(block.initial.shape) != shape[1:]:
        raise GraphError(
            f"block {name!r} has an initial state of shape {tuple(block.initial.shape)}, but "
            f"its h has {shape[1:]} (without the batch)"
        )


def declared_dtype(module: nn.Module, u_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a state declared by its shape: that of the weights, or of the input."""
    parameter = next(module.parameters(), None)
    if parameter is not None:
        return parameter.dtype
    return u_dtype if u_dtype.is_floating_point else torch.get_default_dtype()


def _run_on(
    name: str,
    module: nn.Module,
    combine: Combine | Joining,
    shapes: Sequence[tuple[tuple[int, ...], torch.dtype]],
    received: str,
    leaves: Sequence[bool],
    real: Sequence[Tensor | None] = (),
    moved: set[str] | None = None,
) -> object:
    """Run `module` on tensors of `shapes`, on the first device that takes them.

    Autograd is on where the module needs it (a hook). leaves: the inputs by which it is
    differentiated in a run. real: tensors of these shapes, where values are at hand.
    """
    for grad, device in product((False, True), _probes(module, shapes)):
        probe = copied(module).to(device)
        inputs = [torch.zeros(s, dtype=t, device=device) for s, t in shapes]
        for i, u in enumerate(real if device == "cpu" else ()):
            if u is not None and (u.shape, u.dtype) == (inputs[i].shape, inputs[i].dtype):
                inputs[i] = u.clone()
        for x, leaf in zip(inputs, leaves, strict=True):
            x.requires_grad_(grad and leaf and x.is_floating_point())
        before = [(m, inside(m)) for m in probe.modules() if is_foreign(type(m))]
        weights = {n: (p, p.untyped_storage()) for n, p in probe.named_parameters()}
        try:
            with torch.set_grad_enabled(grad), generator_kept():
                output = probe(*combined(combine, [x.clone() for x in inputs]))
            _check_same(name, probe, weights)
            if moved is not None:
                moved.update(n for part, was in before for n in changed_in(part, was))
            return output.detach() if isinstance(output, Tensor) else output
        except NotImplementedError:
            continue
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if not grad or device == "meta":  # which has no values
                continue
            if isinstance(error, AttributeError):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise GraphError(
                f"block {name!r} ({type(module).__name__}) does not take its input {received}: "
                f"{reason}{_of_dtypes(module, shapes)}"
            ) from error
    raise GraphError(f"block {name!r} cannot be run on its input {received}")


def _of_dtypes(module: nn.Module, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> str:
    """Return what to do where weights and inputs are of different floating-point types."""
    weights = declared_dtype(module, torch.get_default_dtype())
    others = {dtype for _, dtype in shapes if dtype.is_floating_point and dtype != weights}
    if not others or not weights.is_floating_point:
        return ""
    words = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
    return (
        f" (its weights are {str(weights).removeprefix('torch.')}, the input is {words}: set dtype "
        "to one of them, which converts both)"
    )


def _check_same(
    block: str, module: nn.Module, before: Mapping[str, tuple[nn.Parameter, UntypedStorage]]
) -> None:
    """Check that a call has left each weight the same tensor in the same memory."""
    after = dict(module.named_parameters())
    for name, (weight, memory) in before.items():
        same = after.get(name) is weight and weight.untyped_storage()._cdata == memory._cdata
        if not same:
            raise GraphError(
                f"block {block!r}: the forward of a {type(module).__name__} puts another tensor in "
                f"place of its weight {name!r} (by assigning it, or its .data), which would not be "
                "what learns; write into it: with torch.no_grad(): weight.copy_(...)"
            )


def _probes(
    module: nn.Module, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]
) -> tuple[str, ...]:
    """Return the devices on which a dry run of `module` is tried: meta, zeros if it reads values.

    Only zeros where dtypes differ, which meta tensors let pass; and where they are cheaper: the
    first use of meta tensors imports about a second of torch, the arithmetic of a small module of
    torch's own (which does nothing but arithmetic) takes less than a millisecond.
    """
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        return ("cpu",)
    types = {t for _, t in shapes if t.is_floating_point}
    types |= {p.dtype for p in module.parameters() if p.is_floating_point()}
    if len(types) > 1:
        return ("cpu",)
    weights = sum(p.numel() for p in module.parameters())
    inputs = sum(math.prod(shape) for shape, _ in shapes)
    plain = all(type(m).__module__.startswith(PLAIN_MODULES) for m in module.modules())
    if plain and weights <= SMALL_WEIGHTS and inputs <= SMALL_INPUT:
        return ("cpu",)
    return ("meta", "cpu")
