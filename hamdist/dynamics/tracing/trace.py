"""A model as a list of steps for any batch.

It runs three times, each time with another batch (recording.py), and where items may have lengths
of their own, with other lengths, too. The runs have to take the same steps; a whole number that
differs is the batch times something, plus something (piece.py, `SymbolicSize`). A submodule that
cannot be followed, or does other things at another batch, stays whole, as one step.
B: batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from posixpath import commonpath
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hamdist.dynamics.state.finite import LARGE
from hamdist.dynamics.tracing.recorder import OWN, Op, Recording, TakenOp, Unfollowed, record, watch
from hamdist.dynamics.tracing.traced_module import (
    PLACES,
    ColumnForm,
    ConstantRef,
    Length,
    SymbolicSize,
    Template,
    TracedStep,
    ValueRef,
    places,
    replaced,
)
from hamdist.dynamics.user_modules.copies import copied
from hamdist.dynamics.user_modules.python_state import (
    Fingerprints,
    inside,
    is_foreign,
    mutable_in,
    names_in,
)
from hamdist.dynamics.user_modules.structure import filled, parts_of

BATCHES = (2, 3, 5)
NOTHING: Mapping[Length, int] = {}
Call: TypeAlias = Callable[[nn.Module, Mapping[str, Tensor]], Any]  # runs a model on inputs
TracePoint: TypeAlias = tuple[int, Mapping[Length, int]]  # a batch, and lengths that differ
MOST_BATCH = 8  # of the stream's own batch, which the first run has up to here


@dataclass(slots=True)
class Trace:
    """ops: in the model's own order. output: a template. constants: by index. origin: of memory (as
    in `Recording`). whole: the modules that could not be followed, and why. one_length: why all
    items have the lengths of the example, if that was open."""

    ops: list[Op[ColumnForm]]
    output: Template
    constants: list[Tensor]
    origin: dict[int, object]
    whole: dict[str, Unfollowed]
    one_length: str | None = None


def trace(
    model: nn.Module, inputs: Mapping[str, Tensor], call: Call, *, ragged: bool = False
) -> Trace:
    """What `model` does with `inputs` (examples, (B, ...), by name). The model stays as it is.

    ragged: items may have lengths of their own, which is tried; where the model does not take them,
    or cannot be followed then, `Trace.one_length` says why.
    Raises Unfollowed where it does something in its own forward that cannot be followed.
    """
    probe = copied(model)
    whole = watch(probe)
    why = None
    if ragged:
        try:
            with torch.random.fork_rng(devices=[]):
                lengths = _lengths(probe, inputs, call)
            if lengths:
                return _followed(probe, inputs, call, dict(whole), lengths)
            why = "no dimension behind the batch may have another size"
        except Unfollowed as failure:
            why = f"{failure.reason} {failure.line}".strip()
    made = _followed(probe, inputs, call, whole, ())
    made.one_length = why
    return made


def _followed(
    probe: nn.Module,
    inputs: Mapping[str, Tensor],
    call: Call,
    whole: dict[str, Unfollowed],
    lengths: Sequence[Length],
) -> Trace:
    while True:
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
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
    """The whole model as one step, which has run on `inputs` as they are: its rows may be no batch.

    Raises Unfollowed where it does not take them, or returns more than tensors.
    """
    probe = copied(model)
    watch(probe)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        run = record(probe, {name: u.clone() for name, u in inputs.items()}, call, {""})
    batch = next(iter(inputs.values())).shape[0]
    ops = [_of_one_run(op, batch) for op in run.taken]
    if why.reason.startswith("it raised"):  # and now it did not
        reason = f"with other rows {why.reason}, so its rows are no batch"
        why = Unfollowed(reason, "", why.line)
    return Trace(ops, run.output, run.constants, run.origin, {"": why})


def _of_one_run(op: TakenOp, batch: int) -> Op[ColumnForm]:
    """An op of which only this run is known: what has as many rows as the input has them, too."""
    forms = {}
    for path, t in op.out.items():
        dims = [SymbolicSize(0, size) for size in t.shape]
        if t.dim() and t.shape[0] == batch:
            dims[0] = SymbolicSize(1)
        forms[path] = ColumnForm(tuple(dims), t.dtype)
    return Op(
        op.step, op.where, op.line, op.modules, forms, op.random, op.varies, op.reads, op.writes,
        op.memory,
    )  # fmt: skip


def _traced(
    probe: nn.Module,
    inputs: Mapping[str, Tensor],
    call: Call,
    whole: dict[str, Unfollowed],
    lengths: Sequence[Length],
) -> Trace:
    batches = _batches(inputs)
    names = set(whole)
    record(probe, _rows(inputs, batches[0], 0), call, names)  # what it makes at its first call only
    before = _attributes(probe)
    runs = []
    points = _points(batches, lengths)
    for run, (batch, sizes) in enumerate(points):
        state = _state(probe, names)
        runs.append(record(probe, _rows(inputs, batch, run, sizes), call, names))
        _check_state(probe, state, _state(probe, names))
    _check_kept(probe, before, names)
    return _joined(runs, points, whole)


def _points(batches: Sequence[int], lengths: Sequence[Length]) -> list[TracePoint]:
    """The runs that tell how numbers depend on the batch and on each length, and one more."""
    own, second, third = batches
    points: list[TracePoint] = [(batch, {}) for batch in batches]
    for one in lengths:
        points += [(own, {one: _other(one, 1)}), (second, {one: _other(one, 2)})]
    return [*points, (third, {one: _other(one, 1) for one in lengths})] if lengths else points


def _other(length: Length, by: int) -> int:
    """Another length: a shorter one, where that leaves two."""
    return length.base - by if length.base - by > 1 else length.base + by


def _lengths(probe: nn.Module, inputs: Mapping[str, Tensor], call: Call) -> list[Length]:
    """The dimensions of the inputs that may be shorter: each is tried. Inputs of one size along an
    axis change together."""
    found: dict[tuple[int, int], Length] = {}
    for name, u in inputs.items():
        for axis in range(1, u.dim()):
            found.setdefault((axis, u.shape[axis]), Length(name, axis, u.shape[axis]))
    taken = []
    for one in found.values():
        try:
            rows = _rows(inputs, next(iter(inputs.values())).shape[0], 0, {one: _other(one, 1)})
            record(probe, rows, call, {""})
        except Unfollowed:
            continue
        taken.append(one)
    return taken


def _batches(inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
    own = min(next(iter(inputs.values())).shape[0], MOST_BATCH)
    return (own, *(b for b in BATCHES if b != own))[:3]


def _rows(
    inputs: Mapping[str, Tensor], batch: int, run: int, sizes: Mapping[Length, int] = NOTHING
) -> dict[str, Tensor]:
    """Inputs with another batch, other lengths, and other values in every run."""
    made = {}
    for name, u in inputs.items():
        rows = u[torch.arange(batch) % u.shape[0]]
        for one, size in sizes.items():
            if one.axis < u.dim() and u.shape[one.axis] == one.base:
                rows = rows.index_select(one.axis, torch.arange(size) % one.base)
        if rows.is_floating_point():
            rows = (rows * (1 + run / 8)).requires_grad_().clone()
        made[name] = rows
    return made


# -- what the model keeps ------------------------------------------------------------------------


def _attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {k: _flat(v) for k, v in vars(part).items()} for name, part in model.named_modules()
    }


def _flat(value: Any) -> Any:
    """A list, dict or set with its members, which may change in place."""
    if isinstance(value, dict):
        return tuple(x for pair in value.items() for x in pair)
    if isinstance(value, (list, set)):
        return tuple(value)
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether nothing has changed but tensors, which a later run cannot read without being seen."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    plain = (bool, int, float, str, type(None))
    return a is b or (isinstance(a, plain) and type(a) is type(b) and a == b)


def _assigned(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether there are other tensors under the names of weights or buffers."""
    return len(a) != len(b) or any(
        x is not y for x, y in zip(a, b, strict=True) if isinstance(x, Tensor) or x is None
    )


