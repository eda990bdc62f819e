"""A model as a list of steps for any batch.

It runs three times, each time with another batch (recorder.py), and where samples may have lengths
of their own, with other lengths, too. The runs have to take the same steps; a whole number that
differs is the batch times something, plus something (program.py). A submodule
that cannot be traced, or does other things at another batch, stays whole, as one step.
B: batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from posixpath import commonpath
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from hamdist.dynamics.tracing.join_runs import (
    Trace,
    batches_of_runs,
    joined_runs,
    other_length,
    points_of_runs,
    trace_of,
)
from hamdist.dynamics.tracing.program import ColumnForm, Length, Op, SymbolicSize, TakenOp
from hamdist.dynamics.tracing.recorded_calls import OWN, Unfollowed, watch
from hamdist.dynamics.tracing.recorder import record
from hamdist.dynamics.user_modules.copies import copied
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.dynamics.user_modules.python_state import (
    Fingerprints,
    inside,
    is_foreign,
    mutable_in,
    names_in,
)

NOTHING: Mapping[Length, int] = {}
Call: TypeAlias = Callable[[nn.Module, Mapping[str, Tensor]], Any]  # runs a model on inputs


def trace(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    call: Call,
    *,
    ragged: bool = False,
    packages: tuple[str, ...] = OWN,
) -> Trace:
    """Return the steps of `model` on `inputs` (examples, (B, ...), by name); it stays as it is.

    ragged: samples may have lengths of their own, which is tried; where the model does not take
    them, or cannot be traced then, `Trace.one_length` has the reason. packages: those whose modules
    are one step. Raises Unfollowed where its own forward cannot be traced.
    """
    probe = copied(model)
    whole = watch(probe, packages)
    why = None
    if ragged:
        try:
            with generator_kept():
                lengths = _lengths(probe, inputs, call)
            if lengths:
                return _followed(probe, inputs, call, dict(whole), lengths)
            why = "no dimension behind the batch may have another size"
        except Unfollowed as failure:
            why = f"{failure.reason} {failure.line}".strip()
    followed = _followed(probe, inputs, call, whole, ())
    followed.one_length = why
    return followed


def _followed(
    probe: nn.Module,
    inputs: Mapping[str, Tensor],
    call: Call,
    whole: dict[str, Unfollowed],
    lengths: Sequence[Length],
) -> Trace:
    while True:
        try:
            with generator_kept(), torch.enable_grad(), warnings.catch_warnings():
                # (what follows from that is said as `Unfollowed`, with the user's own line)
                warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
                return _traced(probe, inputs, call, whole, lengths)
        except Unfollowed as why:
            if not why.module or why.module in whole:
                raise
            whole[why.module] = why


def traced_whole(
    model: nn.Module, inputs: Mapping[str, Tensor], call: Call, why: Unfollowed
) -> Trace:
    """Return the whole model as one step, run on `inputs` as they are: its rows may be no batch.

    Raises Unfollowed where it does not take them, or returns more than tensors.
    """
    probe = copied(model)
    watch(probe)
    with generator_kept(), torch.enable_grad():
        run = record(probe, {name: u.clone() for name, u in inputs.items()}, call, {""})
    batch = next(iter(inputs.values())).shape[0]
    ops = [_of_one_run(op, batch) for op in run.ops]
    if why.reason.startswith("it raised"):  # and now it did not
        reason = f"with other rows {why.reason}, so its rows are no batch"
        why = Unfollowed(reason, "", why.line)
    return Trace(run.graph, run.constants, run.origin, ops, {"": why})


def chain_of_children(model: nn.Sequential, name: str) -> Trace:
    """Return the children of `model` as steps, which are not run; name: of its input.

    Nothing is known of a child but its weights, so each counts as one that draws random numbers,
    which no other block may repeat, and that returns a batch of real numbers.
    """
    graph = fx.Graph()
    node, form = graph.placeholder(name), ColumnForm((SymbolicSize(1),), torch.float32)
    ops: list[Op[ColumnForm]] = []
    for child, module in model._modules.items():
        if module is not None:
            node = graph.create_node("call_module", child, (node,))
            node.meta["value"] = (len(ops), ())
            ops.append(
                Op(
                    node, grad=True, where="", line="", modules=(), out={(): form},
                    nodes={(): node}, random=True, varies=True, reads=set(), writes=set(),
                    memory=set(),
                )
            )  # fmt: skip
    graph.output(node)
    return Trace(graph, [], {}, ops, {})


def _of_one_run(op: TakenOp, batch: int) -> Op[ColumnForm]:
    """Return an op known from one run only: an axis of the input's rows counts as the batch."""
    forms = {}
    for path, t in op.out.items():
        dims = [SymbolicSize(0, size) for size in t.shape]
        if t.dim() and t.shape[0] == batch:
            dims[0] = SymbolicSize(1)
        forms[path] = ColumnForm(tuple(dims), t.dtype)
    return replace(op, out=forms)  # type: ignore[arg-type,return-value]


