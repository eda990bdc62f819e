"""Modules that report their calls to a recorder (recorder.py)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from hamdist.dynamics.tracing.recorded_calls import Unfollowed

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


def _watched(kind: type[nn.Module], own: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass of `kind` that reports its calls to a recorder. (Of `kind` alone, so that
    an object of it can become one, whatever other classes it has.)
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recorder = vars(self).get("_hamdist_recorder")
        run = partial(kind.__call__, self)
        if recorder is None:
            return run(*args, **kwargs)
        return recorder.module(self, run, args, kwargs)

    one_step = kind.__module__.startswith(own) and kind not in CONTAINERS
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


def watch(model: nn.Module, own: tuple[str, ...] = OWN) -> dict[str, Unfollowed]:
    """Prepare a model, a copy without other users, for `record`; return the modules that have to
    stay whole, because they are no Python classes (scripted ones). own: packages whose modules are
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
        part.__class__ = _watched(kind, own)
    return scripted