def _state(model: nn.Module, whole: set[str]) -> dict[str, Fingerprints]:
    """The Python state of a user's modules, without those that stay whole."""
    found = {}
    for name, part in model.named_modules():
        inner = any(name == w or name.startswith(f"{w}.") for w in whole)
        if is_foreign(type(part)) and not inner:
            found[name] = inside(part)
            for key, value in vars(type(part)).items():  # the class that `watch` has made
                if not key.startswith("__"):
                    found[name].add(key, value)
    return found


def _check_state(
    model: nn.Module, before: Mapping[str, Fingerprints], after: Mapping[str, Fingerprints]
) -> None:
    """Raises Unfollowed for Python state that a run has changed, in the name of the module that has
    it, or of one around all that use it."""
    for name, values in after.items():
        changed = before[name].differing(values)
        if not changed:
            continue
        attributes = vars(model.get_submodule(name))
        mutable = mutable_in(attributes[n] for n in changed if n in attributes)
        users = [name]
        for other, own in after.items():
            reads = names_in(model.get_submodule(other)) & {*changed} - own.marks.keys()
            if other != name and (mutable & own.ids.keys() or reads):
                users.append(other)
        around = commonpath([user.replace(".", "/") for user in users]).replace("/", ".")
        reason = f"its forward changes {changed[0]!r}, which is Python state"
        raise Unfollowed(reason, around, "")


