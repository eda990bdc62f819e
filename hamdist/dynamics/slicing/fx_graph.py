"""The operations of a traced block as a part of one graph of torch.fx, which layouts.py reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from hamdist.dynamics.tracing.traced_module import SET_GRAD, Bound, TracedModule


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


def read(graph: fx.Graph, prefix: str, module: TracedModule, arguments: Sequence[fx.Node]) -> Any:
    """Append the operations of `module`, whose parts have `prefix`, on `arguments` to `graph`.

    Returns their result. Calls that a `GraphModule` cannot write become modules of `module`.
    """
    known: dict[fx.Node, Any] = {}
    given = iter(arguments)
    grad = True
    for node in module.hamdist_graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "output":
            return args[0]
        elif node.target is SET_GRAD:
            grad = node.args[0] is not False
        elif node.target is torch.is_grad_enabled:
            known[node] = None
        elif node.op in ("call_module", "get_attr"):
            known[node] = graph.create_node(node.op, f"{prefix}{node.target}", args, kwargs)
        elif grad and not isinstance(node.target, Bound):
            known[node] = graph.create_node(node.op, node.target, args, kwargs)
        else:
            name = f"hamdist_step_{len(known)}"
            module.add_module(name, Called(node.op, node.target, grad))
            known[node] = graph.call_module(f"{prefix}{name}", args, kwargs)
    return None
