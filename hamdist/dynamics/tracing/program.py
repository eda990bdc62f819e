"""A traced model as a graph of torch.fx: the records of its steps, and the numbers that follow the
batch or the lengths of a sample. B: batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Generic, TypeAlias, TypeGuard, TypeVar

import torch
from torch import Tensor, fx

from hamdist.dynamics.user_modules.structure import Path

CONSTANT = "hamdist_constant_{}"  # reads a tensor that is equal for every sample


@dataclass(frozen=True, slots=True)
class Length:
    """A dimension of an input, which may differ from sample to sample; base: that of the
    example."""

    name: str
    axis: int
    base: int


@dataclass(frozen=True, slots=True)
class SymbolicSize:
    """per * B + more, plus (a + b * B) times a length, for each (length, a, b)."""

    per: int
    more: int = 0
    lengths: tuple[tuple[Length, int, int], ...] = ()

    @property
    def batched(self) -> bool:
        """Return True if it depends on the batch."""
        return self.per != 0 or any(b for _, _, b in self.lengths)

    @property
    def by_row(self) -> int:
        """Return the number per row of the example, or the number if no batch is in it."""
        if self.batched:
            return self.per + sum(b * dim.base for dim, _, b in self.lengths)
        return self.more + sum(a * dim.base for dim, a, _ in self.lengths)


@dataclass(frozen=True, slots=True)
class DeviceRef:
    """The device on which the module runs."""


Out = TypeVar("Out")


Value: TypeAlias = tuple[int, Path]  # a tensor: the step that makes it, and where in its result


@dataclass(slots=True)
class Op(Generic[Out]):
    """A recorded step. grad: autograd records it. where: the module whose forward took it; line: of
    that forward. modules: all active modules, outermost first. out: results by path (of one run the
    tensors; of several their forms, trace.py); nodes: of these results; varies: it depends on the
    input, on weights, or on chance. reads: steps that had to come first, through memory that they
    share. writes: memory that it changed.
    """

    node: fx.Node
    grad: bool
    where: str
    line: str
    modules: tuple[str, ...]
    out: dict[Path, Out]
    nodes: dict[Path, fx.Node]
    random: bool
    varies: bool
    reads: set[int]
    writes: set[int]
    memory: set[int]


TakenOp: TypeAlias = Op[Tensor]


@dataclass(slots=True)
class TracedProgram:
    """A model's forward, as a graph of torch.fx.

    graph: its placeholders are the inputs, by name; `get_attr` reads weights, by dotted name, and
    constants (`CONSTANT`). A node that is a result of a step has its `Value` in `meta`. Arguments
    are nodes, plain values, `Built`, `DeviceRef` and, of several runs, `SymbolicSize`. constants:
    by index. origin: what each block of memory is at the first step that had it: the node of an
    input, a weight or a constant, or the number of a step.
    """

    graph: fx.Graph
    constants: list[Tensor]
    origin: dict[int, fx.Node | int]

    @property
    def end(self) -> fx.Node:
        """Return the node of the output."""
        end: fx.Node = next(iter(reversed(self.graph.nodes)))
        return end

    @property
    def output(self) -> Any:
        """Return what the model returns."""
        return self.end.args[0]


@dataclass(slots=True)
class Recording(TracedProgram):
    """One run. ops: its steps, in order."""

    ops: list[TakenOp]


def value_of(node: Any) -> Value | None:
    """Return the result of a step that a node is; None for another node or value."""
    return node.meta.get("value") if isinstance(node, fx.Node) else None


def is_weight(node: object) -> TypeGuard[fx.Node]:
    """Return True for a node that reads a parameter or a buffer, by its dotted name."""
    is_read = isinstance(node, fx.Node) and node.op == "get_attr"
    return is_read and not is_constant(node)


def is_constant(node: object) -> TypeGuard[fx.Node]:
    """Return True for a node that reads a tensor that the model makes or keeps."""
    return isinstance(node, fx.Node) and str(node.target).startswith(CONSTANT.format(""))


@dataclass(frozen=True, slots=True)
class ColumnForm:
    """Shape and dtype of a value for any batch.

    dims: per dimension; None where they depend on the values themselves. masked: it holds the -inf
    of a mask, or a number as large.
    """

    dims: tuple[SymbolicSize, ...] | None
    dtype: torch.dtype
    masked: bool = False

    @property
    def batch_first(self) -> bool:
        """Return True for (B, ...) with the rest fixed."""
        dims = self.dims
        return bool(dims) and dims is not None and dims[0] == SymbolicSize(1) and _fixed(dims[1:])

    @property
    def free(self) -> bool:
        """Return True if the shape is the same for every batch."""
        return self.dims is not None and _fixed(self.dims)

    @property
    def sendable(self) -> bool:
        """Return True if it can be one or more columns of a signal (B, ...)."""
        if self.dims is None or not self.dtype.is_floating_point or self.masked:
            return False
        moving = [d for d in self.dims if d.batched]
        whole = all(not d.more and not any(a for _, a, _ in d.lengths) for d in moving)
        return len(moving) <= 1 and whole and all(d.by_row > 0 for d in moving)

    @property
    def columns(self) -> int:
        """Return the numbers per row of the signal that carries it."""
        return math.prod(d.by_row for d in self.dims or ())


def _fixed(dims: Sequence[SymbolicSize]) -> bool:
    return not any(d.batched for d in dims)


def packed(batch: int, values: Sequence[Tensor], forms: Sequence[ColumnForm]) -> Tensor:
    """Return values of one batch as one signal (B, columns), of the widest of their dtypes.

    A value without batch is repeated in every row, so that the messages about its copies add up to
    the one about itself.
    """
    dtype = reduce(torch.promote_types, [value.dtype for value in values])
    columns = []
    for value, form in zip(values, forms, strict=True):
        if form.free:
            flat = value.reshape(1, -1).expand(batch, -1)
        else:
            front = _moving(form)
            moved = value.movedim(front, 0) if _plain(form) else value
            flat = moved.reshape(batch, -1)
        columns.append(flat.to(dtype))
    return columns[0] if len(columns) == 1 else torch.cat(columns, 1)


def unpacked(
    h: Tensor,
    before: Sequence[tuple[bool, Sequence[int]]],
    dims: Sequence[int],
    form: ColumnForm,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return one value, of shape `dims`, from a signal.

    before: of the values in front of it, True if they are without batch, and their shapes. dtype:
    of a value that was sent with others of other dtypes; None: that of the signal, which may be the
    reader's (runtime/plan/dtypes.py).
    """
    batch, dtype = h.shape[0], dtype or h.dtype
    first = sum(_columns(free, shape, batch) for free, shape in before)
    width = _columns(form.free, dims, batch)
    columns = h if width == h.shape[1] else h[:, first : first + width]
    dims = list(dims)
    if form.free:
        return columns[0].reshape(dims).to(dtype)
    if not _plain(form):
        return columns.reshape(dims).to(dtype)
    front = _moving(form)
    rest = dims[:front] + dims[front + 1 :]
    return columns.reshape([batch, *rest]).movedim(0, front).to(dtype)


def _columns(free: bool, shape: Sequence[int], batch: int) -> int:
    return math.prod(shape) // (1 if free else batch)


def _moving(form: ColumnForm) -> int:
    """Return the dimension of the batch."""
    return next(i for i, d in enumerate(form.dims or ()) if d.batched)


def _plain(form: ColumnForm) -> bool:
    """Return True if that dimension is the batch itself."""
    return (form.dims or ())[_moving(form)] == SymbolicSize(1)
