"""Helpers of the recorder: modules that report their calls, tensors in arguments and results, the
line of user code.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache, partial
from types import BuiltinFunctionType, FrameType, FunctionType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from hamdist.dynamics.user_modules.structure import filled, parts_of

_OPERATORS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}
_REVERSED = {"__rsub__": operator.sub, "__rdiv__": operator.truediv}
_ITEMS = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}

_FILES = ("/torch/", f"/{__package__.replace('.', '/')}/")  # whose lines are not the user's


class Unfollowed(Exception):
    """Raised where a model cannot be traced, with the reason.

    module: the innermost one whose forward prevents it; line: where ('file:line: text').
    """

    def __init__(self, reason: str, module: str, line: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.module = module
        self.line = line


class TorchCall(NamedTuple):
    """A call as torch.fx writes it: the kind of node, what is called, and with which arguments."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_call(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> TorchCall:
    """Return the call, in the form in which people write it."""
    named: Any = None
    if len(args) == 2 and not kwargs:
        named = _OPERATORS.get(name) if isinstance(args[0], Tensor) else None
        if name in _REVERSED:
            named, args = _REVERSED[name], (args[1], args[0])
    named = named or _ITEMS.get(name)
    if named is not None:
        return TorchCall("call_function", named, tuple(args), {})
    if "TensorBase." in getattr(func, "__qualname__", ""):
        return TorchCall("call_method", name, tuple(args), kwargs)
    return TorchCall("call_function", func, tuple(args), _said(func, kwargs))


