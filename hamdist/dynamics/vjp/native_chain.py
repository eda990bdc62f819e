"""Kernels that follow each other as one, which runs in one call of the C code (native/chain.py).

R: rows (batch, times further dimensions); I, O: inputs and outputs.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Size, Tensor, int64

from hamdist.dynamics.native.chain import MOST, NativeChain, Operation, OperationKind
from hamdist.dynamics.native.rows import reads as is_readable
from hamdist.dynamics.vjp.gradient import AtOnce, Column, Gradient, Gradients, Outer, TableRows
from hamdist.dynamics.vjp.kernels import KeptTensors, Kernel, Reshape, ToInputs, Wanted, like
from hamdist.dynamics.vjp.steps import ProgramStep, needed, pull_steps, run_steps

SHAPES = 256  # of inputs, whose sizes and places are kept


class Chain(Kernel):
    """Kernels on one value, each of which reads that or what earlier ones made.

    lasting: the output leaves the block, so that its memory is not used again. Memory that stays
    inside is: activations by a later forward pass (see `Kernel.forward`), d by the pull after the
    next, for until then it may be a factor of omega. apart: one kernel after the
    other in any case; otherwise where the C code cannot step an input.

    values: by step, which value of the operations is its output (a view has none of its own).
    places: by operation, those of W and b among the function's weights.
    """

    owns = False

    def __init__(
        self,
        kernels: Sequence[Kernel],
        reads: Sequence[tuple[int, ...]],
        operations: Sequence[Operation],
        values: Sequence[int],
        places: Sequence[tuple[int | None, ...]],
    ) -> None:
        self._steps = [
            ProgramStep(k, r, lasting=False) for k, r in zip(kernels, reads, strict=True)
        ]
        self._operations, self._values, self._places = operations, values, places
        self.weights = tuple(w for kernel in kernels for w in kernel.weights)
        self._trained = [sum(w is not None for w in places) for places in self._places]
        self.lasting = False
        self.apart = False
        self._w = next(op.w for op in operations if op.w is not None)
        index = operations[0].kind is OperationKind.EMBEDDING
        self._dtype = int64 if index else self._w.dtype  # of x
        self._shapes: dict[Size, tuple[NativeChain | None, Size]] = {}
        self._slopes: list[Tensor | None] = [None, None]
        self._messages: list[Tensor | None] = [None]
        self._rates: tuple[AtOnce, array[float]] | None = None

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:
        shape = self._shapes.get(x.shape)
        native, out_shape = shape or self._sizes_of(x)
        if native is None or self.apart or x.dtype is not self._dtype or not x.is_cpu:
            return self._one_by_one(old, x)
        x = x.contiguous()
        old = old if old is not None and len(old) == 4 else None  # of such a call, too
        inner = like(old, 2, (native.inner,), self._w)
        if old is None or inner is not old[2]:
            inner.zero_()  # what fills the outputs up is part of the record
        y = like(None if self.lasting else old, 3, out_shape, self._w)
        if not native.forward(x, inner, y):
            return self._one_by_one(old, x)  # which says what is wrong
        return [y, x, inner, y]

    def _sizes_of(self, x: Tensor) -> tuple[NativeChain | None, Size]:
        """Return the C code for inputs like x, if it can step them, and the output's shape.

        All kernels run once, by torch: they know the shapes of what they make.
        """
        shapes = [x.shape, *(saved[0].shape for saved in run_steps(self._steps, [x], None))]
        adds = [s.reads for s in self._steps if len(s.reads) == 2]
        native = None
        if x.numel() and all(shapes[a] == shapes[b] for a, b in adds):
            by_value = dict(zip(self._values, shapes, strict=True))
            sizes = [(x.numel(), x.shape[-1] if x.dim() else 1)]
            for i, op in enumerate(self._operations):
                sizes.append((by_value[i + 1].numel(), op.width or sizes[op.reads[0]][1]))
            native = NativeChain(self._operations, sizes)
        if len(self._shapes) >= SHAPES:
            self._shapes.clear()
        runnable = native if native is not None and native.runs else None
        self._shapes[x.shape] = runnable, shapes[-1]
        return self._shapes[x.shape]

    def _one_by_one(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:
        """Return the output, and the tensors that each kernel keeps."""
        before = old[1] if old is not None and len(old) == 2 and not self.lasting else None
        saved = run_steps(self._steps, [x], before)
        return [saved[-1][0], saved]

    def pull(self, saved: KeptTensors, z: Tensor, wanted: Wanted, g: Gradients | None) -> ToInputs:
        if len(saved) == 2:
            needs = needed(self._steps, wanted, weights=g is not None)
            return tuple(pull_steps(self._steps, saved[1], z, needs, g))
        _, x, inner, y = saved
        native, _ = self._shapes.get(x.shape) or self._sizes_of(x)
        if native is None:
            raise RuntimeError("a record of the C code, which cannot step its input")
        to = torch.empty_like(x) if wanted[0] else None
        d = like(self._slopes, 0, (native.d,), self._w)
        self._slopes = [self._slopes[1], d]
        m = like(self._messages, 0, (native.messages(wanted=wanted[0]),), self._w)
        self._messages[0] = m
        at_once = None if g is None else g.at_once
        limit = 0.0 if at_once is None else at_once.limit
        z = z.to(self._w.dtype).contiguous()
        moved = native.pull(x, inner, y, z, d, m, to, self._alphas(at_once), limit)
        if g is not None:
            g.moved += sum(n for i, n in enumerate(self._trained) if moved >> i & 1)
            g.later.append(lambda g: self._put(g, native, x, inner, d, moved))
            if g.moved < len(g):
                g.complete()
        return (to,)

    def _alphas(self, at_once: AtOnce | None) -> array[float] | None:
        """Return the rates of W and b by operation."""
        if at_once is None:
            return None
        if self._rates is None or self._rates[0] is not at_once:
            rates = array("d")
            for places in self._places:
                of = [0.0 if w is None else at_once.rates[w] for w in places]
                rates.extend((*of, 0.0, 0.0)[:2])
            self._rates = at_once, rates
        return self._rates[1]

    def _put(
        self, g: Gradients, native: NativeChain, x: Tensor, inner: Tensor, d: Tensor, moved: int
    ) -> None:
        """Put the gradients into `g`, as factors."""
        for i, (op, places) in enumerate(zip(self._operations, self._places, strict=True)):
            if not places:
                continue
            done, of_z = bool(moved >> i & 1), native.saved(i, d)
            parts: tuple[Gradient, ...]
            if op.kind is OperationKind.LINEAR:
                parts = Outer(of_z, native.read_by(i, x, inner), done), Column(of_z, done)
            elif op.kind is OperationKind.NORM:
                parts = Column(of_z[:1], done), Column(of_z[1:], done)
            else:
                rows = 0 if op.w is None else op.w.shape[0]
                parts = (TableRows(x.view(-1), of_z, rows, done),)
            g.put(places, parts)


def chain_of(kernels: Sequence[Kernel], reads: Sequence[tuple[int, ...]]) -> Chain | None:
    """Return the chain of these kernels; None where the C code lacks one, or torch is faster.

    reads: by kernel, its inputs (0: the chain's, i + 1: what kernel i makes).
    """
    readers = Counter(place for places in reads for place in places)
    operations: list[Operation] = []
    of_weights: list[tuple[int | None, ...]] = []
    values = [0]
    for i, (kernel, places) in enumerate(zip(kernels, reads, strict=True)):
        if isinstance(kernel, Reshape):
            values.append(values[places[0]])
            continue
        op = kernel.operation(tuple(values[p] for p in places))
        if op is None:
            return None
        behind = operations[-1] if operations and places == (i,) and readers[i] == 1 else None
        if behind is not None and op.ends(behind):
            operations[-1] = behind._replace(act=op.act)
        else:
            operations.append(op)
            of_weights.append(() if op.w is None else kernel.weights)
        values.append(len(operations))
    of_x = {op.kind is OperationKind.EMBEDDING for op in operations if 0 in op.reads}
    weights = [t for op in operations for t in (op.w, op.b) if t is not None]
    fits = 0 < len(operations) == values[-1] <= MOST and len(of_x) == 1
    fits = fits and all(is_readable(w) and w.dtype is weights[0].dtype for w in weights)
    linear = [op for op in operations if op.kind is OperationKind.LINEAR]
    if not fits or not linear or not all(op.pays() for op in linear):
        return None
    return Chain(kernels, reads, operations, values, of_weights)
