"""Reads a module, torch's own or a user's, as a program of kernels.

A module has none where a part of it has no kernel, has hooks, or where its `forward` is not proved
to do the same at every call (purity.py); a proved one is traced by torch.fx.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hamdist.dynamics.modules.subspace import Subspace
from hamdist.dynamics.tracing.traced_module import TracedModule
from hamdist.dynamics.user_modules.hooks import is_usual
from hamdist.dynamics.vjp.attention import (
    ACTIVATIONS,
    SelfAttention,
    attends_to,
    in_projection,
    is_plain,
)
from hamdist.dynamics.vjp.functions import FROM_INPUT, FROM_RESULT, FUNCTIONS, POOLS
from hamdist.dynamics.vjp.kernels import (
    Add,
    Conv2d,
    Embedding,
    FromInput,
    FromResult,
    Kernel,
    LayerNorm,
    Linear,
    MaxPool2d,
    Projection,
    Reshape,
    ScaleKernel,
)
from hamdist.dynamics.vjp.native_chain import Chain, chain_of
from hamdist.dynamics.vjp.purity import is_own, is_pure
from hamdist.dynamics.vjp.steps import ProgramStep

# Kernels of layers with `weight` and `bias`.
WEIGHTED: dict[type, Callable[[Any, tuple[int | None, ...]], Kernel]] = {
    nn.Linear: Linear,
    NonDynamicallyQuantizableLinear: Linear,
    nn.LayerNorm: LayerNorm,
}


def read_program(
    module: nn.Module, arguments: int, *, native: bool = False
) -> list[ProgramStep] | None:
    """Return the steps of `module`, which takes so many arguments; None if it has no closed form.

    native: kernels that follow each other are one, in C (native/chain.py).
    """
    try:
        return _Program(module, arguments, native=native).read()
    except _Unknown:
        return None


class _Unknown(Exception):
    """Raised where a part has no closed form."""


class _Program:
    """Reads a module into steps."""

    def __init__(self, module: nn.Module, arguments: int, *, native: bool) -> None:
        self._module = module
        self._arguments = arguments
        self._native = native
        self._trained = {
            id(p): i for i, p in enumerate(p for p in module.parameters() if p.requires_grad)
        }
        self._used: set[int] = set()
        self._kernels: list[tuple[Kernel, tuple[int, ...]]] = []
        self._owns: set[int] = set()  # places whose memory an activation may work in

    def read(self) -> list[ProgramStep]:
        """Return the steps; raise _Unknown where there is no closed form."""
        if not all(map(is_usual, self._module.modules())):
            raise _Unknown
        for parameter in self._module.parameters():
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                raise _Unknown
        if _is_chain(self._module):
            if self._arguments != 1:
                raise _Unknown
            last = self._chain(self._module, 0, alone=True)
        else:
            last = self._traced()
        if last != self._arguments + len(self._kernels) - 1 or not self._kernels:
            raise _Unknown  # the output is not the last value: nothing to gain
        if len(self._used) < len(self._trained):
            raise _Unknown  # weights outside the program
        if self._native:
            self._join()
        return self._steps(self._arguments + len(self._kernels) - 1)

    def _join(self) -> None:
        """Replace kernels by chains, each of as many as follow each other and are in C.

        Of what a chain makes, nobody else reads more than its last value, and it reads one value.
        """
        last_reader = {p: i for i, (_, reads) in enumerate(self._kernels) for p in reads}
        joined: list[tuple[Kernel, tuple[int, ...]]] = []
        now_at = {place: place for place in range(self._arguments)}  # of a value, by its place
        i = 0
        while i < len(self._kernels):
            chain, end = self._longest(i, last_reader)
            kernel, reads = self._kernels[i]
            reads = tuple(now_at[p] for p in (reads if chain is None else reads[:1]))
            joined.append((kernel if chain is None else chain, reads))
            i = end
            now_at[self._arguments + i - 1] = self._arguments + len(joined) - 1
        self._kernels = joined

    def _longest(self, i: int, last_reader: dict[int, int]) -> tuple[Chain | None, int]:
        """Return the longest chain from kernel i on, and the kernel behind it."""
        source, *_ = self._kernels[i][1]
        kernels: list[Kernel] = []
        local: dict[int, int] = {source: 0}
        reads: list[tuple[int, ...]] = []
        best: tuple[Chain | None, int] = None, i + 1
        for k in range(i, len(self._kernels)):
            kernel, places = self._kernels[k]
            if any(p not in local for p in places):
                break
            kernels.append(kernel)
            reads.append(tuple(local[p] for p in places))
            place = self._arguments + k
            local[place] = len(kernels)
            inside = (p for p in local if p not in (source, place))
            if any(last_reader.get(p, len(self._kernels)) > k for p in inside):
                continue
            chain = chain_of(kernels, reads)
            if chain is not None:
                best = chain, k + 1
        return best

    def _steps(self, last: int) -> list[ProgramStep]:
        """Return the steps, those marked whose output leaves the block.

        That is the output, and every value that shares memory with it.
        """
        leaving = {last}
        for i in range(len(self._kernels) - 1, -1, -1):
            kernel, reads = self._kernels[i]
            if self._arguments + i in leaving and (kernel.in_place or isinstance(kernel, Reshape)):
                leaving.update(reads)
        steps = []
        for i, (kernel, reads) in enumerate(self._kernels):
            leaves = self._arguments + i in leaving
            if isinstance(kernel, Chain):  # the rest of it stays
                kernel.lasting = leaves
            steps.append(ProgramStep(kernel, reads, leaves and not isinstance(kernel, Chain)))
        return steps

    def _add(self, kernel: Kernel, *reads: int) -> int:
        for w in kernel.weights:
            if w is not None:
                if w in self._used:
                    raise _Unknown  # a weight that is used twice
                self._used.add(w)
        self._kernels.append((kernel, reads))
        place = self._arguments + len(self._kernels) - 1
        if kernel.owns:
            self._owns.add(place)
        return place

    # -- a chain of layers ---------------------------------------------------------------------

    def _chain(self, module: nn.Module, place: int, *, alone: bool) -> int:
        if type(module) is nn.Sequential:
            for child in module:
                place = self._chain(child, place, alone=alone)
            return place
        return self._layer(module, place, alone=alone)

    def _layer(self, m: Any, place: int, *, alone: bool) -> int:
        """Add the kernel of a layer. alone: it is the only reader of the value at `place`."""
        kind = type(m)
        if kind in WEIGHTED:
            weights = self._index(m, "weight"), self._index(m, "bias")
            return self._add(WEIGHTED[kind](m, weights), place)
        if kind is nn.Conv2d:
            if m.padding_mode != "zeros" or isinstance(m.padding, str):
                raise _Unknown
            weights = self._index(m, "weight"), self._index(m, "bias")
            return self._add(Conv2d(m, weights, native=self._native), place)
        if kind is nn.Embedding:
            if m.max_norm is not None or m.scale_grad_by_freq or m.sparse:
                raise _Unknown
            return self._add(Embedding(m, (self._index(m, "weight"),)), place)
        if kind is nn.Identity or (kind is nn.Dropout and m.p == 0):
            if not alone:
                raise _Unknown  # one value under two names
            return place
        if kind is nn.Flatten:
            return self._add(Reshape(lambda x: x.flatten(m.start_dim, m.end_dim)), place)
        if kind is nn.Unflatten and isinstance(m.unflattened_size, tuple):
            return self._add(
                Reshape(lambda x: torch.unflatten(x, m.dim, m.unflattened_size)), place
            )
        if kind is Subspace and m.follows_seed():
            return self._add(Projection(m), place)
        if kind is nn.MaxPool2d and not m.return_indices:
            return self._add(MaxPool2d(m), place)
        if kind is nn.TransformerEncoderLayer:
            return self._encoder_layer(m, place)
        if kind is nn.TransformerEncoder:
            for layer in [*m.layers, *([] if m.norm is None else [m.norm])]:
                place = self._layer(layer, place, alone=False)
            return place
        if not alone and getattr(m, "inplace", False):
            raise _Unknown  # it would change what others read
        return self._activation(m, place, alone=alone)

    def _encoder_layer(self, m: nn.TransformerEncoderLayer, x: int) -> int:
        """Add x' = LN(x + attention(x)), LN(x' + mlp(x')), or the norms before (`norm_first`)."""
        if m.activation not in ACTIVATIONS:
            raise _Unknown

        def attention(place: int) -> int:
            return self._self_attention(m.self_attn, place)

        def mlp(place: int) -> int:
            place = self._layer(m.linear1, place, alone=False)
            place = self._activation(ACTIVATIONS[m.activation](), place, alone=True)
            for layer in (m.dropout, m.linear2):
                place = self._layer(layer, place, alone=True)
            return place

        for part, dropout, norm in ((attention, m.dropout1, m.norm1), (mlp, m.dropout2, m.norm2)):
            inner = self._layer(norm, x, alone=False) if m.norm_first else x
            inner = self._layer(dropout, part(inner), alone=True)
            x = self._add(Add(), x, inner)
            if not m.norm_first:
                x = self._layer(norm, x, alone=True)
        return x

    def _self_attention(self, m: nn.MultiheadAttention, place: int) -> int:
        if not is_plain(m):
            raise _Unknown
        place = self._layer(in_projection(m), place, alone=False)
        place = self._add(SelfAttention(m.num_heads), place)
        return self._layer(m.out_proj, place, alone=True)

    def _index(self, module: nn.Module, name: str) -> int | None:
        parameter = getattr(module, name)
        return None if parameter is None else self._trained.get(id(parameter))

    def _activation(self, m: nn.Module, place: int, *, alone: bool) -> int:
        kind = type(m)
        from_result = FROM_RESULT.get(kind)
        if from_result is not None:
            run, in_place, back, act = from_result
            works = alone and place in self._owns
            maker = self._kernels[place - self._arguments][0] if works else None
            if kind is nn.ReLU and isinstance(maker, Linear):
                maker.relu = True
                self._owns.discard(place)
                return place
            kernel = FromResult(run, in_place, back, in_place=works, act=act)
            return self._add(kernel, place)
        if kind in FROM_INPUT:
            run, back = FROM_INPUT[kind](m)
            return self._add(FromInput(run, back), place)
        raise _Unknown

    # -- a forward of the module's own ---------------------------------------------------------

    def _traced(self) -> int:
        graph = _trace(self._module)
        parts = dict(self._module.named_modules())
        places: dict[fx.Node, int] = {}
        last = -1
        for node in graph.nodes:
            if node.op == "placeholder":
                if node.args or str(node.target).startswith("*") or self._kernels:
                    raise _Unknown
                places[node] = len(places)
            elif node.op == "output":
                (result,) = node.args
                if not isinstance(result, fx.Node):
                    raise _Unknown
                last = places[result]
            elif node.op in ("call_module", "call_function", "call_method"):
                places[node] = self._node(node, parts, places)
            else:
                raise _Unknown
        if sum(n.op == "placeholder" for n in graph.nodes) != self._arguments:
            raise _Unknown
        return last

    def _node(self, node: fx.Node, parts: dict[str, nn.Module], places: dict[fx.Node, int]) -> int:
        read = [a for a in node.args if isinstance(a, fx.Node)]
        at = [places[a] for a in read]
        alone = all(len(a.users) == 1 for a in read)
        if node.op == "call_module":
            part = parts.get(str(node.target))
            if type(part) is nn.MultiheadAttention:
                if (x := attends_to(node)) is None:
                    raise _Unknown
                return self._self_attention(part, places[x])
            if len(node.args) != 1 or node.kwargs or len(read) != 1:
                raise _Unknown
            return self._layer(part, at[0], alone=alone)
        if node.target is operator.getitem and read:
            if type(parts.get(str(read[0].target))) is not nn.MultiheadAttention:
                raise _Unknown
            return at[0]  # (what is attended: of the weights nothing is read)
        if node.target in POOLS and len(at) == 1 and node.args[:1] == (read[0],):
            pool = POOLS[node.target](*node.args[1:], **node.kwargs)
            return self._layer(pool, at[0], alone=alone)
        if node.kwargs not in ({}, {"inplace": False}):
            raise _Unknown
        if node.target in (operator.add, torch.add, operator.iadd) and len(at) == 2:
            if node.target is operator.iadd:
                raise _Unknown
            return self._add(Add(), *at)
        if node.target in (operator.sub, torch.sub) and len(at) == 2:
            return self._add(Add(-1.0), *at)
        numbers = [a for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
        if len(node.args) == 2 and len(at) == 1 and len(numbers) == 1:
            if node.target in (operator.mul, torch.mul):
                return self._add(ScaleKernel(float(numbers[0])), at[0])
            if node.target is operator.truediv and node.args[0] is read[0]:
                return self._add(ScaleKernel(1.0 / float(numbers[0])), at[0])
        if len(node.args) == 1 and len(at) == 1 and node.target in FUNCTIONS:
            return self._activation(FUNCTIONS[node.target](), at[0], alone=alone)
        if len(at) == 1 and all(isinstance(a, int) for a in node.args[1:]):
            dims = [int(a) for a in node.args[1:]]  # type: ignore[arg-type]
            if node.target in (torch.flatten, "flatten"):
                return self._add(Reshape(lambda x: x.flatten(*dims)), at[0])
            if node.target in ("view", "reshape"):
                return self._add(Reshape(lambda x: x.reshape(dims)), at[0])
        raise _Unknown


def _is_chain(module: nn.Module) -> bool:
    """Return True for a layer that has no parts to trace, or a Sequential of such layers and
    Sequentials.
    """
    if type(module) is nn.Sequential:
        return all(_is_chain(child) for child in module)
    return is_own(module)


class _Tracer(fx.Tracer):
    """Traces all modules but those with a kernel of their own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is Subspace or super().is_leaf_module(m, module_qualified_name)


def _trace(module: nn.Module) -> fx.Graph:
    """Return the operations of forward; raise _Unknown where they may differ between calls."""
    if isinstance(module, TracedModule):  # (whole where it depends on Python state)
        return module.hamdist_graph
    if not is_pure(module):
        raise _Unknown
    try:
        return _Tracer().trace(module)
    except Exception as error:  # a user's forward may raise anything on fx's stand-ins
        raise _Unknown from error
