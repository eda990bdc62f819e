"""The operations of a block's module as one graph of torch.fx, which layouts.py reads.

A `TracedModule` has a program already; any other forward is traced. torch's encoder layers are
replaced by their operations.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from hamdist.dynamics.slicing.sliced_layers import EncoderLayer
from hamdist.dynamics.tracing.traced_module import (
    METHOD,
    MODULE,
    PLACES,
    Arg,
    ConstantRef,
    SymbolicSize,
    TracedModule,
    TracedStep,
    ValueRef,
    WeightRef,
    replaced,
)
from hamdist.dynamics.user_modules.structure import getter, objects

PLAIN = (int, float, bool, str, complex, type(None), type(Ellipsis), torch.dtype, torch.device)


class _Tracer(fx.Tracer):
    """Tracer that lets buffers be indexed by traced values (a mask, by the number of tokens)."""

    proxy_buffer_attributes = True


class Called(nn.Module):
    """A step whose call has more than tensors and plain values, as a module of its tensors."""

    def __init__(self, step: TracedStep) -> None:
        super().__init__()
        self.step = step

    def forward(self, *tensors: Any) -> Any:
        values = iter(tensors)
        args, kwargs = objects(replaced((self.step.args, self.step.kwargs), lambda _: next(values)))
        with torch.set_grad_enabled(self.step.grad and torch.is_grad_enabled()):
            if self.step.kind == METHOD:
                return getattr(args[0], self.step.target)(*args[1:], **kwargs)
            return self.step.target(*args, **kwargs)


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
        return _Program(graph, root, path, module, arguments).read()
    tracer = _Tracer()
    if tracer.is_leaf_module(module, path):
        return graph.call_module(path, tuple(arguments))
    known: dict[fx.Node, Any] = {}
    values = iter(arguments)
    for node in tracer.trace(module).nodes:
        if node.op == "placeholder":
            known[node] = next(values, node.args[0] if node.args else None)
        elif node.op == "output":
            return fx.map_arg(node.args[0], lambda n: known[n])
        else:
            copied = graph.node_copy(node, lambda n: known[n])
            if node.op in ("call_module", "get_attr"):
                copied.target = f"{path}.{node.target}"
            known[node] = copied
    return None


class _Program:
    """The program of a traced module."""

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        path: str,
        piece: TracedModule,
        arguments: Sequence[fx.Node],
    ) -> None:
        self._graph, self._root, self._path, self._piece = graph, root, path, piece
        self._inputs = dict(zip(piece.inputs, arguments, strict=True))
        self._made: list[Any] = []

    def read(self) -> Any:
        if self._piece.is_whole:
            raise ValueError("the model stays whole")
        for step in self._piece.program:
            self._made.append(self._step(step))
        return replaced(self._piece.output, self._node)

    def _step(self, step: TracedStep) -> Any:
        graph = self._graph
        args, kwargs = replaced((step.args, step.kwargs), self._node)
        if step.kind == MODULE:
            target = f"{self._path}.{step.target}"
            module = self._root.get_submodule(target)
            plain = not kwargs and all(isinstance(a, fx.Node) for a in args)
            if plain and isinstance(module, (EncoderLayer, nn.Sequential)):
                return read(graph, self._root, target, args)
            return graph.call_module(target, args, kwargs)
        if not step.grad or not _plain((args, kwargs)):
            return self._called(step)
        target = step.target
        if isinstance(target, (types.WrapperDescriptorType, types.MethodDescriptorType)):
            return graph.call_method(target.__name__, args, kwargs)
        create: Callable[..., fx.Node] = graph.call_function
        return (graph.call_method if step.kind == METHOD else create)(target, args, kwargs)

    def _called(self, step: TracedStep) -> fx.Node:
        name = f"hamdist_step_{len(self._made)}"
        self._piece.add_module(name, Called(step))
        values: list[Any] = []
        replaced((step.args, step.kwargs), lambda place: values.append(self._node(place)))
        return self._graph.call_module(f"{self._path}.{name}", tuple(values))

    def _node(self, place: Any) -> Any:
        graph = self._graph
        if isinstance(place, Arg):
            return self._inputs[place.name]
        if isinstance(place, ValueRef):
            step_node = self._made[place.step]
            for key in place.path:
                step_node = graph.call_function(getter(key), (step_node, key))
            return step_node
        if isinstance(place, WeightRef):
            return graph.get_attr(f"{self._path}.{place.name}")
        if isinstance(place, ConstantRef):
            return graph.get_attr(f"{self._path}.hamdist_constant_{place.index}")
        first = next(iter(self._inputs.values()))
        if not isinstance(place, SymbolicSize):
            return graph.call_function(getattr, (first, "device"))
        batch: Any = graph.call_method("size", (first, 0))
        size = batch if place.per == 1 else graph.call_function(operator.mul, (batch, place.per))
        for one, a, b in place.lengths:
            length = graph.call_method("size", (self._inputs[one.name], one.axis))
            for part in (a, graph.call_function(operator.mul, (batch, b))) if b else (a,):
                term = graph.call_function(operator.mul, (length, part))
                size = graph.call_function(operator.add, (size, term))
        return graph.call_function(operator.add, (size, place.more)) if place.more else size


def _plain(template: Any) -> bool:
    """Return True if torch.fx can write it down."""
    if isinstance(template, (tuple, list)):
        return all(_plain(t) for t in template)
    if isinstance(template, dict):
        return all(_plain(t) for t in template.values())
    if isinstance(template, slice):
        return all(_plain(t) for t in (template.start, template.stop, template.step))
    return isinstance(template, (fx.Node, *PLAIN)) and not isinstance(template, (Tensor, *PLACES))
