"""Layouts of operations on shapes, and the parts common to all layouts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from hamdist.dynamics.slicing.op_layouts import (
    Layout,
    NumberLayout,
    OpLayout,
    Partial,
    Regrain,
    Replicate,
    Shard,
    SliceBuilder,
    TupleLayout,
    Use,
)


class ShapeLayouts:
    """Determines layouts of operations on shapes; the base of `Layouts`."""

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        values: tuple[Mapping[fx.Node, Any], Mapping[fx.Node, Any]],
        grain: Mapping[fx.Node, tuple[int, int]],
    ) -> None:
        self._name = name
        self._modules = modules
        self._values = values
        self._grain = grain
        self.steps: dict[fx.Node, OpLayout] = {}

    def _plain(self, node: fx.Node) -> Layout:
        value = self._values[0][node]
        parts = value if isinstance(value, (tuple, list)) else (value,)
        return Replicate() if any(isinstance(v, Tensor) for v in parts) else NumberLayout()

    def _named(self, node: fx.Node) -> str:
        if node.op == "call_method":
            return str(node.target).strip("_")
        return str(getattr(node.target, "__name__", "")).strip("_")

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self._values[0][node].shape)

    def _of(self, node: Any) -> Layout:
        return self.steps[node].layout if isinstance(node, fx.Node) else NumberLayout()

    def literal(self, value: Any) -> Any:
        """Return `value` with numbers in place of nodes that do not depend on the batch."""

        def plain(node: fx.Node) -> Any:
            value = self._values[0][node]
            steady = isinstance(self._of(node), NumberLayout) and value == self._values[1][node]
            return value if steady else node

        return fx.map_arg(value, plain)

    def _reshape(self, node: fx.Node) -> OpLayout | None:
        """Return the step of any change of shape in which the order of the numbers stays."""
        x = node.args[0]
        layout = self._of(x)
        if not isinstance(x, fx.Node):
            return None
        first, second = (tuple(v[node].shape) for v in self._values)
        if first[1:] != second[1:]:
            return None
        lead = first[0] if first[0] == second[0] else -1

        def shaped(piece: SliceBuilder, shape: tuple[int, ...]) -> fx.Node:
            return piece.graph.call_method("reshape", (piece.value(x), shape))

        if isinstance(layout, Partial):
            return OpLayout(layout, {x: Use.PIECE}, lambda piece: shaped(piece, (lead, *first[1:])))
        if not isinstance(layout, Shard) or layout.chunks != 1 or not layout.axis:
            return None
        refolded = _refold(self._shape(x), first, layout.axis)
        if refolded is None or refolded == 0:
            return None
        size = first[refolded]
        units = layout.units
        if size % units:
            if units % size:
                return None
            raise Regrain(layout.origins, size)

        def sliced(piece: SliceBuilder) -> fx.Node:
            shape = [lead, *first[1:]]
            shape[refolded] = piece.share(units).length(size)
            return shaped(piece, tuple(shape))

        return OpLayout(replace(layout, axis=refolded), {x: Use.PIECE}, sliced)

    def _permute(self, node: fx.Node, name: str) -> OpLayout | None:
        x, *dims = node.args
        layout = self._of(x)
        if not isinstance(x, fx.Node) or node.kwargs:
            return None
        if isinstance(layout, Partial):
            return OpLayout(layout, {x: Use.PIECE})
        rank = len(self._shape(x))
        axes = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        if not isinstance(layout, Shard) or not all(isinstance(d, int) for d in axes):
            return None
        order = [int(d) % rank for d in axes]  # type: ignore[arg-type]
        if name != "permute":
            a, b = order
            order = list(range(rank))
            order[a], order[b] = b, a
        return OpLayout(replace(layout, axis=order.index(layout.axis)), {x: Use.PIECE})

    def _reduce(self, node: fx.Node) -> OpLayout | None:
        x, *arguments = node.args
        dims = node.kwargs.get("dim", arguments[0] if arguments else None)
        keep = bool(node.kwargs.get("keepdim", arguments[1] if len(arguments) > 1 else False))
        layout = self._of(x)
        if not isinstance(x, fx.Node) or dims is None:
            return None
        if isinstance(layout, Partial):
            return OpLayout(layout, {x: Use.PIECE})
        axes = [dims] if isinstance(dims, int) else dims
        if not isinstance(axes, (list, tuple)) or not isinstance(layout, Shard):
            return None
        gone = {int(d) % len(self._shape(x)) for d in axes}
        if layout.axis in gone:
            return None
        before = 0 if keep else sum(d < layout.axis for d in gone)
        return OpLayout(replace(layout, axis=layout.axis - before), {x: Use.PIECE})

    def _chunk(self, node: fx.Node) -> OpLayout | None:
        """Return the step of `chunk`; on the split axis units are distributed within each part."""
        x, _, *arguments = node.args
        layout = self._of(x)
        dim = node.kwargs.get("dim", arguments[0] if arguments else 0)
        if not isinstance(x, fx.Node) or not isinstance(dim, int):
            return None
        parts = self._values[0][node]
        axis = dim % len(self._shape(x))
        if isinstance(layout, Partial):
            return OpLayout(TupleLayout((layout,) * len(parts)), {x: Use.PIECE})
        if not isinstance(layout, Shard):
            return None
        if axis != layout.axis:
            return OpLayout(TupleLayout((layout,) * len(parts)), {x: Use.PIECE})
        sizes = {part.shape[axis] for part in parts}
        if len(sizes) > 1:
            return None
        if layout.chunks != len(parts):
            if layout.chunks != 1:
                return None
            raise Regrain(layout.origins, sizes.pop(), len(parts))
        whole = replace(layout, chunks=1)

        def chunks(piece: SliceBuilder) -> fx.Node:
            return piece.graph.call_method("chunk", (piece.value(x), len(parts), axis))

        return OpLayout(TupleLayout((whole,) * len(parts)), {x: Use.PIECE}, chunks)

    def _getitem(self, node: fx.Node) -> OpLayout | None:
        x, index = node.args
        layout = self._of(x)
        if not isinstance(x, fx.Node):
            return None
        if isinstance(layout, TupleLayout) and isinstance(index, int):
            return OpLayout(layout.parts[index], {x: Use.PIECE})
        index = self.literal(index)
        entries = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(e, (int, slice)) for e in entries):
            return None
        if isinstance(layout, Partial):
            return OpLayout(layout, {x: Use.PIECE})
        if not isinstance(layout, Shard):
            return None
        if len(entries) > layout.axis and entries[layout.axis] != slice(None):
            return None
        gone = sum(isinstance(e, int) for e in entries[: layout.axis])
        return OpLayout(replace(layout, axis=layout.axis - gone), {x: Use.PIECE})


def _refold(old: tuple[int, ...], new: tuple[int, ...], axis: int) -> int | None:
    """Return the axis of `new` that begins where `axis` of `old` does; None if none does."""
    before = math.prod(old[:axis])
    for place, size in enumerate(new):
        if math.prod(new[:place]) == before and (size != 1 or old[axis] == 1):
            return place
    return None