def _said(func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords without those that torch adds with defaults (`inplace=False`)."""
    if not isinstance(func, FunctionType):
        return kwargs
    takes = inspect.signature(func).parameters
    plain = (bool, int, float, str, type(None))
    return {
        key: value
        for key, value in kwargs.items()
        if key not in takes or not isinstance(value, plain) or takes[key].default is not value
    }


def is_plain(value: Any) -> bool:
    """Return True for a value that a graph holds as it is, without a tensor in it."""
    plain = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), Enum, type)
    torch_own = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.finfo)
    functions = (FunctionType, BuiltinFunctionType)
    return isinstance(value, (*plain, *torch_own, *functions))


def autocast_state() -> list[object]:
    """Return the dtypes of autocast now; torch's query without a device is about CUDA only."""
    on = torch.is_autocast_enabled
    return [torch.get_autocast_dtype(d) if on(d) else None for d in ("cpu", "cuda")]


def backward_of(tensor: Tensor) -> object:
    """Return a value that changes once an autograd.Function has returned the tensor as its own."""
    node = tensor.grad_fn
    if isinstance(node, BackwardCFunction):
        return node
    return tensor.requires_grad and node is not None


def address_of(tensor: Tensor) -> int:
    """Return a number that tensors in the same memory share."""
    if tensor.layout != torch.strided:
        return id(tensor)
    return tensor.untyped_storage().data_ptr() or id(tensor)


def other_objects(value: Any) -> Iterator[Any]:
    """Yield objects in a result that are neither tensors nor plain values."""
    parts = parts_of(value)
    if parts is not None:
        for _, inner in parts:
            yield from other_objects(inner)
    elif not isinstance(value, Tensor) and not is_plain(value):
        yield value


def without_others(value: Any) -> Any:
    """Return a result with None in place of the objects of `other_objects`."""
    parts = parts_of(value)
    if parts is not None:
        return filled(value, [without_others(part) for _, part in parts])
    return value if isinstance(value, Tensor) or is_plain(value) else None


def is_stateful(part: nn.Module) -> bool:
    """Return True for a module with parameters or buffers."""
    return bool((*part.parameters(), *part.buffers()))


def line_here() -> str:
    """Return the line of the user's code that is running; nothing if none is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_users(frame.f_code.co_filename):
            return _line(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return ""


def line_of(error: BaseException) -> str:
    """Return the last line outside torch that the error passed."""
    line, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if _is_users(file):
            line = _line(file, trace.tb_lineno)
        trace = trace.tb_next
    return line


@lru_cache
def _is_users(file: str) -> bool:
    return not any(part in file.replace("\\", "/") for part in _FILES)


def _line(file: str, number: int) -> str:
    text = linecache.getline(file, number).strip()
    return f"{file}:{number}" + (f": {text}" if text else "")


def stays_whole(name: str, model: nn.Module, why: Unfollowed) -> str:
    """Return the warning about a module that cannot be cut, with the line that prevents it."""
    module_name = f"the model (a {type(model).__name__})"
    if name:
        module_name = f"{name!r} (a {type(model.get_submodule(name)).__name__})"
    at = f", at {why.line}" if why.line else ""
    return f"{module_name} stays whole, because {why.reason}{at}"


# Files of transformers that make attention masks. They ask whether a mask hides anything at all,
# and leave it out where it does not, unless somebody traces: the values of a mask would decide
# what happens next.
MASKS = ("/transformers/masking_utils.py", "/transformers/modeling_attn_mask_utils.py")
NEAR = 4  # frames between torch.jit.is_tracing and who asks


@contextmanager
def masks_stay() -> Iterator[None]:
    """Make transformers build every attention mask, whatever its values: a block then does the same
    for every sample. Elsewhere `torch.jit.is_tracing` says what it always says."""
    ask = sys.modules["torch.jit"].is_tracing

    def is_tracing() -> bool:
        return _asked_for_masks() or bool(ask())

    with patch("torch.jit.is_tracing", is_tracing):
        yield


def _asked_for_masks() -> bool:
    frame = sys._getframe(2)
    for _ in range(NEAR):
        if frame.f_code.co_filename.replace("\\", "/").endswith(MASKS):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


# -- modules that report their calls to a recorder -------------------------------------------------

# Torch's modules that only call others: they are gone through.
CONTAINERS = (
    nn.Sequential,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
OWN = ("torch.", "hamdist.")  # packages whose modules are one step


def _watched(kind: type[nn.Module], packages: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass of `kind` that reports its calls to a recorder. (Of `kind` alone, so that
    an object of it can become one, whatever other classes it has.)
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recorder = vars(self).get("_hamdist_recorder")
        run = partial(kind.__call__, self)
        if recorder is None:
            return run(*args, **kwargs)
        return recorder.module(self, run, args, kwargs)

    one_step = kind.__module__.startswith(packages) and kind not in CONTAINERS
    shown = {"__module__": __name__, "__call__": call, "_hamdist_one_step": one_step}
    seen = type("_Watched", (kind,), shown)
    return type(kind.__name__, (seen,), {"__module__": kind.__module__})


class _Shell(nn.Module):
    """Wrapper of a scripted module, whose class cannot be changed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def watch(model: nn.Module, packages: tuple[str, ...] = OWN) -> dict[str, Unfollowed]:
    """Prepare a model, a copy without other users, for `record`; return the modules that have to
    stay whole, because they are no Python classes (scripted ones). packages: whose modules are
    one step. Raises Unfollowed where the model itself is scripted.
    """
    compiled = "it is compiled (torch.jit)"
    if isinstance(model, torch.jit.ScriptModule):
        raise Unfollowed(compiled, "", "")
    scripted: dict[str, Unfollowed] = {}
    for name, part in list(model.named_modules()):
        if isinstance(part, torch.jit.ScriptModule):
            continue
        for child, inner in part._modules.items():
            if isinstance(inner, torch.jit.ScriptModule):
                part._modules[child] = _Shell(inner)
                path = f"{name}.{child}" if name else child
                scripted[path] = Unfollowed(compiled, path, "")
    for part in model.modules():
        kind = type(part)
        if isinstance(part, torch.jit.ScriptModule):
            continue
        part.__class__ = _watched(kind, packages)
    return scripted
