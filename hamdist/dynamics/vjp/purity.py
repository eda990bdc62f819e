"""Proves by its bytecode that a forward does the same at every call.

Proved is a forward that reads nothing but its arguments, submodules and plain constants of the
module, calls nothing but those modules, methods that are proved as well, and functions of torch
that have a kernel (kernels.py), and writes to nothing but local variables. Everything else may
depend on Python state: lists, dicts, globals, closures, random numbers, values of a buffer.
"""

from __future__ import annotations

import builtins
import dis
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from hamdist.dynamics.modules.subspace import Subspace
from hamdist.dynamics.vjp.functions import FUNCTIONS, POOLS

OWN = "torch.nn.modules."
# Instructions that write, define or read anything but local variables.
_OUT = ("STORE_", "DELETE_", "IMPORT_", "MAKE_", "YIELD_", "LOAD_DEREF", "LOAD_CLASS", "LOAD_FROM",
        "LOAD_SUPER", "LOAD_NAME", "LOAD_LOCALS", "LOAD_BUILD")  # fmt: skip
_FAST = ("STORE_FAST", "DELETE_FAST")
# Special names of a class that say nothing of what its instances do when they are called.
_HARMLESS = {"__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__dict__",
             "__weakref__", "__static_attributes__", "__firstlineno__", "__constants__",
             "__annotate_func__", "__annotations_cache__", "__repr__"}  # fmt: skip
_BUILTINS = ("len", "range", "enumerate", "zip", "reversed")
# What a proved forward may ask of torch: the operations that program.py knows.
_TORCH = {"nn", "functional", "add", "sub", "mul", "flatten", "view", "reshape"} | {
    str(getattr(f, "__name__", f)) for f in (*FUNCTIONS, *POOLS)
}


def is_pure(module: nn.Module) -> bool:
    """Return True if the forwards of `module` and all its parts are proved.

    Torch's own layers, and `Subspace`, count as proved.
    """
    verdicts: dict[int, bool] = {}
    return all(is_own(part) or _pure_part(part, module, verdicts) for part in module.modules())


def is_own(module: nn.Module) -> bool:
    """Return True for a layer of torch, or one of hamdist that is a kernel."""
    return type(module).__module__.startswith(OWN) or type(module) is Subspace


def is_constant(value: Any) -> bool:
    """Return True if `value` can never change."""
    if isinstance(value, tuple):
        return all(map(is_constant, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _pure_part(part: nn.Module, root: nn.Module, verdicts: dict[int, bool]) -> bool:
    kind = type(part)
    bases = [base for base in kind.__mro__[:-1] if not base.__module__.startswith(OWN)]
    special = {n for base in bases for n in vars(base) if n.startswith("__")} - _HARMLESS
    return not special and _pure_function(kind.forward, root, verdicts)


def _pure_function(function: Any, root: nn.Module, verdicts: dict[int, bool]) -> bool:
    if id(function) in verdicts:
        return verdicts[id(function)]
    verdicts[id(function)] = True  # (of a recursion)
    code = getattr(function, "__code__", None)
    pure = type(function) is FunctionType and code is not None and not code.co_freevars
    if pure:
        values = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        pure = all(map(is_constant, values))
    for step in dis.get_instructions(code) if pure and code is not None else ():
        if step.opname.startswith(_OUT) and not step.opname.startswith(_FAST):
            pure = False
        elif step.opname == "LOAD_GLOBAL":
            pure = pure and _pure_global(step.argval, function.__globals__)
        elif step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            pure = pure and _pure_attribute(step.argval, root, verdicts)
    verdicts[id(function)] = pure
    return pure


def _pure_global(name: str, names: dict[str, Any]) -> bool:
    if name not in names:
        return name in _BUILTINS and hasattr(builtins, name)
    value = names[name]
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] == "torch"
    return isinstance(value, (FunctionType, BuiltinFunctionType)) and value in FUNCTIONS


def _pure_attribute(name: str, root: nn.Module, verdicts: dict[int, bool]) -> bool:
    """Return True if everything that `name` may refer to is proved, whichever object has it."""
    means = name in _TORCH
    for part in root.modules():
        if name in part._modules:
            means = True
            continue
        if not hasattr(part, name):
            continue
        attribute = vars(part).get(name, getattr(type(part), name, part))
        if not is_constant(attribute) and not _pure_function(attribute, root, verdicts):
            return False
        means = True
    return means
