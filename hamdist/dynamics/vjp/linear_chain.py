"""Linear layers, each read by the next one alone, as one kernel.

All of them run in one call of the C code (native/rows.py); where that does not apply, one layer
after the other.

R: rows (batch, times further dimensions); I, O: inputs and outputs.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from torch import Tensor

from hamdist.dynamics.native.rows import NativeLayers
from hamdist.dynamics.vjp.gradient import AtOnce, Column, Gradients, Outer
from hamdist.dynamics.vjp.kernels import KeptTensors, Linear, like, rows_of_width


class Chain:
    """f = f_n( ... f_1(x)), of linear layers with or without a relu behind them.

    lasting: the output leaves the block, so that its memory is not used again. Memory that stays
    inside is: activations by a later forward pass (see `Kernel.forward`), d and the messages by the
    pull after the next, for until then they may be factors of omega.
    """

    owns = False
    in_place = False

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.layers = list(layers)
        self.weights = tuple(w for layer in layers for w in layer.weights)
        self.lasting = False
        self.apart = False  # True: one layer after the other, in any case
        self._trained = [sum(w is not None for w in layer.weights) for layer in layers]
        for i, layer in enumerate(self.layers):
            layer.native = layer.whole()
            layer.lends = i > 0
            layer.owns_z = i < len(layers) - 1
        self._into, self._out = layers[0].into, layers[-1].out
        self._rows = NativeLayers.of([layer.parts() for layer in layers])
        self._masked: list[Tensor | None] = [None, None]
        self._message: list[Tensor | None] = [None]
        self._rates: tuple[AtOnce, array[float]] | None = None

    @property
    def lends(self) -> bool:
        """Return True if z^T df/dx stays inside the block."""
        return self.layers[0].lends

    @lends.setter
    def lends(self, lends: bool) -> None:
        self.layers[0].lends = lends

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:
        one = rows_of_width(x, self._into)
        rows = self._rows
        many = one.shape[0]
        if rows is None or self.apart or not rows.takes(many) or not rows.reads(one):
            return self._one_by_one(old, x)
        old = old if old is not None and len(old) == 4 else None  # of such a call, too
        inner = like(old, 2, (rows.room(many)[0],), x)
        if old is None or inner is not old[2]:
            inner.zero_()  # what pads the layers' outputs is part of the record
        y = like(None if self.lasting else old, 3, (many, self._out), x)
        rows.forward(one, inner, y)
        return [y if x.dim() == 2 else y.view(*x.shape[:-1], self._out), one, inner, y]

    def _one_by_one(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:
        """Return the output, and the tensors that each layer keeps."""
        before = old[1] if old is not None and len(old) == 2 else [None] * len(self.layers)
        kept = []
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            kept.append(layer.forward(None if last and self.lasting else before[i], x))
            x = kept[-1][0]
        return [x, kept]

    def pull(
        self, kept: KeptTensors, z: Tensor, wanted: tuple[bool, ...], g: Gradients | None
    ) -> tuple[Tensor | None, ...]:
        if len(kept) == 2:
            return self._pull_one_by_one(kept, z, wanted, g)
        _, x, inner, y = kept
        rows = self._rows
        one = z if z.dim() == 2 else z.reshape(y.shape)
        if rows is None or not rows.reads(one):
            kept = [kept[0], self._apart(x, inner, y)]
            return self._pull_one_by_one(kept, z, wanted, g)
        _, of_d, of_m = rows.room(x.shape[0])
        to = self.layers[0].lent(x) if wanted[0] else None
        d = like(self._masked, 0, (of_d,), x)
        self._masked = [self._masked[1], d]
        m = self._message[0] = like(self._message, 0, (of_m,), x)
        at_once = None if g is None else g.at_once
        limit = 0.0 if at_once is None else at_once.limit
        moved = rows.pull(x, inner, y, one, d, m, to, self._alphas(at_once), limit)
        if g is not None:
            self._tell(g, moved, lambda g: self._factors(g, rows, x, inner, d, moved))
        return (to if to is None or z.dim() == 2 else to.view(*z.shape[:-1], self._into),)

    def _alphas(self, at_once: AtOnce | None) -> array[float] | None:
        """Return the rates of the layers' matrices and biases."""
        if at_once is None:
            return None
        if self._rates is None or self._rates[0] is not at_once:
            rates = [0.0 if w is None else at_once.rates[w] for w in self.weights]
            self._rates = at_once, array("d", rates)
        return self._rates[1]

    def _tell(self, g: Gradients, moved: int, factors: Callable[[Gradients], None]) -> None:
        """Put the factors into `g` at once where weights wait for them, otherwise on demand."""
        for i, trained in enumerate(self._trained):
            if moved >> i & 1:
                g.moved += trained
        g.later.append(factors)
        if g.moved < len(g):
            g.settle()

    def _factors(
        self, g: Gradients, rows: NativeLayers, x: Tensor, inner: Tensor, d: Tensor, moved: int
    ) -> None:
        many, batch = len(self.layers), x.shape[0]
        inputs = [x, *rows.outputs(inner, many - 1, batch)]
        ds = rows.outputs(d, many, batch)
        for i, (layer, d_i) in enumerate(zip(self.layers, ds, strict=True)):
            done = bool(moved >> i & 1)
            g.put(layer.weights, (Outer(d_i, inputs[i], done), Column(d_i, done)))

    def _apart(self, x: Tensor, inner: Tensor, y: Tensor) -> list[KeptTensors]:
        """Return the tensors that the layers would have kept, had they been called one by one."""
        many = len(self.layers) - 1
        outputs = [*(self._rows.outputs(inner, many, x.shape[0]) if self._rows else []), y]
        return [[out, x_i, out] for x_i, out in zip([x, *outputs[:-1]], outputs, strict=True)]

    def _pull_one_by_one(
        self, kept: KeptTensors, z: Tensor, wanted: tuple[bool, ...], g: Gradients | None
    ) -> tuple[Tensor | None, ...]:
        trained = [g is not None and any(w is not None for w in k.weights) for k in self.layers]
        about: Tensor | None = z
        for i in range(len(self.layers) - 1, -1, -1):
            if about is None:
                break
            needed = wanted[0] or any(trained[:i])
            (about,) = self.layers[i].pull(kept[1][i], about, (needed,), g)
        return (about if wanted[0] else None,)
