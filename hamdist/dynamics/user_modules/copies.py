"""Copies of users' models, whatever state earlier calls have left in them."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hamdist.dynamics.user_modules.structure import tensors_in
from hamdist.errors import GraphError, SettingsError

T = TypeVar("T")
_SHELLS = ("DataParallel", "DistributedDataParallel", "OptimizedModule", "FullyShardedDataParallel")


def copied(thing: T, memo: dict[int, Any] | None = None) -> T:
    """Return a deep copy of a module, or of a tuple of them. memo: as of `copy.deepcopy`.

    A tensor that a module keeps of an earlier call (an activation as an attribute, the product of
    an old `weight_norm`) is copied without its history; buffers whose elements share memory
    (`expand`) get memory for each of them.
    """
    memo = {} if memo is None else memo
    modules = thing if isinstance(thing, tuple) else (thing,)
    for part in (p for m in modules if isinstance(m, nn.Module) for p in m.modules()):
        if parametrize.is_parametrized(part):
            setattr(type(part), "__reduce_ex__", _reduced)  # noqa: B010
        for tensor in tensors_in(vars(part)):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach()
        for buffer in part._buffers.values():
            if buffer is not None and overlaps(buffer):
                memo[id(buffer)] = buffer.clone(memory_format=torch.contiguous_format)
    try:
        copy_of_thing = copy.deepcopy(thing, memo)
    except TypeError as error:
        raise SettingsError(_uncopied(modules, memo, error)) from None
    for module in copy_of_thing if isinstance(copy_of_thing, tuple) else (copy_of_thing,):
        for p in module.parameters() if isinstance(module, nn.Module) else ():
            if not p.is_leaf:  # of a scripted module, which torch copies with a history
                p.detach_().requires_grad_()
    return copy_of_thing


def in_type(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put a module's real tensors into a type, and complex ones into the complex type of it."""

    def cast(t: Tensor) -> Tensor:
        if t.is_complex():
            return t.to(dtype.to_complex())
        return t.to(dtype) if t.is_floating_point() else t

    module._apply(cast)  # type: ignore[no-untyped-call]
    return module


def loss_copy(loss: T) -> T:
    """Return a copy of a loss, with the state that it keeps; itself if it cannot be copied."""
    try:
        return copied(loss)
    except (SettingsError, RuntimeError):  # (a lock, a file, a tensor with a history in it)
        return loss


def _reduced(module: nn.Module, _: object) -> tuple[Any, ...]:
    """Return how pickle makes a parametrized module again, which torch itself does not allow."""
    return _parametrized, (type(module).__mro__[1], vars(module))


def _parametrized(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module: Any = kind.__new__(kind)
    vars(module).update(state)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:
        parametrize._inject_property(module, name)
    setattr(type(module), "__reduce_ex__", _reduced)  # noqa: B010
    return module  # type: ignore[no-any-return]


def _uncopied(modules: tuple[Any, ...], memo: dict[int, Any], error: TypeError) -> str:
    """Return the error text: the attribute of a module that cannot be copied, and its type."""
    where, kind = "", "module"
    whole = [m for m in modules if isinstance(m, nn.Module)]
    for name, module in (pair for m in whole for pair in m.named_modules()):
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                try:
                    copy.deepcopy(value, dict(memo))
                except TypeError as reason:
                    where, kind = f"{name}.{attribute}".strip("."), type(value).__name__
                    error = reason
    return (
        f"the model's {where} is a {kind}, which cannot be copied ({error}), but each block gets a "
        "copy of its modules: make it where it is used, or outside of the model"
    )


def overlaps(tensor: Tensor) -> bool:
    """Return True if several of its elements are one place in memory."""
    if tensor.layout != torch.strided:
        return False
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in pairs)


def unwrapped(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the module inside torch.compile and DataParallel, with warnings about it.

    Raises GraphError for such a wrapper around a part of the model.
    """
    notes = []
    while type(model).__name__ in _SHELLS:
        kind, name = type(model).__name__, "_orig_mod" if hasattr(model, "_orig_mod") else "module"
        notes.append(f"the model is a {kind}: the module inside, its .{name}, is cut and trained")
        model = getattr(model, name)
    for name, part in model.named_modules():
        if type(part).__name__ in _SHELLS:
            raise GraphError(
                f"{name!r} is a {type(part).__name__} (torch.compile, DataParallel), which cannot "
                "be cut or copied: give the model the module inside; hamdist spreads the work"
            )
    return model, notes
