"""How the values inside a sliced block lie over its slices, operation by operation.

    Whole   every reader needs all of it: it is joined before it is read, or computed in one place
    Split   slice i has its own part of one axis (neurons, channels, heads)
    Sum     slice i has a summand
    Number  no tensor;  Weight: a parameter that forward reads by itself;  Several: a tuple

A layer with output neurons makes Split of Whole; the next one reads its own columns of Split and
makes Sum (the two halves of an MLP, a head and its part of the output projection). Elementwise
operations and those along other axes keep Split; sums, scalings and changes of shape keep Sum. All
else needs Whole, which costs a hop, never a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, fx, nn

from hamdist.dynamics.slicing.sliced_layers import (
    CONVOLUTIONS,
    NORMS,
    Share,
    SlicePlaces,
    channels_of,
    heads_of,
    inputs_of,
    outputs_of,
)
from hamdist.dynamics.user_modules.hooks import is_usual
from hamdist.dynamics.vjp.autograd import random_parts
from hamdist.errors import GraphError


@dataclass(frozen=True)
class Replicate:
    pass


@dataclass(frozen=True)
class Shard:
    """units: of the axis, shared out; chunks: equal parts of the axis that have them each. origins:
    the layers that they come from."""

    axis: int
    units: int
    chunks: int = 1
    origins: frozenset[fx.Node] = field(default=frozenset(), compare=False)


@dataclass(frozen=True)
class Partial:
    pass


@dataclass(frozen=True)
class NumberLayout:
    pass


@dataclass(frozen=True)
class ParameterLayout:
    pass


@dataclass(frozen=True)
class TupleLayout:
    parts: tuple[Any, ...]


Layout: TypeAlias = "Replicate | Shard | Partial | NumberLayout | ParameterLayout | TupleLayout"


class Use(Enum):
    """How a slice takes an input: its own part, all of it, or all of it in slice 0 alone."""

    PIECE = "piece"
    WHOLE = "whole"
    FIRST = "first"


@dataclass(frozen=True)
class Narrow:
    """Its own part of something whole."""

    axis: int
    units: int
    chunks: int


class SliceBuilder(Protocol):
    """Slice i of m under construction. value: an input of the operation, as its use says."""

    i: int
    m: int
    graph: fx.Graph

    def value(self, node: fx.Node) -> fx.Node: ...

    def share(self, units: int, chunks: int = 1) -> Share: ...

    def module_with(self, node: fx.Node, module: nn.Module, places: SlicePlaces) -> fx.Node: ...

    def copy(self, node: fx.Node) -> fx.Node: ...


Make: TypeAlias = "Callable[[SliceBuilder], fx.Node]"


@dataclass(frozen=True)
class OpLayout:
    """What becomes of an operation. make: builds slice i; None: as it is."""

    layout: Layout
    uses: Mapping[fx.Node, Use | Narrow] = field(default_factory=dict)
    make: Make | None = None


class Regrain(Exception):
    """The layers `origins` have to keep together more: `units` in each of `chunks` (None: of as
    many as before)."""

    def __init__(self, origins: Iterable[fx.Node], units: int, chunks: int | None = None) -> None:
        super().__init__(units, chunks)
        self.origins = list(origins)
        self.units = units
        self.chunks = chunks


ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Hardtanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Tanhshrink, nn.Threshold, nn.Identity, nn.Dropout,
)  # fmt: skip
CHANNELWISE = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.Upsample,
)  # fmt: skip
RESHAPES = {"view", "reshape", "flatten", "unflatten"}
UNARY = {
    "relu", "gelu", "tanh", "sigmoid", "silu", "softplus", "leaky_relu", "elu", "mish", "exp",
    "sqrt", "abs", "square", "sin", "cos", "contiguous", "clone", "neg", "pow", "clamp", "dropout",
    "hardswish", "relu6", "selu",
}  # fmt: skip
NARY = {
    "add", "sub", "mul", "truediv", "div", "iadd", "isub", "imul", "masked_fill", "where",
    "maximum", "minimum", "radd", "rmul", "rsub", "rtruediv",
}  # fmt: skip
LINEAR_UNARY = {"contiguous", "clone", "neg"}
RANDOM = {"dropout", "dropout1d", "dropout2d", "rand_like", "randn_like", "bernoulli", "rrelu"}


class Layouts:
    """Works out the layout of every value of a block.

    values: of a dry run, and of one with a batch larger by one. grain: of layers that have to keep
    more together than a neuron. Raises GraphError for what cannot be sliced; `name`: the block's.
    """

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

    def read(self, node: fx.Node) -> OpLayout:
        """The step of `node`, whose inputs have been read."""
        step = self._step(node)
        if step is None:
            uses: dict[fx.Node, Use | Narrow] = dict.fromkeys(node.all_input_nodes, Use.WHOLE)
            step = OpLayout(self._plain(node), uses)
        self.steps[node] = step
        return step

    def _plain(self, node: fx.Node) -> Layout:
        value = self._values[0][node]
        if isinstance(value, (Tensor, tuple, list)):
            tensors = isinstance(value, Tensor) or any(isinstance(v, Tensor) for v in value)
            return Replicate() if tensors else NumberLayout()
        return NumberLayout()

    def weighted(self, node: fx.Node) -> bool:
        """Whether it has weights, or draws random numbers: it is computed in one place."""
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            stateful = [*module.parameters(), *module.buffers(), *random_parts(module)]
            return bool(stateful)
        if any(isinstance(self.steps[i].layout, ParameterLayout) for i in node.all_input_nodes):
            return True
        return self._named(node) in RANDOM

    def _named(self, node: fx.Node) -> str:
        if node.op == "call_method":
            return str(node.target).strip("_")
        return str(getattr(node.target, "__name__", "")).strip("_")

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self._values[0][node].shape)

    def _of(self, node: Any) -> Layout:
        return self.steps[node].layout if isinstance(node, fx.Node) else NumberLayout()

    def literal(self, value: Any) -> Any:
        """`value` with numbers that do not depend on the batch in place of what computes them."""

        def plain(node: fx.Node) -> Any:
            known = self._values[0][node]
            steady = isinstance(self._of(node), NumberLayout) and known == self._values[1][node]
            return known if steady else node

        return fx.map_arg(value, plain)

    def _step(self, node: fx.Node) -> OpLayout | None:
        if node.op == "placeholder":
            return OpLayout(Replicate())
        if node.op == "get_attr":
            is_weight = isinstance(self._values[0][node], nn.Parameter)
            return OpLayout(ParameterLayout() if is_weight else Replicate())
        if node.op == "call_module":
            return self._module(node, self._modules[str(node.target)])
        if isinstance(self._plain(node), NumberLayout):
            return None
        tensors = [i for i in node.all_input_nodes if not isinstance(self._of(i), NumberLayout)]
        if not any(isinstance(self._of(i), (Shard, Partial, TupleLayout)) for i in tensors):
            return None
        if any(isinstance(self._of(i), ParameterLayout) for i in tensors):
            return None
        name = self._named(node)
        if name in RESHAPES:
            return self._reshape(node)
        if name in UNARY:
            return self._along(node, linear=name in LINEAR_UNARY)
        if name in ("softmax", "log_softmax"):
            return self._softmax(node)
        if name in NARY:
            return self._nary(node, name, tensors)
        if name in ("matmul", "bmm", "scaled_dot_product_attention"):
            return self._nary(node, name, tensors, inner=2)
        if name in ("transpose", "swapaxes", "permute"):
            return self._permute(node, name)
        if name in ("mean", "sum"):
            return self._reduce(node)
        if name in ("chunk", "split"):
            return self._chunk(node)
        if name == "getitem":
            return self._getitem(node)
        return None

    # -- layers --------------------------------------------------------------------------------

    def _module(self, node: fx.Node, module: nn.Module) -> OpLayout | None:
        kind = type(module)
        x = node.args[0] if node.args else None
        if not is_usual(module) or not isinstance(x, fx.Node):
            return None
        if kind is nn.Linear or kind in CONVOLUTIONS:
            return self._neurons(node, x, module)
        if kind is nn.MultiheadAttention:
            return self._heads(node, module)  # type: ignore[arg-type]
        if len(node.args) != 1 or node.kwargs:
            return None
        layout = self._of(x)
        if kind in (nn.Flatten, nn.Unflatten):
            return self._reshape(node)
        if isinstance(layout, Partial) and (kind is nn.Identity or _off(module)):
            return OpLayout(layout, {x: Use.PIECE})
        if not isinstance(layout, Shard):
            return None
        if kind in ELEMENTWISE:
            return OpLayout(layout, {x: Use.PIECE})
        if layout.axis != 1 or isinstance(self._values[0][node], tuple):
            return None
        if kind in CHANNELWISE and len(self._shape(x)) >= 3:
            return OpLayout(layout, {x: Use.PIECE})
        if kind in NORMS:

            def norm(piece: SliceBuilder) -> fx.Node:
                own = channels_of(module, piece.share(layout.units, layout.chunks))
                return piece.module_with(node, *own)

            return OpLayout(layout, {x: Use.PIECE}, norm)
        return None

    def _neurons(self, node: fx.Node, x: fx.Node, module: Any) -> OpLayout:
        """A Linear or a convolution: by columns of what is split along its inputs, else by rows."""
        if len(self._uses_of(node)) > 1:
            raise GraphError(
                f"block {self._name!r} cannot be sliced: its module {_path(node)!r} is used more "
                "than once; give each place its own module, or leave its slices out"
            )
        axis = len(self._shape(x)) - 1 if isinstance(module, nn.Linear) else 1
        if not isinstance(module, nn.Linear) and module.groups != 1:
            raise GraphError(
                f"block {self._name!r} cannot be sliced: {_path(node)!r} is a "
                f"{type(module).__name__} with groups={module.groups}; slices take groups=1, so "
                "put it into a block of its own (partition.cuts), or leave its slices out"
            )
        layout = self._of(x)
        if isinstance(layout, Shard) and layout.axis == axis and layout.chunks == 1:

            def columns(piece: SliceBuilder) -> fx.Node:
                return piece.module_with(node, *inputs_of(module, piece.share(layout.units)))

            return OpLayout(Partial(), {x: Use.PIECE}, columns)
        units, chunks = self._grain.get(node, (int(module.weight.shape[0]), 1))

        def rows(piece: SliceBuilder) -> fx.Node:
            return piece.module_with(node, *outputs_of(module, piece.share(units, chunks)))

        made = Shard(axis, units, chunks, frozenset([node]))
        return OpLayout(made, {x: Use.WHOLE}, rows)

    def _heads(self, node: fx.Node, module: nn.MultiheadAttention) -> OpLayout:
        odd = module.bias_k is not None or module.add_zero_attn
        if odd or not module._qkv_same_embed_dim:
            raise GraphError(
                f"block {self._name!r} cannot be sliced: its attention {_path(node)!r} has "
                "add_bias_kv, add_zero_attn, or keys of another size; leave its slices out"
            )
        for user in node.users:
            if user.args[1:] != (0,) and user.users:
                raise GraphError(
                    f"block {self._name!r} cannot be sliced: it uses the weights of its attention "
                    f"{_path(node)!r}, which are a mean over all heads; leave its slices out"
                )
        uses: dict[fx.Node, Use | Narrow] = dict.fromkeys(node.all_input_nodes, Use.WHOLE)

        def heads(piece: SliceBuilder) -> fx.Node:
            return piece.module_with(node, *heads_of(module, piece.share(module.num_heads)))

        return OpLayout(TupleLayout((Partial(), NumberLayout())), uses, heads)

    def units(self, node: fx.Node) -> tuple[int, str] | None:
        """How many units a layer that begins slices has, and what they are."""
        layout = self.steps[node].layout
        if node.op != "call_module":
            return None
        module = self._modules[str(node.target)]
        if isinstance(module, nn.MultiheadAttention):
            return module.num_heads, "heads"
        if not isinstance(layout, Shard) or node not in layout.origins:
            return None
        if node in self._grain:
            return layout.units, "heads, or other groups of neurons that stay together"
        return layout.units, "neurons" if isinstance(module, nn.Linear) else "channels"

    def _uses_of(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.graph.nodes if n.op == "call_module" and n.target == node.target]

    # -- operations ------------------------------------------------------------------------------

    def _along(self, node: fx.Node, *, linear: bool) -> OpLayout | None:
        """An operation on single numbers."""
        x, *rest = node.all_input_nodes
        layout = self._of(x)
        others = [r for r in rest if not isinstance(self._of(r), NumberLayout)]
        if others or not (isinstance(layout, Shard) or (linear and isinstance(layout, Partial))):
            return None
        return OpLayout(layout, {x: Use.PIECE})

    def _softmax(self, node: fx.Node) -> OpLayout | None:
        x = node.args[0]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        layout = self._of(x)
        if not isinstance(x, fx.Node) or not isinstance(layout, Shard) or not isinstance(dim, int):
            return None
        return (
            None if dim % len(self._shape(x)) == layout.axis else OpLayout(layout, {x: Use.PIECE})
        )

    def _nary(
        self, node: fx.Node, name: str, tensors: list[fx.Node], inner: int = 0
    ) -> OpLayout | None:
        """Elementwise over several tensors, or, with `inner`, over all axes but the last ones."""
        layouts = [self._of(t) for t in tensors]
        splits = [s for s in layouts if isinstance(s, Shard)]
        if not splits:
            return None if inner else self._sums(node, name, tensors)
        if any(isinstance(one, (Partial, TupleLayout)) for one in layouts):
            return None
        out = self._shape(node)
        places = {  # of the split axis, counted from the last
            s.axis - len(self._shape(t))
            for s, t in zip(layouts, tensors, strict=True)
            if isinstance(s, Shard)
        }
        units, chunks = min(s.units for s in splits), splits[0].chunks
        if len(places) > 1 or any(s.chunks != chunks for s in splits):
            return None
        (place,) = places
        if -place <= inner:
            return None
        for s in splits:
            if s.units != units:
                if s.units % units:
                    return None
                raise Regrain(s.origins, units)
        uses: dict[fx.Node, Use | Narrow] = {}
        for tensor, layout in zip(tensors, layouts, strict=True):
            shape = self._shape(tensor)
            if isinstance(layout, Shard):
                uses[tensor] = Use.PIECE
            elif -place > len(shape) or shape[place] == 1:
                uses[tensor] = Use.WHOLE
            else:
                uses[tensor] = Narrow(len(shape) + place, units, chunks)
        origins = frozenset().union(*(s.origins for s in splits))
        return OpLayout(Shard(len(out) + place, units, chunks, origins), uses)

    def _sums(self, node: fx.Node, name: str, tensors: list[fx.Node]) -> OpLayout | None:
        """Sums and scalings of summands; what is whole is added once."""
        if node.kwargs or len(node.args) != 2:
            return None
        sums = [t for t in tensors if isinstance(self._of(t), Partial)]
        if name in ("mul", "truediv", "div", "imul", "rmul"):
            scaled = len(tensors) == 1 and (
                node.args[0] is sums[0] or name in ("mul", "imul", "rmul")
            )
            return OpLayout(Partial(), {sums[0]: Use.PIECE}) if scaled else None
        added = name in ("add", "iadd", "radd")
        if not added and not (name in ("sub", "isub") and node.args[0] in sums):
            return None
        if len(sums) == 2 or (node.args[0] is node.args[1]):
            return OpLayout(Partial(), dict.fromkeys(sums, Use.PIECE))
        (summand,) = sums
        if self._shape(summand) != self._shape(node):
            return None
        uses: dict[fx.Node, Use | Narrow] = {
            t: Use.PIECE if t is summand else Use.FIRST for t in tensors
        }

        def once(piece: SliceBuilder) -> fx.Node:
            return piece.copy(node) if piece.i == 0 else piece.value(summand)

        return OpLayout(Partial(), uses, once)

    def _reshape(self, node: fx.Node) -> OpLayout | None:
        """Any change of shape in which the order of the numbers stays."""
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
        found = _refold(self._shape(x), first, layout.axis)
        if found is None or found == 0:
            return None
        size = first[found]
        units = layout.units
        if size % units:
            if units % size:
                return None
            raise Regrain(layout.origins, size)

        def own(piece: SliceBuilder) -> fx.Node:
            shape = [lead, *first[1:]]
            shape[found] = piece.share(units).length(size)
            return shaped(piece, tuple(shape))

        return OpLayout(replace(layout, axis=found), {x: Use.PIECE}, own)

    def _permute(self, node: fx.Node, name: str) -> OpLayout | None:
        x, *dims = node.args
        layout = self._of(x)
        if not isinstance(x, fx.Node) or node.kwargs:
            return None
        if isinstance(layout, Partial):
            return OpLayout(layout, {x: Use.PIECE})
        rank = len(self._shape(x))
        given = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        if not isinstance(layout, Shard) or not all(isinstance(d, int) for d in given):
            return None
        order = [int(d) % rank for d in given]  # type: ignore[arg-type]
        if name != "permute":
            a, b = order
            order = list(range(rank))
            order[a], order[b] = b, a
        return OpLayout(replace(layout, axis=order.index(layout.axis)), {x: Use.PIECE})

    def _reduce(self, node: fx.Node) -> OpLayout | None:
        x, *given = node.args
        dims = node.kwargs.get("dim", given[0] if given else None)
        keep = bool(node.kwargs.get("keepdim", given[1] if len(given) > 1 else False))
        layout = self._of(x)
        if not isinstance(x, fx.Node) or dims is None:
            return None
        if isinstance(layout, Partial):
            return OpLayout(layout, {x: Use.PIECE})
        many = [dims] if isinstance(dims, int) else dims
        if not isinstance(many, (list, tuple)) or not isinstance(layout, Shard):
            return None
        gone = {int(d) % len(self._shape(x)) for d in many}
        if layout.axis in gone:
            return None
        before = 0 if keep else sum(d < layout.axis for d in gone)
        return OpLayout(replace(layout, axis=layout.axis - before), {x: Use.PIECE})

    def _chunk(self, node: fx.Node) -> OpLayout | None:
        """Equal parts of an axis; along the split one, its units are shared out in each part."""
        x, _, *given = node.args
        layout = self._of(x)
        dim = node.kwargs.get("dim", given[0] if given else 0)
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
        made = replace(layout, chunks=1)

        def chunks(piece: SliceBuilder) -> fx.Node:
            return piece.graph.call_method("chunk", (piece.value(x), len(parts), axis))

        return OpLayout(TupleLayout((made,) * len(parts)), {x: Use.PIECE}, chunks)

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


def _off(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p == 0


def _path(node: fx.Node) -> str:
    return str(node.target).removeprefix("m.")


def _refold(old: tuple[int, ...], new: tuple[int, ...], axis: int) -> int | None:
    """The axis of `new` that begins where `axis` of `old` does; None if none does."""
    before = math.prod(old[:axis])
    for place, size in enumerate(new):
        if math.prod(new[:place]) == before and (size != 1 or old[axis] == 1):
            return place
    return None


def dry_run(module: fx.GraphModule, inputs: list[Tensor]) -> dict[fx.Node, Any]:
    """The value of every node."""
    found: dict[fx.Node, Any] = {}

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        Noting(module).run(*inputs)
    return found