def _check_kept(model: nn.Module, before: dict[str, dict[str, Any]], whole: set[str]) -> None:
    """Raises Unfollowed where a run has left something behind for the next one."""
    after = _attributes(model)
    for name, part in model.named_modules():
        inside = any(name == w or name.startswith(w + ".") for w in whole)
        if inside or type(part).__mro__[2].__module__.startswith(OWN):
            continue
        old, new = before.get(name, {}), after[name]
        changed = [k for k in {**old, **new} if k not in old or k not in new]
        changed += [k for k in new if k in old and not _same(old[k], new[k])]
        changed += [k for k in ("_buffers", "_parameters") if _assigned(old.get(k, ()), new[k])]
        if changed:
            kept = "buffers" if changed[0] == "_buffers" else changed[0]
            raise Unfollowed(f"its forward changes {kept!r} of the module", name, "")


# -- three runs in one ---------------------------------------------------------------------------


class _Apart(Exception):
    """Two runs differ."""


def _joined(
    runs: Sequence[Recording], points: Sequence[TracePoint], whole: dict[str, Unfollowed]
) -> Trace:
    first = runs[0]
    join = _Join(runs, points)
    ops = []
    for taken in zip(*(r.taken for r in runs), strict=False):
        try:
            ops.append(join.op(taken))
        except _Apart as why:
            raise Unfollowed(f"at another batch {why}", taken[0].where, taken[0].line) from None
    lengths = {len(r.taken) for r in runs}
    if len(lengths) > 1:
        longest = max(runs, key=lambda r: len(r.taken)).taken[min(lengths)]
        raise Unfollowed("at another batch it takes more steps", longest.where, longest.line)
    try:
        output = join.template([r.output for r in runs])
    except _Apart as why:
        raise Unfollowed(f"at another batch its output: {why}", "", "") from None
    constants = [t.detach() for t in first.constants]
    return _folded(Trace(ops, output, constants, first.origin, whole), first)


