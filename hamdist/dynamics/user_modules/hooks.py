"""Hooks of a model: who calls them, and which are refused.

A module's own hooks run at its calls: such a module is one step of one block, by autograd. Hooks on
a tensor of a forward pass run where the forward is a user's own code. A hook on a weight belongs to
the weight itself, of which blocks have copies; a global one to all modules of this process, the
blocks' own among them. Those two are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from hamdist.errors import GraphError

_KINDS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "full backward pre-hook",
    "_backward_hooks": "backward hook",
}


def hook_of(module: nn.Module) -> str | None:
    """Name the kind of the first hook of `module` itself; None: it has none."""
    return next((kind for a, kind in _KINDS.items() if getattr(module, a)), None)


def is_usual(module: nn.Module) -> bool:
    """Tell whether a call of `module` is its class's forward, and nothing else."""
    called = type(module).__call__ is nn.Module.__call__ and "forward" not in vars(module)
    return called and hook_of(module) is None


def hooks_of(module: nn.Module) -> list[Any]:
    """List the hooks of `module`, as they were registered."""
    return [hook for attribute in _KINDS for hook in getattr(module, attribute).values()]


def check_hooks(modules: Iterable[nn.Module]) -> None:
    """Check that no hook would be dropped.

    Args:
        modules: The model, or the modules of a graph's blocks.

    Raises:
        GraphError: A weight has a hook, or torch has a global module hook.
    """
    for attribute, kind in _KINDS.items():
        if getattr(torch_module, f"_global{attribute}"):
            raise GraphError(
                f"torch has a global module {kind}, which the blocks' own modules would call too, "
                "and other processes would not: remove it, or register it on modules of the model"
            )
    for module in modules:
        for name, weight in module.named_parameters():
            if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
                raise GraphError(
                    f"{name!r} has a gradient hook, which belongs to this tensor alone: blocks "
                    "learn copies, which would not call it. Remove it: requires_grad_(False) "
                    "freezes a weight, learning.clip clips a gradient, and an autograd.Function on "
                    "the weight in its module's forward does anything else"
                )
