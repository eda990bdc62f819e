"""A block of a traced model as a module that runs a graph of torch.fx.

A `TracedModule` holds modules and weights of the original under their own dotted names, and the
graph of the calls in the order in which the model made them. It runs the Python code that torch.fx
makes of the graph. (Its own attributes begin with `hamdist_`: a model's may have any other name.)
What torch.fx has no node for is a call of a small function:

    the batch                   x.size(0), and operations on whole numbers behind it
    the device                  getattr(x, 'device')
    calls without gradients     torch._C._set_grad_enabled(False), and (True as it was) behind them
    other values and objects    `Bound`: a function with arguments that Python code cannot spell
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from hamdist.dynamics.user_modules.structure import Field

WHOLE = "hamdist_model"  # the attribute that has a model that stays whole
SET_GRAD: Callable[[bool], None] = torch._C._set_grad_enabled
_PLAIN = (int, float, bool, str, Field, bytes, complex, type(None), type(Ellipsis))
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, eq=False)
class Bound:
    """`function` with its last arguments, as one function of a graph of torch.fx."""

    function: Callable[..., Any]
    last: tuple[Any, ...]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any) -> Any:
        """Return what the function returns with `args` in front."""
        return self.function(*args, *self.last)


def the_value(value: Any) -> Any:
    """Return a value, which `Bound` holds, because Python code cannot spell it."""
    return value


def is_spelled(value: Any) -> bool:
    """Return True for a node or a value that torch.fx can write as Python code."""
    return type(value) in _PLAIN or isinstance(value, (fx.Node, *_TORCH))


@dataclass(frozen=True, slots=True)
class _Numbered:
    """A node in a saved graph, by its place."""

    place: int


class TracedModule(nn.Module):
    """f(inputs) by a graph of torch.fx; one tensor comes out.

    Args:
        graph: its placeholders are the parents, in order. What it calls or reads is in `parts` and
            `weights`, by dotted name, and in `constants`, by `CONSTANT` (program.py).
        parts: modules of the original. That of the name '' is the model itself, which the graph
            calls as WHOLE; its weights and modules keep their names.
        persistent: the names of the buffers that belong to the state_dict of the original.
        draws: True if the graph itself draws random numbers (its parts may do so as well).
        writes: True if the graph itself writes to its inputs.
        moves: the names of the buffers that the graph itself writes to.
    """

    def __init__(
        self,
        graph: fx.Graph,
        *,
        parts: Mapping[str, nn.Module],
        weights: Mapping[str, Tensor],
        persistent: frozenset[str],
        constants: Mapping[str, Tensor],
        draws: bool,
        writes: bool,
        moves: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.hamdist_graph = graph
        self._hamdist_run: Callable[..., Any] | None = None
        self.hamdist_draws = draws
        self.hamdist_writes, self.hamdist_moves = writes, tuple(moves)
        self.hamdist_whole = "" in parts  # it calls the whole model, whose weights keep their names
        if self.hamdist_whole:
            _adopt(self, parts[""])
        names = () if self.hamdist_whole else {**parts, **weights}
        for name in sorted(names, key=lambda name: name.count(".")):
            thing = parts.get(name)
            _place(self, name, weights[name] if thing is None else thing, name in persistent)
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, *inputs: Tensor) -> Any:
        run = self._hamdist_run
        if run is None:
            run = self._hamdist_run = _runnable(self.hamdist_graph)
        return run(self, *inputs)

    def __getstate__(self) -> dict[str, Any]:
        place = {node: i for i, node in enumerate(self.hamdist_graph.nodes)}

        def saved(arguments: Any) -> Any:
            return fx.map_arg(arguments, lambda node: _Numbered(place[node]))  # type: ignore[arg-type,return-value]

        calls = [(n.op, n.target, saved(n.args), saved(n.kwargs), n.name) for n in place]
        return {**self.__dict__, "hamdist_graph": calls, "_hamdist_run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        graph, nodes = fx.Graph(), list[fx.Node]()

        def loaded(value: Any) -> Any:
            return nodes[value.place] if isinstance(value, _Numbered) else value

        for op, target, args, kwargs, name in state["hamdist_graph"]:
            args, kwargs = (fx.node.map_aggregate(a, loaded) for a in (args, kwargs))
            nodes.append(graph.create_node(op, target, args, kwargs, name))
        self.hamdist_graph = graph

    def extra_repr(self) -> str:
        return f"{len(self.hamdist_graph.nodes)} nodes"


def _runnable(graph: fx.Graph) -> Callable[..., Any]:
    """Return the graph as a function of the module and its inputs."""
    code = graph.python_code("self")
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<traced block>", "exec"), names)
    run: Callable[..., Any] = names["forward"]
    if all(node.target is not SET_GRAD for node in graph.nodes):
        return run

    def as_before(*args: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # (whatever the run leaves behind)
            return run(*args)

    return as_before


def _adopt(piece: nn.Module, model: nn.Module) -> None:
    """Give `piece` the weights, buffers and modules of `model`, under the same names."""
    for registry in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        piece.__dict__[registry] = model.__dict__[registry]
    piece.__dict__[WHOLE] = model


def _place(root: nn.Module, name: str, thing: nn.Module | Tensor, persistent: bool) -> None:
    """Put `thing` at `name`, where it may be already, as a part of an earlier one."""
    *path, last = name.split(".")
    holder = root
    for key in path:
        inner = holder._modules.get(key)
        if inner is None:
            inner = nn.Module()
            holder.add_module(key, inner)
        holder = inner
    if last in holder._modules or last in holder._parameters or last in holder._buffers:
        return
    if isinstance(thing, nn.Module):
        holder.add_module(last, thing)
    elif isinstance(thing, nn.Parameter):
        holder.register_parameter(last, thing)
    else:
        holder.register_buffer(last, thing, persistent=persistent)


# -- as a part of another graph --------------------------------------------------------------------


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


def appended(
    graph: fx.Graph, prefix: str, module: TracedModule, arguments: Sequence[fx.Node]
) -> Any:
    """Append the operations of `module`, whose parts have `prefix`, on `arguments` to `graph`.

    Returns their result. Calls that a `GraphModule` cannot write become modules of `module`.
    """
    values: dict[fx.Node, Any] = {}
    remaining = iter(arguments)
    grad = True
    for node in module.hamdist_graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op == "output":
            return args[0]
        elif node.target is SET_GRAD:
            grad = node.args[0] is not False
        elif node.target is torch.is_grad_enabled:
            values[node] = None
        elif node.op in ("call_module", "get_attr"):
            values[node] = graph.create_node(node.op, f"{prefix}{node.target}", args, kwargs)
        elif grad and not isinstance(node.target, Bound):
            values[node] = graph.create_node(node.op, node.target, args, kwargs)
        else:
            name = f"hamdist_step_{len(values)}"
            module.add_module(name, Called(node.op, node.target, grad))
            values[node] = graph.call_module(f"{prefix}{name}", args, kwargs)
    return None
