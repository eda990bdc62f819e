"""Python state that modules keep from call to call besides weights, buffers and submodules.

Inside: attributes of the module, which each copy of it has of its own. Outside: state that all
copies share, and each process has of its own: globals, closures, defaults, attributes of classes,
Python's and numpy's random numbers. Both are read before and after calls: what differs is state.
"""

from __future__ import annotations

import math
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hamdist.dynamics.user_modules.hooks import hooks_of
from hamdist.errors import GraphError

SETS_REQUIRES_GRAD = (
    "the model's forward sets requires_grad of its weight {!r}: which weights learn is asked once, "
    "before a run; freeze it before, or use detach() in forward"
)
MOST = 20_000  # values that are looked at in one attribute
_LIBRARIES = {"torch", "numpy", "hamdist", "typing_extensions", *sys.stdlib_module_names} - {
    "__main__"
}
_BOOKKEEPING = {*vars(nn.Module())} - {"training"}
_CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset, deque)
_PLAIN = (bool, int, str, bytes, complex, type(None))


def is_foreign(thing: Any) -> bool:
    """Tell whether a class or function is neither Python's nor torch's nor hamdist's."""
    return str(getattr(thing, "__module__", "")).partition(".")[0] not in _LIBRARIES


class Fingerprints:
    """Fingerprints of values, by name; equal ones say that nothing has changed.

    Attributes:
        marks: By name. ids: what was looked at, by identity, which keeps it alive.
    """

    def __init__(self) -> None:
        self.marks: dict[str, Any] = {}
        self.ids: dict[int, Any] = {}

    def add(self, name: str, value: Any) -> None:
        """Add a value under a name, once."""
        if name not in self.marks:
            self.marks[name] = self._mark(value)

    def differing(self, other: Fingerprints) -> list[str]:
        """Name what is not the same in both."""
        names = {**self.marks, **other.marks}
        return [n for n in names if self.marks.get(n, self) != other.marks.get(n, self)]

    def _mark(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return (type(value).__name__, value)
        if isinstance(value, float):
            return value.hex() if math.isfinite(value) else str(value)
        if id(value) in self.ids or len(self.ids) > MOST:
            return id(value)
        self.ids[id(value)] = value
        # (what they hold, not what a class of its own would load, as transformers' mappings do)
        if isinstance(value, dict):
            return tuple((self._mark(k), self._mark(v)) for k, v in dict.items(value))
        if isinstance(value, Mapping) and not is_foreign(type(value)):
            return tuple((self._mark(k), self._mark(v)) for k, v in value.items())
        for kind in _CONTAINERS:
            if isinstance(value, kind):
                return tuple(map(self._mark, kind.__iter__(value)))
        if isinstance(value, (np.ndarray, np.generic)):
            return value.dtype.str, value.shape, value.tobytes()
        if isinstance(value, random.Random):
            return value.getstate()
        if isinstance(value, np.random.Generator):
            return repr(value.bit_generator.state)
        if isinstance(value, np.random.RandomState):
            return repr(value.get_state(legacy=False))
        if isinstance(value, (MethodType, BuiltinMethodType)):
            return self._mark(value.__self__)
        if isinstance(value, partial):
            return self._mark((value.func, value.args, value.keywords))
        if isinstance(value, Iterator):  # it moves on whenever it is read
            return id(value) if hasattr(value, "fileno") else object()
        if isinstance(value, SimpleNamespace) or _has_state(value):
            return self._mark(vars(value))
        return id(value)


def _has_state(value: Any) -> bool:
    plain = isinstance(value, (nn.Module, Tensor, type, FunctionType, ModuleType))
    return not plain and is_foreign(type(value)) and hasattr(value, "__dict__")


def inside(part: nn.Module) -> Fingerprints:
    """Read the attributes of `part` itself that are no tensors and no modules, and its hooks."""
    values = Fingerprints()
    for name, value in vars(part).items():
        if name not in _BOOKKEEPING and not isinstance(value, (Tensor, nn.Module)):
            values.add(name, value)
    values.add("a hook", hooks_of(part))
    return values


def changed_in(part: nn.Module, before: Fingerprints) -> list[str]:
    """Name the attributes that calls have changed, unless the class saves them by itself."""
    if type(part).get_extra_state is not nn.Module.get_extra_state:
        return []
    return [f"{name!r} of a {type(part).__name__}" for name in before.differing(inside(part))]


def check_apart(blocks: Mapping[str, Sequence[nn.Module]]) -> None:
    """Check that no block's Python code holds a module or weight of another block.

    Raises:
        GraphError: One does; each block learns a copy of what it holds.
    """
    names = {
        id(thing): f"{path or type(module).__name__!r} of block {block!r}"
        for block, modules in blocks.items()
        for module in modules
        for path, thing in (*module.named_modules(), *module.named_parameters())
    }
    for block, modules in blocks.items():
        parts = [part for module in modules for part in module.modules()]
        ids = {id(t) for part in parts for t in (part, *part.parameters())}
        for part in parts:
            values = list(inside(part).ids.values())
            for thing in [thing for thing in values if isinstance(thing, nn.Module)]:
                values += [*thing.modules(), *thing.parameters()]
            for stray in ({id(thing) for thing in values} & names.keys()) - ids:
                raise GraphError(
                    f"block {block!r}: a {type(part).__name__} holds {names[stray]} in a hook or "
                    "an attribute, so both would learn a copy of their own; keep the two in one "
                    "block, or hand it on as an argument"
                )


def mutable_in(values: Iterable[Any]) -> set[int]:
    """Identify what can change in `values`, at any depth."""
    fingerprints = Fingerprints()
    for i, value in enumerate(values):
        fingerprints.add(str(i), value)
    fixed = (tuple, frozenset, FunctionType, type, nn.Module)
    return {key for key, value in fingerprints.ids.items() if not isinstance(value, fixed)}


def functions_of(model: nn.Module) -> list[str]:
    """Name the user's autograd.Functions that the forwards and hooks of `model` refer to."""
    classes = Outside([model]).classes
    return [c.__name__ for c in classes if issubclass(c, torch.autograd.Function)]


def modules_of(function: Any) -> list[nn.Module]:
    """List the modules that a loss is, is a method of, or refers to."""
    return [value for value in _reached(function) if isinstance(value, nn.Module)]


def holders_in(function: Any) -> list[Any]:
    """List the modules and the objects of users' classes that a loss is, holds, or refers to."""
    return [v for v in _reached(function) if isinstance(v, nn.Module) or _has_state(v)]


def weights_of(function: Any) -> list[str]:
    """Name the weights, of modules or alone, that a loss refers to and that could learn."""
    names = {
        id(p): f"{name} of a {type(module).__name__}"
        for module in modules_of(function)
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    for value in _reached(function):
        if isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
            names.setdefault(id(value), f"a tensor of shape {tuple(value.shape)}")
    return list(names.values())


def _reached(function: Any) -> list[Any]:
    """List the values that a loss is, holds, or refers to."""
    fingerprints = Fingerprints()
    fingerprints.add("", function)
    for used in functions_behind(function):
        read = {n: used.__globals__.get(n) for n in names_of_code(used.__code__)}
        fingerprints.add(f"names {id(used)}", (read, closure_of(used), used.__defaults__))
    return list(fingerprints.ids.values())


def closure_of(function: FunctionType) -> dict[str, Any]:
    """Return the closure variables of a function that have a value, by name."""
    values: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it is empty
            values[name] = cell.cell_contents
    return values


def names_in(part: nn.Module) -> set[str]:
    """List the names that the code of the part's own class mentions."""
    classes = [vars(base).values() for base in type(part).__mro__ if is_foreign(base)]
    functions = [f for values in classes for value in values for f in functions_behind(value)]
    return {name for f in functions for name in names_of_code(f.__code__)}


class Outside(Fingerprints):
    """State outside of modules that their forwards and hooks read and all copies share.

    Of installed packages random numbers alone: they keep caches, and records of warnings.

    Attributes:
        captured: Names of what holds one of the modules or weights itself.
        classes: The users' classes that they refer to.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        parts = [part for module in modules for part in module.modules()]
        inside = (t for part in parts for t in (part, *part._parameters.values()))
        self._inside = {id(t) for t in inside if t is not None}
        self._read: set[int] = set()
        self._names = {"forward", "backward", "setup_context"}
        self.classes: list[type] = []
        self.captured: list[str] = []
        for part in parts:
            for value in (type(part), *hooks_of(part), *vars(part).values()):
                self._code_of(value)
        count_before = -1
        while count_before != len(self._read):  # until no further names come up
            count_before = len(self._read)
            for name, _, value in list(self._members()):
                if name in self._names or name.startswith("__"):
                    self._code_of(value)
        for name, base, value in self._members():
            if name in self._names and not callable(value) and not is_installed(base):
                self.add(f"{base.__name__}.{name}", value)

    def _members(self) -> Iterator[tuple[str, type, Any]]:
        for base in self.classes:
            for name, value in vars(base).items():
                if name != "__init__" or not issubclass(base, nn.Module):
                    yield name, base, value

    def _code_of(self, value: Any) -> None:
        """Read everything that the code behind a value refers to."""
        if isinstance(value, MethodType) and isinstance(value.__self__, type):  # Function.apply
            value = value.__self__
        kind = value if isinstance(value, type) else type(value) if _has_state(value) else object
        for base in kind.__mro__:
            if is_foreign(base) and id(base) not in self._read:
                self._read.add(id(base))
                self.classes.append(base)
        for function in functions_behind(value):
            if id(function) not in self._read:
                self._read.add(id(function))
                self._function(function)

    def _function(self, function: FunctionType) -> None:
        where, names = function.__qualname__, names_of_code(function.__code__)
        self._names |= names
        defaults = (function.__defaults__, function.__kwdefaults__, vars(function))
        reached: dict[str, Any] = {f"a default or attribute of {where}": defaults}
        for name, value in closure_of(function).items():
            reached[f"{name!r}, a closure variable of {where}"] = value
        for name in names & function.__globals__.keys():
            reached[f"{name!r}, a global of {function.__module__}"] = function.__globals__[name]
        if "random" in names:  # perhaps imported inside
            reached |= {"random": random, "numpy.random": np.random}
        for label, value in reached.items():
            self._value(label, value, names, is_installed(function))

    def _value(self, label: str, value: Any, names: set[str], installed: bool) -> None:
        if value is random:
            self.add("Python's random numbers", random._inst)
        elif value is np.random:
            self.add("numpy's random numbers", np.random.mtrand._rand)
        elif isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] not in _LIBRARIES and not is_installed(value):
                for name in names & vars(value).keys():
                    self._value(f"{name!r} of {value.__name__}", vars(value)[name], set(), False)
        elif id(value) in self._inside:
            self.captured.append(label)
        else:
            self._code_of(value)
            chance = isinstance(getattr(value, "__self__", value), _GENERATORS)
            if chance or not (installed or isinstance(value, (type, FunctionType))):
                self.add(label, value)


_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)


def is_installed(thing: Any) -> bool:
    """Return True if a class, function or module is part of an installed package."""
    module = thing if isinstance(thing, ModuleType) else sys.modules.get(thing.__module__)
    file = getattr(module, "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def functions_behind(value: Any) -> Iterator[FunctionType]:
    """Yield the Python function behind a value, unless it is Python's or torch's."""
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, (partial, cached_property)):
        yield from functions_behind(value.func)
    if isinstance(value, FunctionType) and is_foreign(value):
        yield value


def names_of_code(code: CodeType) -> set[str]:
    """List the names that code, and the functions inside it, mention."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*map(names_of_code, inner))


@contextmanager
def unchanged(modules: Iterable[nn.Module]) -> Iterator[Outside]:
    """Check that the calls made meanwhile leave what all processes have of their own as it is.

    Yields:
        What it was before.

    Raises:
        GraphError: A forward or a hook changes it, or refers to a module or a weight of the model
            other than by `self`, so that a copy would use that of the original.
    """
    modules = list(modules)
    before = Outside(modules)
    if before.captured:
        raise GraphError(
            f"a forward or hook of the model refers to a part of the model itself as "
            f"{before.captured[0]}: what learns is a copy, which would go on using the original's "
            "part; reach it by self, or by the module that a hook is given"
        )
    yield before
    changed = before.differing(Outside(modules))
    if changed:
        raise GraphError(
            f"a forward or hook of the model changes {changed[0]}: every process has that of its "
            "own, and trial runs of the model move it, so no run would equal another; keep it in "
            "a buffer or an attribute of the module, and draw random numbers from torch"
        )
