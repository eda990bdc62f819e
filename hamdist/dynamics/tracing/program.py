"""A traced model as a graph of torch.fx: the records of its steps, and the numbers that follow the
batch or the lengths of a sample. B: batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeGuard, TypeVar

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
