"""Joins three runs of a model, at other batches and lengths, into one program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from hamdist.dynamics.finite import LARGE
from hamdist.dynamics.tracing.program import (
    CONSTANT,
    ColumnForm,
    Length,
    Op,
    Recording,
    SymbolicSize,
    TakenOp,
    TracedProgram,
    is_constant,
    value_of,
)
from hamdist.dynamics.tracing.recorded_calls import Unfollowed
from hamdist.dynamics.user_modules.structure import filled, parts_of

TracePoint: TypeAlias = tuple[int, Mapping[Length, int]]  # a batch, and lengths that differ


MOST_BATCH = 8  # of the stream's own batch, which the first run has up to here


def points_of_runs(batches: Sequence[int], lengths: Sequence[Length]) -> list[TracePoint]:
    """Return the batches and lengths of the runs by which the joined program is determined.

    They show how numbers depend on the batch and on each length; one more run checks that.
    """
    first, second, third, *_ = batches
    points: list[TracePoint] = [(batch, {}) for batch in batches]
    for dim in lengths:
        points += [(first, {dim: other_length(dim, 1)}), (second, {dim: other_length(dim, 2)})]
    return [*points, (third, {dim: other_length(dim, 1) for dim in lengths})] if lengths else points


def other_length(length: Length, by: int) -> int:
    """Return another length: a shorter one, where that leaves two."""
    return length.base - by if length.base - by > 1 else length.base + by


def batches_of_runs(inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return three small batches; behind them that of the stream, where it is larger."""
    rows = next(iter(inputs.values())).shape[0]
    first = min(rows, MOST_BATCH)
    return (*(first, *(b for b in BATCHES if b != first))[:3], *([rows] if rows > first else []))


class _Apart(Exception):
    """Two runs differ."""


@dataclass(slots=True)
class JoinedRuns:
    """Common form of several runs: by step its arguments and results, and the output."""

    calls: list[tuple[Any, Any]]
    ops: list[Op[ColumnForm]]
    output: Any


def joined_runs(runs: Sequence[Recording], points: Sequence[TracePoint]) -> JoinedRuns:
    """Return what the runs have in common; raise Unfollowed where they take other steps."""
    join = _Join(runs, points)
    joined = JoinedRuns([], [], None)
    for ops in zip(*(r.ops for r in runs), strict=False):
        try:
            joined.ops.append(join.op(ops))
            joined.calls.append(join.call(ops))
        except _Apart as why:
            raise Unfollowed(f"at another batch {why}", ops[0].where, ops[0].line) from None
    lengths = {len(r.ops) for r in runs}
    if len(lengths) > 1:
        longest = max(runs, key=lambda r: len(r.ops)).ops[min(lengths)]
        raise Unfollowed("at another batch it takes more steps", longest.where, longest.line)
    try:
        joined.output = join.template([r.output for r in runs])
    except _Apart as why:
        raise Unfollowed(f"at another batch its output: {why}", "", "") from None
    return joined


