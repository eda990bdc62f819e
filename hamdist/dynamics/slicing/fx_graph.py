"""The operations of a block's module as one graph of torch.fx, which layouts.py reads.

A `TracedModule` has a graph already; any other forward is traced. torch's encoder layers are
replaced by their operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from hamdist.dynamics.slicing.sliced_layers import EncoderLayer
from hamdist.dynamics.tracing.traced_module import SET_GRAD, Bound, TracedModule


class _Tracer(fx.Tracer):
    """Tracer that lets buffers be indexed by traced values (a mask, by the number of tokens)."""

    proxy_buffer_attributes = True


class Called(nn.Module):
    """A call that autograd does not record, or of what has no name in Python, as a module."""

    def __init__(self, op: str, target: Any, grad: bool) -> None:
        super().__init__()
        self.op, self.target, self.grad = op, target, grad

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            if self.op == "call_method":
                return getattr(args[0], self.target)(*args[1:], **kwargs)
            return self.target(*args, **kwargs)


def readable(module: nn.Module) -> nn.Module:
    """Return `module` (a copy, that may be changed) with torch's encoder layers written out."""
    for name, child in module.named_children():
        setattr(module, name, readable(child))
    return EncoderLayer(module) if type(module) is nn.TransformerEncoderLayer else module


def read(graph: fx.Graph, root: nn.Module, path: str, arguments: Sequence[fx.Node]) -> Any:
    """Append the operations of submodule `path` of `root` on `arguments` to `graph`.

    Returns their result. Errors of torch.fx on a forward that it cannot read pass through.
    """
    module = root.get_submodule(path)
    if isinstance(module, TracedModule):
        if module.hamdist_whole:
            raise ValueError("the model stays whole")
        own = module.hamdist_graph
    else:
        tracer = _Tracer()
        if tracer.is_leaf_module(module, path):
            return graph.call_module(path, tuple(arguments))
        own = tracer.trace(module)
    known: dict[fx.Node, Any] = {}
    given = iter(arguments)
    grad = True
    for node in own.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "placeholder":
            known[node] = next(given, node.args[0] if node.args else None)
        elif node.op == "output":
            return args[0]
        elif node.target is SET_GRAD:
            grad = node.args[0] is not False
        elif node.target is torch.is_grad_enabled:
            known[node] = None
        elif node.op in ("call_module", "get_attr"):
            target = f"{path}.{node.target}"
            known[node] = _part(graph, root, node.op, target, args, kwargs)
        elif grad and not isinstance(node.target, Bound):
            known[node] = graph.create_node(node.op, node.target, args, kwargs)
        else:
            module.add_module(f"hamdist_step_{len(known)}", Called(node.op, node.target, grad))
            known[node] = graph.call_module(f"{path}.hamdist_step_{len(known)}", args, kwargs)
    return None


def _part(
    graph: fx.Graph, root: nn.Module, op: str, target: str, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Append what reads a part of `root`, or calls it: torch's containers by what they call."""
    simple = op == "call_module" and not kwargs and all(isinstance(a, fx.Node) for a in args)
    if simple and isinstance(root.get_submodule(target), (EncoderLayer, nn.Sequential)):
        return read(graph, root, target, args)
    return graph.create_node(op, target, args, kwargs)
