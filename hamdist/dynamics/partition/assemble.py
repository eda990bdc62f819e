"""Assembles blocks from the runs of steps between cuts.

Several values that leave one block go as columns of one signal, and each reader takes its own out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from hamdist.dynamics.graph.graph import BlockSpec, Combine, Graph
from hamdist.dynamics.objective.losses import LossFunction, model_loss
from hamdist.dynamics.tracing.dataflow import Flow, references
from hamdist.dynamics.tracing.program import (
    CONSTANT,
    DeviceRef,
    Path,
    SymbolicSize,
    Value,
    is_constant,
    value_of,
)
from hamdist.dynamics.tracing.signal_columns import ColumnForm, packed, unpacked
from hamdist.dynamics.tracing.traced_module import (
    SET_GRAD,
    WHOLE,
    Bound,
    TracedModule,
    is_spelled,
    the_value,
)
from hamdist.dynamics.user_modules.structure import Built, built, getter
from hamdist.errors import GraphError


@dataclass(frozen=True, slots=True)
class OperationRun:
    """Neighbouring ops, by number, that become the block `name`; the output that it predicts."""

    name: str
    ops: tuple[int, ...]
    output: int | None = None


def assembled(
    flow: Flow,
    model: nn.Module,
    runs: Sequence[OperationRun],
    losses: Sequence[LossFunction],
    inputs: Sequence[str],
    *,
    delay: int,
    state_readout: bool,
) -> Graph:
    """Return the graph of `runs`, over the parts of `model` themselves.

    losses: by output; inputs: by name, as parents have it.
    """
    home = {i: run.name for run in runs for i in run.ops}
    readouts = {run.output: run.name for run in runs if run.output is not None}
    leaving: dict[str, list[Value]] = {run.name: [] for run in runs}
    for run in runs:
        for value in _outer(flow, run, home):
            if value not in leaving[home[value[0]]]:
                leaving[home[value[0]]].append(value)
    blocks = []
    for run in runs:
        made = _Builder(flow, model, run, home, leaving, losses)
        parents = made.build(inputs)
        between = [p for p in parents if p in leaving]
        predicts = run.output is not None and readouts[run.output] == run.name
        blocks.append(
            BlockSpec(
                name=run.name,
                module=made.piece(),
                parents=tuple(parents),
                combine=Combine.ARGUMENTS,
                delays=dict.fromkeys(between, delay),
                loss=losses[run.output or 0] if predicts else None,
                state=predicts and state_readout,
            )
        )
    return Graph(blocks, original=model)


def _outer(flow: Flow, run: OperationRun, home: Mapping[int, str]) -> list[Value]:
    """Return the values of other runs that a run reads, in order."""
    found = [
        value
        for i in run.ops
        for value in references(flow.ops[i])
        if home.get(value[0], run.name) != run.name and value[0] not in flow.free
    ]
    if run.output is not None:
        value = flow.outputs[run.output]
        if home[value[0]] != run.name:
            found.append(value)
    return list(dict.fromkeys(found))


class _Builder:
    """One block under construction: its graph and all that it holds.

    parts, weights: of the model, by dotted name; constants: by their names in a `TracedModule`.
    """

    def __init__(
        self,
        flow: Flow,
        model: nn.Module,
        run: OperationRun,
        home: Mapping[int, str],
        leaving: Mapping[str, Sequence[Value]],
        losses: Sequence[LossFunction],
    ) -> None:
        self.flow, self.model, self.run = flow, model, run
        self.home, self.leaving, self.losses = home, leaving, losses
        self.parts: dict[str, nn.Module] = {}
        self.weights: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self._graph = fx.Graph()
        self._first = self._graph.placeholder("first")  # stands for the first of the parents
        self._inputs: dict[str, fx.Node] = {}
        self._made: dict[int, fx.Node] = {}  # by op
        self._values: dict[Value, fx.Node] = {}  # parts of what ops return, and of other blocks
        self._once: dict[object, fx.Node] = {}  # weights, the device, the batch, sums with it
        self._before: fx.Node | None = None  # True if autograd records; None where it does

    def build(self, inputs: Sequence[str]) -> list[str]:
        """Fill the graph; return the parents, blocks first."""
        for i in self.run.ops:
            self._emit(i)
        out = self.leaving[self.run.name]
        if self.run.output is not None:
            result = self._predict(self.run.output)
        elif len(out) == 1 and self.flow.form(out[0]).batch_first:
            result = self._value(out[0])
        else:
            result = self._packed([self._value(v) for v in out], map(self.flow.form, out))
        self._grad(True)
        self._graph.output(result)
        parents = [p for p in (*self.leaving, *inputs) if p in self._inputs] or list(inputs[:1])
        for name in reversed(parents):
            next(iter(self._graph.nodes)).prepend(self._input(name))
        self._first.replace_all_uses_with(self._inputs[parents[0]])
        self._graph.erase_node(self._first)
        return parents

    def _predict(self, output: int) -> fx.Node:
        """Return the output of a readout; a model's own loss is repeated for each row."""
        value = self.flow.outputs[output]
        result = self._value(value)
        if self.losses[output] is not model_loss:
            return result
        form = self.flow.form(value)
        if form.dims != ():
            raise GraphError(
                "loss 'model' learns one number that the model computes itself, and the output is "
                "more than that: give the stream's targets a loss, such as 'cross-entropy'"
            )
        return self._packed([result], [form])

    def _packed(self, values: list[fx.Node], forms: Iterable[ColumnForm]) -> fx.Node:
        batch = self._number(SymbolicSize(1))
        return self._call(Bound(packed, (tuple(forms),)), batch, values)

    def piece(self) -> TracedModule:
        ops = [self.flow.ops[i] for i in self._made]
        origins = [self.flow.trace.origin.get(m) for op in ops for m in op.writes]
        names = {n for n, _ in self.model.named_buffers(remove_duplicate=False)}
        return TracedModule(
            self._graph,
            parts=self.parts,
            weights=self.weights,
            persistent=frozenset(names & self.model.state_dict().keys()),
            constants=self.constants,
            draws=any(op.random and op.node.op != "call_module" for op in ops),
            writes=any(isinstance(o, fx.Node) and o.op == "placeholder" for o in origins),
        )

    def _emit(self, i: int) -> fx.Node:
        """Return the result of op i, which is added to the graph unless it is there."""
        made = self._made.get(i)
        if made is not None:
            return made
        for before in sorted(self.flow.needs[i] & self.flow.free):  # what writes to what it reads
            self._emit(before)
        op = self.flow.ops[i]
        args, kwargs = self._arguments(op.node.args), self._arguments(op.node.kwargs)
        target = op.node.target
        if op.node.op == "call_module":
            self.parts[str(target)] = self.model.get_submodule(str(target))
            target = target or WHOLE
        self._grad(op.grad)
        self._made[i] = self._graph.create_node(op.node.op, target, args, kwargs)
        return self._made[i]

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

    def _arguments(self, value: Any) -> Any:
        """Return arguments of the model's graph as those of this one."""
        if isinstance(value, Built):
            keys, parts = [key for key, _ in value.parts], [part for _, part in value.parts]
            return self._call(Bound(built, (value.kind, keys)), self._arguments(parts))
        if isinstance(value, dict) and not all(map(is_spelled, value)):
            return self._call(Bound(built, (dict, [*value])), self._arguments([*value.values()]))
        if isinstance(value, dict):
            return {key: self._arguments(part) for key, part in value.items()}
        if isinstance(value, tuple):
            return tuple(map(self._arguments, value))
        if isinstance(value, list):
            return list(map(self._arguments, value))
        if isinstance(value, slice):
            return slice(*map(self._arguments, (value.start, value.stop, value.step)))
        if isinstance(value, fx.Node):
            return self._node(value)
        if isinstance(value, SymbolicSize):
            return self._number(value)
        if isinstance(value, DeviceRef):
            return self._found(value, "call_function", getattr, self._first, "device")
        return value if is_spelled(value) else self._call(Bound(the_value, (value,)))

    def _node(self, node: fx.Node) -> fx.Node:
        value = value_of(node)
        if value is not None:
            return self._value(value)
        name = str(node.target)
        if node.op == "placeholder":
            return self._input(name)
        if is_constant(node):
            constant = self.flow.trace.constants[int(name.removeprefix(CONSTANT.format("")))]
            if name not in self.constants:
                self.constants[name] = constant.clone()  # each block has its own
        elif name not in self.weights:
            own = _tensor(self.model, name)
            self.weights[name] = own.clone() if self.flow.steady(name) else own
        return self._found(name, "get_attr", name)

    def _input(self, name: str) -> fx.Node:
        if name not in self._inputs:
            node = self._graph.placeholder(name)
            node.target = node.name  # (a name of Python's)
            self._inputs[name] = node
            self._first.prepend(node)
        return self._inputs[name]

    def _found(self, key: object, op: str, target: Any, *args: Any) -> fx.Node:
        """Return the node of this key, which is made once."""
        if key not in self._once:
            self._once[key] = self._graph.create_node(op, target, args)
        return self._once[key]

    def _number(self, size: SymbolicSize) -> Any:
        """Return per * B + more + the sum of (a + b * B) * length."""
        batch = self._found("", "call_method", "size", self._first, 0)
        terms: list[Any] = [self._product(batch, size.per)] if size.per else []
        for one, a, b in size.lengths:
            length = self._found(one, "call_method", "size", self._input(one.name), one.axis)
            terms += [self._product(length, a)] if a else []
            terms += [self._product(self._product(length, batch), b)] if b else []
        terms += [size.more] if size.more or not terms else []
        total = terms[0]
        for term in terms[1:]:
            total = self._found((total, term), "call_function", operator.add, total, term)
        return total

    def _product(self, a: fx.Node, b: fx.Node | int) -> fx.Node:
        return a if b == 1 else self._found((a, b, "*"), "call_function", operator.mul, a, b)

    def _value(self, value: Value) -> fx.Node:
        i, path = value
        home = self.home.get(i)
        out = self.leaving.get(home or "", ())
        own = home == self.run.name or i in self.flow.free
        if own or (home is None and i in self.flow.pure) or value not in out:  # made here (again)
            return self._part(self._emit(i), i, path)
        if value not in self._values:
            taken = self._taken(value, out)
            if self._is_written(value):  # here, and not where it came from
                self._grad(True)
                taken = self._graph.call_method("clone", (taken,))
            self._values[value] = taken
        return self._values[value]

    def _part(self, node: fx.Node, i: int, path: Path) -> fx.Node:
        if not path:
            return node
        if (i, path) not in self._values:
            whole, key = self._part(node, i, path[:-1]), path[-1]
            key = key if is_spelled(key) else self._call(Bound(the_value, (key,)))
            self._values[i, path] = self._graph.call_function(getter(key), (whole, key))
        return self._values[i, path]

    def _is_written(self, value: Value) -> bool:
        written = {m for i in self.run.ops for m in self.flow.ops[i].writes}
        return bool(written & self.flow.ops[value[0]].memory)

    def _taken(self, value: Value, out: Sequence[Value]) -> fx.Node:
        """Return a value from another block."""
        sender = self._input(self.home[value[0]])
        forms = [self.flow.form(v) for v in out]
        if len(out) == 1 and forms[0].batch_first:
            return sender
        at = list(out).index(value)
        before, dims = self._arguments(([(f.free, _dims(f)) for f in forms[:at]], _dims(forms[at])))
        own = forms[at].dtype if len({f.dtype for f in forms}) > 1 else None
        return self._call(Bound(unpacked, (forms[at], own)), sender, before, dims)


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), last)
    return found


def _dims(form: ColumnForm) -> tuple[int | SymbolicSize, ...]:
    """Return the dimensions, with numbers for those that never change."""
    return tuple(d if d.batched or d.lengths else d.more for d in form.dims or ())
