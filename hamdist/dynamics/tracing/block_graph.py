"""Makes the graph of one block out of the graph of a traced model.

The block has the calls of its own ops, and of those that any block repeats; what other blocks send
are its inputs.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from hamdist.dynamics.tracing.dataflow import Flow
from hamdist.dynamics.tracing.join_runs import Trace
from hamdist.dynamics.tracing.program import (
    CONSTANT,
    ColumnForm,
    DeviceRef,
    SymbolicSize,
    Value,
    is_constant,
    packed,
    unpacked,
    value_of,
)
from hamdist.dynamics.tracing.recorded_calls import Unfollowed
from hamdist.dynamics.tracing.traced_module import (
    SET_GRAD,
    WHOLE,
    Bound,
    TracedModule,
    is_spelled,
    the_value,
)
from hamdist.dynamics.user_modules.structure import Built, Path, built, filled, getter, parts_of


def one_block(trace: Trace, model: nn.Module, inputs: Sequence[str]) -> TracedModule:
    """Return all that a model does as one module, which takes all `inputs`.

    Raises Unfollowed where what it returns depends on nothing.
    """
    values = list(filter(None, map(value_of, trace.end.all_input_nodes)))
    if not values:
        raise Unfollowed("its output depends neither on its input nor on its weights", "", "")
    flow = Flow(trace, model, values)
    block = BlockGraph(flow, model, "", dict.fromkeys(flow.order, ""), {"": ()})
    for name in inputs:
        block.input(name)
    for i in flow.order:
        block.emit(i)
    block.finish(block.arguments(trace.output), inputs)
    return block.module()


class BlockGraph:
    """The graph of one block under construction, and all that it holds.

    home: the blocks of the ops that belong to one; leaving: by block, the values that others read.
    """

    def __init__(
        self,
        flow: Flow,
        model: nn.Module,
        name: str,
        home: Mapping[int, str],
        leaving: Mapping[str, Sequence[Value]],
    ) -> None:
        self._flow, self._model, self._name = flow, model, name
        self._home, self._leaving = home, leaving
        ops = [flow.ops[i] for i, block in home.items() if block == name]
        self._written = {memory for op in ops for memory in op.writes}
        self._parts: dict[str, nn.Module] = {}  # of the model, by dotted name
        self._weights: dict[str, Tensor] = {}
        self._constants: dict[str, Tensor] = {}
        self._graph = fx.Graph()
        self._first = self._graph.placeholder("first")  # stands for the first of the parents
        self._inputs: dict[str, fx.Node] = {}
        self._nodes: dict[int, fx.Node] = {}  # by op
        self._values: dict[Value, fx.Node] = {}  # parts of what ops return, and of other blocks
        self._cache: dict[object, fx.Node] = {}  # weights, the device, the batch, sums with it
        self._before: fx.Node | None = None  # True if autograd records; None where it does

    def packed(self, values: Sequence[Value]) -> fx.Node:
        """Return values as the columns of one signal."""
        forms = tuple(self._flow.form(value) for value in values)
        return self._call(
            Bound(packed, (forms,)),
            self._number(SymbolicSize(1)),
            [self.value(value) for value in values],
        )

    def finish(self, result: Any, names: Sequence[str]) -> list[str]:
        """Add the output; return the parents: those of `names` that the graph reads."""
        self._grad(True)
        self._graph.output(result)
        parents = [name for name in names if name in self._inputs]
        parents = parents or [name for name in names if name not in self._leaving][:1]
        for name in reversed(parents):
            next(iter(self._graph.nodes)).prepend(self.input(name))
        self._first.replace_all_uses_with(self._inputs[parents[0]])
        self._graph.erase_node(self._first)
        return parents

    def children(self) -> nn.Sequential | None:
        """Return the block as a part of a model that is an nn.Sequential, where it only calls
        children of the model, one behind the other.
        """
        if type(self._model).forward is not nn.Sequential.forward:
            return None
        children = self._model._modules
        before, *calls = list(self._graph.nodes)[:-1]
        for call in calls:
            if call.op != "call_module" or call.target not in children or call.args != (before,):
                return None
            before = call
        names = [str(call.target) for call in calls]
        if len({*names}) < len(names):  # one child that is called twice
            return None
        return nn.Sequential(OrderedDict((name, self._parts[name]) for name in names))

    def module(self) -> TracedModule:
        """Return the module that runs the graph."""
        ops = [self._flow.ops[i] for i in self._nodes]
        origins = [self._flow.trace.origin.get(m) for op in ops for m in op.writes]
        names = {n for n, _ in self._model.named_buffers(remove_duplicate=False)}
        return TracedModule(
            self._graph,
            parts=self._parts,
            weights=self._weights,
            persistent=frozenset(names & self._model.state_dict().keys()),
            constants=self._constants,
            draws=any(op.random and op.node.op != "call_module" for op in ops),
            writes=any(isinstance(o, fx.Node) and o.op == "placeholder" for o in origins),
            moves=[name for op in ops for name in self._flow.written_weights(op)],
        )

    def emit(self, i: int) -> fx.Node:
        """Return the result of op i, which is added to the graph unless it is there."""
        if i in self._nodes:
            return self._nodes[i]
        for before in sorted(self._flow.needs[i] & self._flow.free):  # what writes to what it reads
            self.emit(before)
        op = self._flow.ops[i]
        args, kwargs = self.arguments(op.node.args), self.arguments(op.node.kwargs)
        target = op.node.target
        if op.node.op == "call_module":
            self._parts[str(target)] = self._model.get_submodule(str(target))
            target = target or WHOLE
        self._grad(op.grad)
        self._nodes[i] = self._graph.create_node(op.node.op, target, args, kwargs)
        return self._nodes[i]

    def _grad(self, wanted: bool) -> None:
        """Make autograd record the next calls as it does outside of the graph, or not at all."""
        if wanted is (self._before is None):
            return
        if self._before is None:
            self._before = self._graph.call_function(torch.is_grad_enabled)
            self._graph.call_function(SET_GRAD, (False,))
        else:
            self._graph.call_function(SET_GRAD, (self._before,))
            self._before = None

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Add a call that autograd records."""
        self._grad(True)
        return self._graph.call_function(function, args)

    def arguments(self, value: Any) -> Any:
        """Return arguments of the model's graph as those of this one."""
        if isinstance(value, fx.Node):
            return self._node(value)
        if isinstance(value, SymbolicSize):
            return self._number(value)
        if isinstance(value, DeviceRef):
            return self._cached(value, "call_function", getattr, self._first, "device")
        if isinstance(value, slice):
            return slice(*map(self.arguments, (value.start, value.stop, value.step)))
        parts = parts_of(value)
        if parts is None:
            return value if is_spelled(value) else self._call(Bound(the_value, (value,)))
        keys, arguments = [key for key, _ in parts], [self.arguments(part) for _, part in parts]
        template = filled(value, arguments)
        if isinstance(template, Built):
            return self._call(Bound(built, (template.kind, keys)), arguments)
        if isinstance(template, dict) and not all(map(is_spelled, keys)):
            return self._call(Bound(built, (dict, keys)), arguments)
        return template

    def _node(self, node: fx.Node) -> fx.Node:
        value = value_of(node)
        if value is not None:
            return self.value(value)
        name = str(node.target)
        if node.op == "placeholder":
            return self.input(name)
        if is_constant(node):
            constant = self._flow.trace.constants[int(name.removeprefix(CONSTANT.format("")))]
            if name not in self._constants:
                self._constants[name] = constant.clone()  # each block has its own
        elif name not in self._weights:
            tensor = _tensor(self._model, name)
            self._weights[name] = tensor.clone() if self._flow.steady(name) else tensor
        return self._cached(name, "get_attr", name)

    def input(self, name: str) -> fx.Node:
        """Return what a parent sends: another block, or the stream."""
        if name not in self._inputs:
            node = self._graph.placeholder(name)
            node.target = node.name  # (a name of Python's)
            self._inputs[name] = node
            self._first.prepend(node)
        return self._inputs[name]

    def _cached(self, key: object, op: str, target: Any, *args: Any) -> fx.Node:
        """Return the node of this key; it is in the graph once."""
        if key not in self._cache:
            self._cache[key] = self._graph.create_node(op, target, args)
        return self._cache[key]

    def _number(self, size: SymbolicSize) -> Any:
        """Return per * B + more + the sum of (a + b * B) * length."""
        batch = self._cached("", "call_method", "size", self._first, 0)
        terms: list[Any] = [self._product(batch, size.per)] if size.per else []
        for dim, a, b in size.lengths:
            length = self._cached(dim, "call_method", "size", self.input(dim.name), dim.axis)
            terms += [self._product(length, a)] if a else []
            terms += [self._product(self._product(length, batch), b)] if b else []
        terms += [size.more] if size.more or not terms else []
        total = terms[0]
        for term in terms[1:]:
            total = self._cached((total, term), "call_function", operator.add, total, term)
        return total

    def _product(self, a: fx.Node, b: fx.Node | int) -> fx.Node:
        return a if b == 1 else self._cached((a, b, "*"), "call_function", operator.mul, a, b)

    def value(self, value: Value) -> fx.Node:
        """Return a result of an op, by a call here or out of what another block sends."""
        i, path = value
        home = self._home.get(i)
        out = self._leaving.get(home or "", ())
        inside = home == self._name or i in self._flow.free
        repeated = (home is None and i in self._flow.pure) or value not in out
        if inside or repeated:
            return self._part(self.emit(i), i, path)
        if value not in self._values:
            received = self._received(value, out)
            if self._written & self._flow.ops[i].memory:  # here, and not where it came from
                self._grad(True)
                received = self._graph.call_method("clone", (received,))
            self._values[value] = received
        return self._values[value]

    def _part(self, node: fx.Node, i: int, path: Path) -> fx.Node:
        if not path:
            return node
        if (i, path) not in self._values:
            whole, key = self._part(node, i, path[:-1]), path[-1]
            key = key if is_spelled(key) else self._call(Bound(the_value, (key,)))
            self._values[i, path] = self._graph.call_function(getter(key), (whole, key))
        return self._values[i, path]

    def _received(self, value: Value, out: Sequence[Value]) -> fx.Node:
        """Return a value from another block."""
        sender = self.input(self._home[value[0]])
        forms = [self._flow.form(v) for v in out]
        if len(out) == 1 and forms[0].batch_first:
            return sender
        at = list(out).index(value)
        before, dims = self.arguments(([(f.free, _dims(f)) for f in forms[:at]], _dims(forms[at])))
        dtype = forms[at].dtype if len({f.dtype for f in forms}) > 1 else None
        return self._call(Bound(unpacked, (forms[at], dtype)), sender, before, dims)


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), last)
    return tensor


def _dims(form: ColumnForm) -> tuple[int | SymbolicSize, ...]:
    """Return the dimensions, with numbers for those that never change."""
    return tuple(d if d.batched or d.lengths else d.more for d in form.dims or ())
