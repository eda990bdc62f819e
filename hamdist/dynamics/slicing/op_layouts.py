"""Layouts of a value over the slices of a block, and the form of an operation in a slice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeAlias

from torch import fx, nn

from hamdist.dynamics.slicing.sliced_layers import Share, SlicePlaces


@dataclass(frozen=True)
class Replicate:
    """The whole value, in every slice."""


@dataclass(frozen=True)
class Shard:
    """A split axis. units: of the axis, distributed over the slices; chunks: equal parts of the
    axis that have them each; origins: the layers that they come from.
    """

    axis: int
    units: int
    chunks: int = 1
    origins: frozenset[fx.Node] = field(default=frozenset(), compare=False)


@dataclass(frozen=True)
class Partial:
    """A summand in every slice; the value is their sum."""


@dataclass(frozen=True)
class NumberLayout:
    """A number, or another value that is no tensor."""


@dataclass(frozen=True)
class ParameterLayout:
    """A weight or buffer of the module."""


@dataclass(frozen=True)
class TupleLayout:
    """Several values, each with its layout."""

    parts: tuple[Any, ...]


Layout: TypeAlias = "Replicate | Shard | Partial | NumberLayout | ParameterLayout | TupleLayout"


class Use(Enum):
    """Use of an input by a slice: its part of it, all of it, or all of it in slice 0 alone."""

    PIECE = "piece"
    WHOLE = "whole"
    FIRST = "first"


@dataclass(frozen=True)
class Narrow:
    """The part of a slice in something whole."""

    axis: int
    units: int
    chunks: int


class SliceBuilder(Protocol):
    """Slice i of m under construction."""

    i: int
    m: int
    graph: fx.Graph

    def value(self, node: fx.Node) -> fx.Node:
        """Return an input of the operation, as its use says."""

    def share(self, units: int, chunks: int = 1) -> Share:
        """Return the places of this slice among `units`."""

    def module_with(self, node: fx.Node, module: nn.Module, places: SlicePlaces) -> fx.Node:
        """Return the call of a module of the slice in place of `node`."""

    def copy(self, node: fx.Node) -> fx.Node:
        """Return the operation unchanged, on the inputs of this slice."""


Make: TypeAlias = "Callable[[SliceBuilder], fx.Node]"


@dataclass(frozen=True)
class OpLayout:
    """Form of an operation in a slice. make: builds slice i; None: the operation unchanged."""

    layout: Layout
    uses: Mapping[fx.Node, Use | Narrow] = field(default_factory=dict)
    make: Make | None = None


class Regrain(Exception):
    """Raised where the layers `origins` have to keep more together.

    That is `units` in each of `chunks` (None: of as many as before).
    """

    def __init__(self, origins: Iterable[fx.Node], units: int, chunks: int | None = None) -> None:
        super().__init__(units, chunks)
        self.origins = list(origins)
        self.units = units
        self.chunks = chunks