class _Join:
    def __init__(self, runs: Sequence[Recording], points: Sequence[TracePoint]) -> None:
        self._runs = runs
        self._points = points
        self._lengths = list(points[-1][1])
        rows = []
        for batch, sizes in points:
            own = [sizes.get(one, one.base) for one in self._lengths]
            rows.append([1, batch, *own, *(batch * length for length in own)])
        self._basis = torch.tensor(rows, dtype=torch.float64)
        self._solves = torch.linalg.pinv(self._basis)

    def op(self, taken: Sequence[TakenOp]) -> Op[ColumnForm]:
        one = taken[0]
        steps = [t.step for t in taken]
        if any((s.kind, s.target, s.grad) != (one.step.kind, one.step.target, one.step.grad)
               or t.where != one.where for s, t in zip(steps, taken, strict=True)):  # fmt: skip
            raise _Apart("it takes other steps")
        step = TracedStep(
            one.step.kind,
            one.step.target,
            self.template([s.args for s in steps]),
            self.template([s.kwargs for s in steps]),
            one.step.grad,
        )
        if any(t.out.keys() != one.out.keys() for t in taken):
            raise _Apart("it returns more or fewer tensors")
        fills = any(name in str(step.target) for name in ("masked_fill", "where"))
        mask = fills and not all(map(_ordinary, step.args))
        forms = {path: self._form([t.out[path] for t in taken], mask) for path in one.out}
        return Op(
            step, one.where, one.line, one.modules, forms, any(t.random for t in taken),
            one.varies, one.reads, one.writes, one.memory,
        )  # fmt: skip

    def _form(self, tensors: Sequence[Tensor], mask: bool) -> ColumnForm:
        one = tensors[0]
        if any(t.dtype != one.dtype or t.dim() != one.dim() for t in tensors):
            raise _Apart("a tensor has another type, or more dimensions")
        try:
            dims = tuple(
                self._size(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)
            )
        except _Apart:
            return ColumnForm(None, one.dtype)
        return ColumnForm(dims, one.dtype, mask or not all(map(_ordinary, tensors)))

    def _size(self, values: Sequence[int]) -> SymbolicSize:
        """The number by batch and lengths, with which all runs have to agree."""
        many = len(self._lengths)
        given = torch.tensor(values, dtype=torch.float64)
        found = (self._solves @ given).round()
        if not torch.equal(self._basis @ found, given):
            numbers = ", ".join(map(str, values))
            batches = ", ".join(str(batch) for batch, _ in self._points)
            raise _Apart(f"a number is {numbers} where the batch is {batches}")
        more, per, *rest = map(int, found.tolist())
        parts = zip(self._lengths, rest[:many], rest[many:], strict=True)
        return SymbolicSize(per, more, tuple((one, a, b) for one, a, b in parts if a or b))

    def template(self, values: Sequence[Any]) -> Template:
        one = values[0]
        kind = type(one)
        if any(type(v) is not kind for v in values):
            raise _Apart("it calls with values of other types")
        if kind is int:
            size = self._size(values)
            return size if size.batched or size.lengths else one
        if kind is ConstantRef:
            self._check_constant(one.index, [v.index for v in values])
            return one
        parts = [parts_of(v) or [] for v in values]
        if parts_of(one) is not None:
            if any([k for k, _ in own] != [k for k, _ in parts[0]] for own in parts):
                raise _Apart("it calls with more or fewer values")
            inner = zip(*([part for _, part in own] for own in parts), strict=True)
            return filled(one, [self.template(own) for own in inner])
        if kind is slice:
            parts = [[v.start for v in values], [v.stop for v in values], [v.step for v in values]]
            return slice(*(self.template(p) for p in parts))
        same = all(v is one or v == one or (v != v and one != one) for v in values)
        if not same:
            what = "reads another tensor" if isinstance(one, PLACES) else f"calls with {one!r:.40}"
            raise _Apart(f"it {what} once, and not always")
        return one

    def _check_constant(self, index: int, others: Sequence[int]) -> None:
        tensors = [r.constants[i] for r, i in zip(self._runs, others, strict=True)]
        one = tensors[0]
        if any(i != index for i in others) or any(
            t.shape != one.shape or t.dtype != one.dtype or not torch.equal(t, one) for t in tensors
        ):
            raise _Apart("it uses another tensor that no step of torch's has made")


def _ordinary(value: Any) -> bool:
    """Whether it holds no number as large as only masks have."""
    if isinstance(value, Tensor):
        return not (value.is_floating_point() and bool(value.detach().abs().gt(LARGE).any()))
    return not (isinstance(value, float) and abs(value) > LARGE)


def _folded(made: Trace, run: Recording) -> Trace:
    """With constants in place of what is the same for every sample."""
    written = {m for op in made.ops for m in op.writes}
    kept: dict[ValueRef, ConstantRef] = {}
    moving: set[int] = set()  # what depends on batch or lengths
    for k, op in enumerate(made.ops):
        steady = not (op.varies or op.writes or op.memory & written)
        fixed = all(f.free and not any(d.lengths for d in f.dims or ()) for f in op.out.values())
        for place in places((op.step.args, op.step.kwargs)):
            if isinstance(place, SymbolicSize) and place.lengths:
                fixed = False
            if isinstance(place, ValueRef) and place not in kept and place.step in moving:
                fixed = False
        if not fixed:
            moving.add(k)
        if steady and op.out and fixed:
            for path, tensor in run.taken[k].out.items():
                kept[ValueRef(k, path)] = ConstantRef(len(made.constants))
                made.constants.append(tensor.detach().clone())

    def value(place: Any) -> Any:
        return kept.get(place, place) if isinstance(place, ValueRef) else place

    for op in made.ops:
        args, kwargs = replaced(op.step.args, value), replaced(op.step.kwargs, value)
        op.step = TracedStep(op.step.kind, op.step.target, args, kwargs, op.step.grad)
    made.output = replaced(made.output, value)
    return made