class _Join:
    def __init__(self, runs: Sequence[Recording], points: Sequence[TracePoint]) -> None:
        self._runs = runs
        self._points = points
        self._lengths = list(points[-1][1])
        rows = []
        for batch, sizes in points:
            lengths = [sizes.get(dim, dim.base) for dim in self._lengths]
            rows.append([1, batch, *lengths, *(batch * length for length in lengths)])
        self._basis = torch.tensor(rows, dtype=torch.float64)
        self._solves = torch.linalg.pinv(self._basis)
        self._sizes: dict[tuple[int, ...], SymbolicSize] = {}

    def op(self, ops: Sequence[TakenOp]) -> Op[ColumnForm]:
        first = ops[0]
        calls = {(t.node.op, t.node.target, t.grad, t.where) for t in ops}
        if len(calls) > 1:
            raise _Apart("it takes other steps")
        if any(t.out.keys() != first.out.keys() for t in ops):
            raise _Apart("it returns more or fewer tensors")
        fills = any(name in str(first.node.target) for name in ("masked_fill", "where"))
        mask = fills and not all(map(_ordinary, first.node.args))
        forms = {path: self._form([t.out[path] for t in ops], mask) for path in first.out}
        return replace(first, out=forms, random=any(t.random for t in ops))  # type: ignore[arg-type,return-value]

    def call(self, ops: Sequence[TakenOp]) -> tuple[Any, Any]:
        """Return the arguments of a step."""
        args, kwargs = ([t.node.args for t in ops], [t.node.kwargs for t in ops])
        return self.template(args), self.template(kwargs)

    def _form(self, tensors: Sequence[Tensor], mask: bool) -> ColumnForm:
        first = tensors[0]
        if any(t.dtype != first.dtype or t.dim() != first.dim() for t in tensors):
            raise _Apart("a tensor has another type, or more dimensions")
        try:
            dims = tuple(
                self._size(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)
            )
        except _Apart:
            return ColumnForm(None, first.dtype)
        return ColumnForm(dims, first.dtype, mask or not all(map(_ordinary, tensors)))

    def _size(self, values: tuple[int, ...]) -> SymbolicSize:
        """Return the number by batch and lengths, with which all runs have to agree."""
        if values not in self._sizes:
            self._sizes[values] = self._solved(values)
        return self._sizes[values]

    def _solved(self, values: tuple[int, ...]) -> SymbolicSize:
        lengths = len(self._lengths)
        sizes = torch.tensor(values, dtype=torch.float64)
        solution = (self._solves @ sizes).round()
        if not torch.equal(self._basis @ solution, sizes):
            numbers = ", ".join(map(str, values))
            batches = ", ".join(str(batch) for batch, _ in self._points)
            raise _Apart(f"a number is {numbers} where the batch is {batches}")
        more, per, *rest = map(int, solution.tolist())
        parts = zip(self._lengths, rest[:lengths], rest[lengths:], strict=True)
        return SymbolicSize(per, more, tuple((dim, a, b) for dim, a, b in parts if a or b))

    def template(self, values: Sequence[Any]) -> Any:
        first = values[0]
        kind = type(first)
        if any(type(v) is not kind for v in values):
            raise _Apart("it calls with values of other types")
        if kind is int:
            size = self._size(tuple(values))
            return size if size.batched or size.lengths else first
        if kind is fx.Node:
            if is_constant(first):
                self._check_constant(values)
            elif any(v.name != first.name for v in values):
                raise _Apart("it reads another tensor once, and not always")
            return first
        parts = [parts_of(v) or [] for v in values]
        if parts_of(first) is not None:
            if any([k for k, _ in part] != [k for k, _ in parts[0]] for part in parts):
                raise _Apart("it calls with more or fewer values")
            inner = zip(*([part for _, part in pairs] for pairs in parts), strict=True)
            return filled(first, [self.template(part) for part in inner])
        if kind is slice:
            parts = [[v.start for v in values], [v.stop for v in values], [v.step for v in values]]
            return slice(*(self.template(p) for p in parts))
        same = all(v is first or v == first or (v != v and first != first) for v in values)
        if not same:
            raise _Apart(f"it calls with {first!r:.40} once, and not always")
        return first

    def _check_constant(self, nodes: Sequence[fx.Node]) -> None:
        target = str(nodes[0].target)
        index = int(target.removeprefix(CONSTANT.format("")))
        first, *others = (r.constants[index] for r in self._runs if index < len(r.constants))
        if any(n.target != target for n in nodes) or any(
            t.shape != first.shape or t.dtype != first.dtype or not torch.equal(t, first)
            for t in others
        ):
            raise _Apart("it uses another tensor that no step of torch's has made")


def _ordinary(value: Any) -> bool:
    """Return True if it holds no number as large as only masks have."""
    if isinstance(value, Tensor):
        return not (value.is_floating_point() and bool(value.detach().abs().gt(LARGE).any()))
    return not (isinstance(value, float) and abs(value) > LARGE)


BATCHES = (2, 3, 5)


@dataclass(slots=True)
class Trace(TracedProgram):
    """A joined program, whose graph has constants for what is the same for every sample.

    ops: in the model's own order. whole: the modules that could not be traced, and why. one_length:
    the reason for which all samples have the lengths of the example, if that was open. one_row:
    what it does otherwise with a batch of one row.
    """

    ops: list[Op[ColumnForm]]
    whole: dict[str, Unfollowed]
    one_length: str | None = None
    one_row: str | None = None


def trace_of(
    run: Recording, joined: JoinedRuns, whole: dict[str, Unfollowed], one_row: str | None
) -> Trace:
    """Return a run with the arguments that all runs have in common; it is changed in place."""
    for op, (args, kwargs) in zip(joined.ops, joined.calls, strict=True):
        op.node.args, op.node.kwargs = args, kwargs
    run.end.args = (joined.output,)
    constants = [t.detach() for t in run.constants]
    trace = Trace(run.graph, constants, run.origin, joined.ops, whole, one_row=one_row)
    _fold(trace, run)
    return trace


def _fold(trace: Trace, run: Recording) -> None:
    """Put constants in place of values that are the same for every sample."""
    written = {m for op in trace.ops for m in op.writes}
    moving: set[int] = set()  # what depends on batch or lengths
    for k, (op, again) in enumerate(zip(trace.ops, run.ops, strict=True)):
        steady = not (op.varies or op.writes or op.memory & written)
        fixed = all(f.free and not any(d.lengths for d in f.dims or ()) for f in op.out.values())
        values = filter(None, map(value_of, op.node.all_input_nodes))
        if _has_length(op.node) or any(i in moving for i, _ in values):
            fixed = False
        if not fixed:
            moving.add(k)
        if steady and op.out and fixed:
            for path, tensor in again.out.items():
                with trace.graph.inserting_after(op.nodes[path]):
                    constant = trace.graph.get_attr(CONSTANT.format(len(trace.constants)))
                op.nodes[path].replace_all_uses_with(constant)
                trace.constants.append(tensor.detach().clone())


def _has_length(node: fx.Node) -> bool:
    lengths = []
    fx.node.map_aggregate(
        (node.args, node.kwargs),
        lambda v: lengths.append(v) if isinstance(v, SymbolicSize) and v.lengths else None,
    )
    return bool(lengths)
