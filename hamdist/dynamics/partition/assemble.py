"""Assembles blocks from the runs of steps between cuts.

Several values that leave one block go as columns of one signal, and each reader takes its own out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hamdist.dynamics.graph.graph import BlockSpec, Combine, Graph
from hamdist.dynamics.objective.losses import LossFunction, model_loss
from hamdist.dynamics.tracing.dataflow import Flow, Value, references
from hamdist.dynamics.tracing.signal_columns import ColumnForm, packed, unpacked
from hamdist.dynamics.tracing.traced_module import (
    FUNCTION,
    METHOD,
    MODULE,
    Arg,
    ConstantRef,
    SymbolicSize,
    Template,
    TracedModule,
    TracedStep,
    ValueRef,
    WeightRef,
    replaced,
)
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
        builder = _Builder(flow, model, run, home, leaving, losses)
        parents = builder.build(inputs)
        between = [p for p in parents if p in leaving]
        predicts = run.output is not None and readouts[run.output] == run.name
        blocks.append(
            BlockSpec(
                name=run.name,
                module=builder.piece(parents),
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
    values = [
        (ref.step, ref.path)
        for i in run.ops
        for ref in references(flow.ops[i])
        if home.get(ref.step, run.name) != run.name and ref.step not in flow.free
    ]
    if run.output is not None:
        value = flow.outputs[run.output]
        if home[value[0]] != run.name:
            values.append(value)
    return list(dict.fromkeys(values))


@dataclass(slots=True)
class _Builder:
    """One block under construction: its program and all that it holds."""

    flow: Flow
    model: nn.Module
    run: OperationRun
    home: Mapping[int, str]
    leaving: Mapping[str, Sequence[Value]]
    losses: Sequence[LossFunction]
    program: list[TracedStep] = field(default_factory=list)
    output: Template = None
    parts: dict[str, nn.Module] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    _made: dict[int, int] = field(default_factory=dict)
    _taken: dict[Value, Template] = field(default_factory=dict)
    _inputs: set[str] = field(default_factory=set)

    def build(self, inputs: Sequence[str]) -> list[str]:
        """Fill the program; return the parents, blocks first."""
        for i in self.run.ops:
            self._emit(i)
        out = self.leaving[self.run.name]
        if self.run.output is not None:
            self._predict(self.run.output)
        elif len(out) == 1 and self.flow.form(out[0]).batch_first:
            self.output = self._ref(ValueRef(*out[0]))
        else:
            forms = [self.flow.form(value) for value in out]
            sent = [self._ref(ValueRef(*value)) for value in out]
            self._add(TracedStep(FUNCTION, packed, (SymbolicSize(1), sent, forms)))
            self.output = ValueRef(len(self.program) - 1)
        blocks = [name for name in self.leaving if name in self._inputs]
        known = [name for name in inputs if name in self._inputs]
        return [*blocks, *known] or list(inputs[:1])

    def _predict(self, output: int) -> None:
        """Add the output of a readout; a model's own loss is repeated for each row."""
        value = self.flow.outputs[output]
        self.output = self._ref(ValueRef(*value))
        if self.losses[output] is not model_loss:
            return
        form = self.flow.form(value)
        if form.dims != ():
            raise GraphError(
                "loss 'model' learns one number that the model computes itself, and the output is "
                "more than that: give the stream's targets a loss, such as 'cross-entropy'"
            )
        self._add(TracedStep(FUNCTION, packed, (SymbolicSize(1), [self.output], [form])))
        self.output = ValueRef(len(self.program) - 1)

    def piece(self, parents: Sequence[str]) -> TracedModule:
        ops = [self.flow.ops[i] for i in self._made]
        origin = self.flow.trace.origin
        names = {n for n, _ in self.model.named_buffers(remove_duplicate=False)}
        return TracedModule(
            parents,
            self.program,
            self.output,
            parts=self.parts,
            weights=self.weights,
            persistent=frozenset(names & self.model.state_dict().keys()),
            constants=self.constants,
            draws=any(op.random and op.step.kind != MODULE for op in ops),
            writes=any(isinstance(origin.get(m), Arg) for op in ops for m in op.writes),
        )

    def _add(self, step: TracedStep) -> int:
        self.program.append(step)
        return len(self.program) - 1

    def _emit(self, i: int) -> int:
        """Add op i to the program; return its place there."""
        emitted = self._made.get(i)
        if emitted is not None:
            return emitted
        for before in sorted(self.flow.needs[i] & self.flow.free):  # what writes to what it reads
            self._emit(before)
        step = self.flow.ops[i].step
        args = replaced(step.args, self._place)
        kwargs = replaced(step.kwargs, self._place)
        if step.kind == MODULE:
            self.parts[step.target] = self.model.get_submodule(step.target)
        self._made[i] = self._add(TracedStep(step.kind, step.target, args, kwargs, step.grad))
        return self._made[i]

    def _place(self, place: Any) -> Template:
        if isinstance(place, ValueRef):
            return self._ref(place)
        if isinstance(place, Arg):
            self._inputs.add(place.name)
        elif isinstance(place, SymbolicSize):
            self._inputs.update(one.name for one, _, _ in place.lengths)
        elif isinstance(place, WeightRef):
            if place.name not in self.weights:
                tensor = _tensor(self.model, place.name)
                self.weights[place.name] = (
                    tensor.clone() if self.flow.steady(place.name) else tensor
                )
        elif isinstance(place, ConstantRef):
            constant = self.flow.trace.constants[place.index]
            self.constants.setdefault(place.index, constant.clone())  # each block has its own
        return place

    def _ref(self, ref: ValueRef) -> Template:
        i = ref.step
        is_here = self.home.get(i) == self.run.name
        if is_here or i in self.flow.free or (i in self.flow.pure and i not in self.home):
            return ValueRef(self._emit(i), ref.path)
        value = (i, ref.path)
        out = self.leaving[self.home[i]]
        if value not in out:  # read by what is made here again alone
            return ValueRef(self._emit(i), ref.path)
        if value not in self._taken:
            column = self._take(value, out)
            if self._is_written(value):  # here, and not where it came from
                column = ValueRef(self._add(TracedStep(METHOD, "clone", (column,))))
            self._taken[value] = column
        return self._taken[value]

    def _is_written(self, value: Value) -> bool:
        written = {m for i in self.run.ops for m in self.flow.ops[i].writes}
        return bool(written & self.flow.ops[value[0]].memory)

    def _take(self, value: Value, out: Sequence[Value]) -> Template:
        """Return the template of a value from another block."""
        sender = self.home[value[0]]
        self._inputs.add(sender)
        forms = [self.flow.form(v) for v in out]
        if len(out) == 1 and forms[0].batch_first:
            return Arg(sender)
        at = list(out).index(value)
        before, dims = replaced(
            ([(f.free, _dims(f)) for f in forms[:at]], _dims(forms[at])), self._place
        )
        dtype = forms[at].dtype if len({f.dtype for f in forms}) > 1 else None
        return ValueRef(
            self._add(TracedStep(FUNCTION, unpacked, (Arg(sender), before, dims, forms[at], dtype)))
        )


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), last)
    return tensor


def _dims(form: ColumnForm) -> tuple[int | SymbolicSize, ...]:
    """Return the dimensions, with numbers for those that never change."""
    return tuple(d if d.batched or d.lengths else d.more for d in form.dims or ())
