"""Layouts of the values inside a sliced block over its slices, operation by operation.

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

from typing import Any

import torch
from torch import Tensor, fx, nn

from hamdist.dynamics.slicing.op_layouts import (
    Narrow,
    NumberLayout,
    OpLayout,
    ParameterLayout,
    Partial,
    Regrain,
    Replicate,
    Shard,
    SliceBuilder,
    TupleLayout,
    Use,
)
from hamdist.dynamics.slicing.shape_layouts import ShapeLayouts
from hamdist.dynamics.slicing.sliced_layers import (
    CONVOLUTIONS,
    NORMS,
    channels_of,
    heads_of,
    inputs_of,
    outputs_of,
)
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.dynamics.user_modules.hooks import is_usual
from hamdist.dynamics.vjp.seeding import random_parts
from hamdist.errors import GraphError

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


class Layouts(ShapeLayouts):
    """Determines the layout of every value of a block.

    values: of a dry run, and of one with a batch larger by one. grain: of layers that have to keep
    more together than a neuron. Raises GraphError for a block that cannot be sliced; `name`: its
    name.
    """

    def read(self, node: fx.Node) -> OpLayout:
        """Return the step of `node`, whose inputs have been read."""
        step = self._step(node)
        if step is None:
            uses: dict[fx.Node, Use | Narrow] = dict.fromkeys(node.all_input_nodes, Use.WHOLE)
            step = OpLayout(self._plain(node), uses)
        self.steps[node] = step
        return step

    def weighted(self, node: fx.Node) -> bool:
        """Return True if it has weights, or draws random numbers: it is computed in one place."""
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            stateful = [*module.parameters(), *module.buffers(), *random_parts(module)]
            return bool(stateful)
        if any(isinstance(self.steps[i].layout, ParameterLayout) for i in node.all_input_nodes):
            return True
        return self._named(node) in RANDOM

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
                channels = channels_of(module, piece.share(layout.units, layout.chunks))
                return piece.module_with(node, *channels)

            return OpLayout(layout, {x: Use.PIECE}, norm)
        return None

    def _neurons(self, node: fx.Node, x: fx.Node, module: Any) -> OpLayout:
        """Slice a Linear or a convolution: by columns where its input is split, else by rows."""
        target = node.target
        if sum(n.op == "call_module" and n.target == target for n in node.graph.nodes) > 1:
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

        shard = Shard(axis, units, chunks, frozenset([node]))
        return OpLayout(shard, {x: Use.WHOLE}, rows)

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
        """Return number and kind of the units of a layer that begins slices."""
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

    # -- operations ------------------------------------------------------------------------------

    def _along(self, node: fx.Node, *, linear: bool) -> OpLayout | None:
        """Return the step of an operation on single numbers."""
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
        across = dim % len(self._shape(x)) == layout.axis
        return None if across else OpLayout(layout, {x: Use.PIECE})

    def _nary(
        self, node: fx.Node, name: str, tensors: list[fx.Node], inner: int = 0
    ) -> OpLayout | None:
        """Return the step of an elementwise operation on several tensors.

        With `inner` it is elementwise over all axes but the last ones.
        """
        layouts = [self._of(t) for t in tensors]
        splits = [s for s in layouts if isinstance(s, Shard)]
        if not splits:
            return None if inner else self._sums(node, name, tensors)
        if any(isinstance(entry, (Partial, TupleLayout)) for entry in layouts):
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
        """Return the step of a sum or scaling of summands; a whole value is added once."""
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


def _off(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p == 0


def _path(node: fx.Node) -> str:
    return str(node.target).removeprefix("m.")


def dry_run(module: fx.GraphModule, inputs: list[Tensor]) -> dict[fx.Node, Any]:
    """Return the value of every node."""
    values: dict[fx.Node, Any] = {}

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad(), generator_kept():
        Noting(module).run(*inputs)
    return values