def _traced(
    probe: nn.Module,
    inputs: Mapping[str, Tensor],
    call: Call,
    whole: dict[str, Unfollowed],
    lengths: Sequence[Length],
) -> Trace:
    batches = batches_of_runs(inputs)
    names = set(whole)
    record(probe, _rows(inputs, batches[0], 0), call, names)  # what it makes at its first call only
    runs = []
    points = points_of_runs(batches, lengths)
    for run, (batch, sizes) in enumerate(points):
        state = _state(probe, names)
        runs.append(record(probe, _rows(inputs, batch, run, sizes), call, names))
        _check_state(probe, state, _state(probe, names))
    joined = joined_runs(runs, points)
    one_row = None
    if all(batch > 1 for batch, _ in points):
        try:
            alone = record(probe, _rows(inputs, 1, 0), call, names)
            joined_runs([runs[0], alone, *runs[1:]], [points[0], (1, {}), *points[1:]])
        except Unfollowed as why:  # (a model that fails with one row does so anywhere)
            if not why.reason.startswith("it raised"):
                one_row = f"{why.reason} {why.line}".strip()
    return trace_of(runs[0], joined, whole, one_row)


def _lengths(probe: nn.Module, inputs: Mapping[str, Tensor], call: Call) -> list[Length]:
    """Return the dimensions of the inputs that may be shorter: each is tried.

    Inputs of one size along an axis change together.
    """
    lengths: dict[tuple[int, int], Length] = {}
    for name, u in inputs.items():
        for axis in range(1, u.dim()):
            lengths.setdefault((axis, u.shape[axis]), Length(name, axis, u.shape[axis]))
    used = []
    batch = next(iter(inputs.values())).shape[0]
    for dim in lengths.values():
        try:
            record(probe, _rows(inputs, batch, 0, {dim: other_length(dim, 1)}), call, {""})
        except Unfollowed:
            continue
        used.append(dim)
    return used


def _rows(
    inputs: Mapping[str, Tensor], batch: int, run: int, sizes: Mapping[Length, int] = NOTHING
) -> dict[str, Tensor]:
    """Return inputs with another batch, other lengths, and other values in every run."""
    inputs_of_run = {}
    for name, u in inputs.items():
        rows = u[torch.arange(batch) % u.shape[0]]
        for dim, size in sizes.items():
            if dim.axis < u.dim() and u.shape[dim.axis] == dim.base:
                rows = rows.index_select(dim.axis, torch.arange(size) % dim.base)
        if rows.is_floating_point():
            rows = (rows * (1 + run / 8)).requires_grad_().clone()
        inputs_of_run[name] = rows
    return inputs_of_run


# -- what the model keeps ------------------------------------------------------------------------


def _state(model: nn.Module, whole: set[str]) -> dict[str, tuple[Fingerprints, Fingerprints]]:
    """Return the Python state of a user's modules, without those that stay whole, and what they
    have registered.
    """
    states = {}
    for name, part in model.named_modules():
        inner = any(name == w or name.startswith(f"{w}.") for w in whole)
        if is_foreign(type(part)) and not inner:
            state = inside(part)
            for key, value in vars(type(part)).items():  # the class that `watch` has made
                if not key.startswith("__"):
                    state.add(key, value)
            states[name] = state, _registered(part)
    return states


def _registered(part: nn.Module) -> Fingerprints:
    """Read which tensors a module has by name, and its weights, buffers and submodules themselves.

    (A tensor in the place of another is no change: a later run cannot read it unrecorded.)
    """
    values = Fingerprints()
    for name, value in vars(part).items():
        if isinstance(value, (Tensor, nn.Module)):
            values.add(name, isinstance(value, Tensor) or value)
    for name in ("parameters", "buffers", "modules"):
        values.add(name, list(getattr(part, f"_{name}").items()))
    return values


def _check_state(
    model: nn.Module,
    before: Mapping[str, tuple[Fingerprints, Fingerprints]],
    after: Mapping[str, tuple[Fingerprints, Fingerprints]],
) -> None:
    """Raise Unfollowed where a run has left something behind for the next one.

    For Python state it names the module that has it, or one around all that use it.
    """
    for name, (values, registered) in after.items():
        changed = before[name][0].differing(values)
        if not changed:
            for part in before[name][1].differing(registered):
                raise Unfollowed(f"its forward changes {part!r} of the module", name, "")
            continue
        attributes = vars(model.get_submodule(name))
        mutable = mutable_in(attributes[n] for n in changed if n in attributes)
        users = [name]
        for other, (held, _) in after.items():
            reads = names_in(model.get_submodule(other)) & {*changed} - held.marks.keys()
            if other != name and (mutable & held.ids.keys() or reads):
                users.append(other)
        around = commonpath([user.replace(".", "/") for user in users]).replace("/", ".")
        reason = f"its forward changes {changed[0]!r}, which is Python state"
        raise Unfollowed(reason, around, "")
