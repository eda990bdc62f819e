"""Digests of the users' code that a run is made of, with the constants that it refers to.

Read are the source of classes and functions that belong to no installed package, and what they
refer to: further such code, and numbers, texts, tensors and containers of these in globals,
closures, defaults and attributes.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hamdist.dynamics.user_modules.python_state import (
    closure_of,
    functions_behind,
    is_foreign,
    is_installed,
    names_of_code,
)

RULES = "hamdist.dynamics.rules."
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)


def code_digests(made_of: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest by name of what a run is made of; none where nothing of it is a user's."""
    values = {name: value for name, value in made_of.items() if value is not None}
    texts = {name: "\n".join(_Reader().read(value)) for name, value in values.items()}
    return {n: hashlib.sha256(t.encode()).hexdigest()[:16] for n, t in texts.items() if t}


def may_keep_state(function: Any) -> bool:
    """Return True if a function may change what outlives a call: it has a closure, sets a global,
    or refers to a container or an object that is no loss of torch's."""
    if not isinstance(function, FunctionType):
        return False
    steps = [(step.opname, step.argval) for step in dis.get_instructions(function)]
    read = {name for op, name in steps if op == "LOAD_GLOBAL"} & function.__globals__.keys()
    fixed = (*_SIMPLE, ModuleType, FunctionType, BuiltinFunctionType, type, nn.modules.loss._Loss)
    return (
        function.__closure__ is not None
        or any(op == "STORE_GLOBAL" or isinstance(name, CodeType) for op, name in steps)
        or not all(isinstance(function.__globals__[name], fixed) for name in read)
    )


class _Reader:
    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # values, kept alive, so that no number comes again
        self._read: dict[int, Any] = {}  # classes and functions

    def read(self, value: Any) -> Iterator[str]:
        """Yield the texts of a value: of simple ones themselves, of others their code."""
        if isinstance(value, _SIMPLE):
            yield repr(value)
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, (Tensor, np.ndarray)):
            array = np.asarray(value.detach().cpu().float() if isinstance(value, Tensor) else value)
            yield f"{value.dtype} {value.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
        elif isinstance(value, Mapping):
            for key, part in value.items():
                yield f"{key}:"
                yield from self.read(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                yield from self.read(part)
        elif isinstance(value, (set, frozenset)):
            yield from sorted(text for part in value for text in self.read(part))
        elif isinstance(value, partial):
            yield from self.read((value.func, value.args, value.keywords))
        elif isinstance(value, MethodType):
            yield from self.read((value.__func__, value.__self__))
        elif isinstance(value, nn.Module):
            for name, part in value.named_modules():
                yield f"{name} {type(part).__name__}"
                yield from self._object(part)
        elif isinstance(value, (FunctionType, type)):
            yield from self._code(value)
        elif not isinstance(value, ModuleType):
            yield from self._object(value)

    def _object(self, value: Any) -> Iterator[str]:
        """Yield the code of an object's class, and the attributes that no method of it moves."""
        kind = type(value)
        yield from self._code(kind)
        if not (_is_own(kind) or isinstance(value, nn.Module) or kind.__module__.startswith(RULES)):
            return
        moves = {n for base in kind.__mro__ if _is_own(base) for n in _set_by(base)}
        for name, part in sorted(getattr(value, "__dict__", {}).items()):
            if name not in moves and name != "training" and not name.startswith("_"):
                texts = list(self.read(part))
                yield from (f"{name} =", *texts) if texts else ()

    def _code(self, code: Any) -> Iterator[str]:
        """Yield the source of a class with its bases, or of a function, and what it refers to."""
        for part in code.__mro__ if isinstance(code, type) else [code]:
            if not _is_own(part) or id(part) in self._read:
                continue
            self._read[id(part)] = part
            functions = list(_functions(part))
            try:
                yield inspect.getsource(part)
            except (OSError, TypeError):  # it was typed into a terminal
                yield from (_bytecode(function.__code__) for function in functions)
            for function in functions:
                yield from self._references(function)

    def _references(self, function: FunctionType) -> Iterator[str]:
        yield from self.read((function.__defaults__, function.__kwdefaults__))
        references = closure_of(function)
        names = names_of_code(function.__code__)
        for name in names & function.__globals__.keys():
            value = function.__globals__[name]
            of_module = isinstance(value, ModuleType) and is_foreign(value)
            inside = names & vars(value).keys() if of_module and not is_installed(value) else ()
            references |= {name: value, **{f"{name}.{n}": vars(value)[n] for n in inside}}
        for name, value in sorted(references.items()):
            texts = list(self.read(value))
            yield from (f"{name} =", *texts) if texts else ()


def _is_own(code: Any) -> bool:
    return is_foreign(code) and not is_installed(code)


def _functions(code: Any) -> Iterator[FunctionType]:
    """Yield a function, or the functions of a class itself."""
    for value in vars(code).values() if isinstance(code, type) else [code]:
        yield from functions_behind(value)


def _set_by(kind: type) -> Iterator[str]:
    """Yield the attributes that methods of a class other than `__init__` set."""
    for function in _functions(kind):
        for step in dis.get_instructions(function) if function.__name__ != "__init__" else ():
            if step.opname == "STORE_ATTR":
                yield step.argval


def _bytecode(code: CodeType) -> str:
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    constants = [c for c in code.co_consts if not isinstance(c, CodeType)]
    # (the order of a set's elements is another one in every process)
    texts = [repr(sorted(map(repr, c)) if isinstance(c, frozenset) else c) for c in constants]
    return "\n".join([code.co_code.hex(), *texts, *map(_bytecode, inner)])
