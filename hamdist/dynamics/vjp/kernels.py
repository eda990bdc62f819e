"""Closed-form steps of single operations: the value, and both vector-Jacobian products.

Where autograd builds a graph at every call, a kernel keeps the tensors of its products in a list
whose memory is used again for a later sample (`old`), so that in steady state nothing but a block's
signals is allocated. Sources: the derivatives are those of PyTorch's own backward operators, called
directly.

B: batch; R: rows, that is the batch times further dimensions; I, O: inputs and outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hamdist.dynamics.native import rows
from hamdist.dynamics.vjp.gradient import AtOnce, Column, Gradients, Outer, TableRows

aten = torch.ops.aten

# What a kernel keeps of one call: its output first, then its own things.
KeptTensors = list[Any]


class Kernel(Protocol):
    """One operation. weights: places of its parameters in the function's list; None: not trained.

    owns: the output is memory of the kernel that the products do not read, so that an activation
    behind it may work in place. in_place: it works in its input's memory.
    """

    owns: bool

    @property
    def in_place(self) -> bool: ...

    @property
    def weights(self) -> tuple[int | None, ...]: ...

    @property
    def forward(self) -> Callable[..., KeptTensors]:
        """Return a function (old, *x) -> f(x) and the tensors that `pull` needs.

        old: those of an earlier call, to be overwritten.
        """

    def pull(
        self, kept: KeptTensors, z: Tensor, wanted: tuple[bool, ...], g: Gradients | None
    ) -> tuple[Tensor | None, ...]:
        """Return z^T df/dx per input (None where not wanted); put z^T df/dtheta into `g`."""


def like(old: KeptTensors | None, place: int, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """Return memory for a result: that of an earlier call, where it fits."""
    if old is not None:
        memory = old[place]
        if memory is not None and memory.shape == shape:
            return memory  # type: ignore[no-any-return]
    return x.new_empty(shape)


def rows_of_width(x: Tensor, width: int) -> Tensor:
    """Return x, (..., I), as (R, I). Raises RuntimeError for another width, as torch's layer."""
    if x.shape[-1] != width:
        raise RuntimeError(f"a linear layer of {width} inputs got a tensor {tuple(x.shape)}")
    return x if x.dim() == 2 else x.reshape(-1, width)


class Linear:
    """f = x W^T + b, or the relu of it; with d = z (behind a relu: where f > 0)
    z^T df/dx = d W, z^T df/dW = d^T x, z^T df/db = sum of d's rows.

    relu: set where a relu is the only reader of the layer. lends: z^T df/dx stays inside the block,
    so that its memory is used again: by the pull after the next, for until then it may be a factor
    of omega. native: elementwise operations run in C (native/rows.py), in as few passes as can be;
    and the weights move here, where they may. owns_z: z is memory that only the next layer used,
    so d may be written over it.
    """

    owns = True
    in_place = False

    def __init__(self, module: nn.Linear, weights: tuple[int | None, ...]) -> None:
        self.weights = weights
        self.relu = False
        self.lends = False
        self.native = False
        self.owns_z = False
        self._masked: list[Tensor | None] = [None, None]
        self.into, self.out = module.in_features, module.out_features
        self._products: list[Tensor | None] = [None, None]
        self._w = module.weight.data
        self._w_t = self._w.t()
        self._b = None if module.bias is None else module.bias.data

    def whole(self) -> bool:
        """Return True if the C code can step the weights."""
        known = [t for t in (self._w, self._b) if t is not None]
        return all(rows.reads(t) and t.dtype is self._w.dtype for t in known)

    def parts(self) -> tuple[Tensor, Tensor | None, bool]:
        """Return W (O, I), b, and True if a relu is behind them."""
        return self._w, self._b, self.relu

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:
        flat = rows_of_width(x, self.into)
        y = like(old, 2, (flat.shape[0], self.out), x)
        if self._b is None:
            torch.mm(flat, self._w_t, out=y)
        else:
            torch.addmm(self._b, flat, self._w_t, out=y)
        if self.relu:
            torch.relu_(y)
        out = y if x.dim() == 2 else y.view(*x.shape[:-1], self.out)
        return [out, flat, y]

    def pull(
        self, kept: KeptTensors, z: Tensor, wanted: tuple[bool, ...], g: Gradients | None
    ) -> tuple[Tensor | None, ...]:
        _, x, y = kept
        d = z if z.dim() == 2 else z.reshape(y.shape)
        native = self.native and rows.reads(d) and d.dtype is self._w.dtype
        norm: float | None = None
        if self.relu and native:
            z_rows = d
            # d may take z's place where only this layer reads z. Otherwise two buffers take turns:
            # the d of the pull before may still be a factor of omega.
            if not self.owns_z:
                d = like(self._masked, 0, y.shape, y)
                self._masked = [self._masked[1], d]
            norm = rows.masked(z_rows, y, d)
        elif self.relu:
            d = aten.threshold_backward(d, y, 0)
        to = None
        if wanted[0]:
            to = self.lent(x)
            torch.mm(d, self._w, out=to)
        if g is not None:
            w, b = self.weights
            moved = native and g.at_once is not None and self._move(d, x, norm, g.at_once)
            g.moved += moved * ((w is not None) + (b is not None))
            g.put(self.weights, (Outer(d, x, moved), Column(d, moved)))
        return (to if to is None or z.dim() == 2 else to.view(*z.shape[:-1], self.into),)

    def _move(self, d: Tensor, x: Tensor, norm: float | None, at_once: AtOnce) -> bool:
        """W += alpha d^T x, b += beta sum of d's rows, where a number that the norm of both
        together does not exceed is in the limit: |d| (|x|^2 + R)^(1/2). norm: |d|, if known."""
        w, b = self.weights
        of_d, of_x = rows.norm(d) if norm is None else norm, rows.norm(x)
        if of_d is None or of_x is None or not d.is_contiguous():
            return False
        if not of_d * math.sqrt(of_x * of_x + d.shape[0]) <= at_once.limit:
            return False
        if w is not None and at_once.rates[w]:
            self._w.addmm_(d.t(), x, alpha=at_once.rates[w])
        if b is not None and self._b is not None and at_once.rates[b]:
            rows.add_columns(self._b, d, at_once.rates[b])
        return True

    def lent(self, x: Tensor) -> Tensor:
        """Memory for z^T df/dx."""
        to = like(self._products if self.lends else None, 0, x.shape, x)
        if self.lends:
            self._products = [self._products[1], to]
        return to


class Embedding:
    """f = rows of a table at the indices x, an integer tensor; the table's product are z's rows."""

    owns = True
    in_place = False

    def __init__(self, module: nn.Embedding, weights: tuple[int | None, ...]) -> None:
        self.weights = weights
        self._table = module.weight.data
        self._padding = module.padding_idx

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        return [nn.functional.embedding(x, self._table), x]

    def pull(
        self, kept: KeptTensors, z: Tensor, wanted: tuple[bool, ...], g: Gradients | None
    ) -> tuple[Tensor | None, ...]:
        (w,) = self.weights
        if g is not None and w is not None:
            index, z_rows = kept[1].reshape(-1), z.reshape(-1, z.shape[-1])
            if self._padding is not None:
                z_rows = z_rows * (index != self._padding).unsqueeze(1).to(z_rows.dtype)
            g[w] = TableRows(index, z_rows, self._table.shape[0])
        return (None,) * len(wanted)


class Unary:
    """An operation without weights on one input."""

    weights = ()
    owns = True
    in_place = False

    def product(self, kept: KeptTensors, z: Tensor) -> Tensor:
        """Return z^T df/dx."""
        raise NotImplementedError

    def pull(
        self,
        kept: KeptTensors,
        z: Tensor,
        wanted: tuple[bool, ...],
        g: Gradients | None,  # noqa: ARG002
    ) -> tuple[Tensor | None, ...]:
        return (self.product(kept, z) if wanted[0] else None,)


class FromResult(Unary):
    """An elementwise activation whose derivative follows from its result: df/dx z = back(z, f).

    It works in place where its input's memory may be overwritten (`Kernel.owns`).
    """

    owns = False

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        run_in_place: Callable[[Tensor], Tensor],
        back: Callable[[Tensor, Tensor], Tensor],
        *,
        in_place: bool,
    ) -> None:
        self.in_place = in_place
        self._run = run_in_place if in_place else run
        self._back = back

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        return [self._run(x)]

    def product(self, kept: KeptTensors, z: Tensor) -> Tensor:
        return self._back(z, kept[0])


class FromInput(Unary):
    """An elementwise operation whose derivative follows from its input: df/dx z = back(z, x)."""

    def __init__(
        self, run: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self._run = run
        self._back = back

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        return [self._run(x), x]

    def product(self, kept: KeptTensors, z: Tensor) -> Tensor:
        return self._back(z, kept[1])


class Reshape(Unary):
    """f = x in another shape."""

    owns = False

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self._run = run

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        return [self._run(x), x.shape]

    def product(self, kept: KeptTensors, z: Tensor) -> Tensor:
        return z.reshape(kept[1])


class ScaleKernel(Unary):
    """f = a x, with a number a."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        return [x * self._factor]

    def product(self, kept: KeptTensors, z: Tensor) -> Tensor:  # noqa: ARG002
        return z * self._factor


class Add:
    """f = x_1 + s x_2, of tensors of one shape (a residual add)."""

    weights = ()
    owns = True
    in_place = False

    def __init__(self, sign: float = 1.0) -> None:
        self._sign = sign

    def forward(self, old: KeptTensors | None, *x: Tensor) -> KeptTensors:  # noqa: ARG002
        a, b = x
        return [torch.add(a, b, alpha=self._sign), a.shape, b.shape]

    def pull(
        self,
        kept: KeptTensors,
        z: Tensor,
        wanted: tuple[bool, ...],
        g: Gradients | None,  # noqa: ARG002
    ) -> tuple[Tensor | None, ...]:
        a, b = wanted
        second = z if self._sign == 1 else z * self._sign
        return (
            (z if z.shape == kept[1] else z.sum_to_size(kept[1])) if a else None,
            (second if z.shape == kept[2] else second.sum_to_size(kept[2])) if b else None,
        )


class LayerNorm:
    """PyTorch's layer norm and its backward operator, on the weights of today."""

    owns = True
    in_place = False

    def __init__(self, module: nn.LayerNorm, weights: tuple[int | None, ...]) -> None:
        self.weights = weights
        self._shape = list(module.normalized_shape)
        self._w = None if module.weight is None else module.weight.data
        self._b = None if module.bias is None else module.bias.data
        self._eps = module.eps

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        y, mean, rstd = torch.native_layer_norm(x, self._shape, self._w, self._b, self._eps)
        return [y, x, mean, rstd]

    def pull(
        self, kept: KeptTensors, z: Tensor, wanted: tuple[bool, ...], g: Gradients | None
    ) -> tuple[Tensor | None, ...]:
        _, x, mean, rstd = kept
        mask = [wanted[0], *(g is not None and w is not None for w in self.weights)]
        to, g_w, g_b = aten.native_layer_norm_backward(
            z.contiguous(), x, self._shape, mean, rstd, self._w, self._b, mask
        )
        if g is not None:
            g.put(self.weights, (g_w, g_b))
        return (to if wanted[0] else None,)


class Conv2d:
    """PyTorch's convolution and its backward operator, on the weights of today."""

    owns = True
    in_place = False

    def __init__(self, module: nn.Conv2d, weights: tuple[int | None, ...]) -> None:
        self.weights = weights
        self._w = module.weight.data
        self._b = None if module.bias is None else module.bias.data
        padding = module.padding
        # module.padding is a string only for 'same' and 'valid' (refused by program.py)
        self._how = (list(module.stride), [int(p) for p in padding], list(module.dilation))
        self._groups = module.groups

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        stride, padding, dilation = self._how
        y = torch.conv2d(x, self._w, self._b, stride, padding, dilation, self._groups)
        return [y, x]

    def pull(
        self, kept: KeptTensors, z: Tensor, wanted: tuple[bool, ...], g: Gradients | None
    ) -> tuple[Tensor | None, ...]:
        stride, padding, dilation = self._how
        mask = [wanted[0], *(g is not None and w is not None for w in self.weights)]
        sizes = None if self._b is None else list(self._b.shape)
        to, g_w, g_b = aten.convolution_backward(
            z, kept[1], self._w, sizes, stride, padding, dilation, False, [0, 0], self._groups, mask
        )
        if g is not None:
            g.put(self.weights, (g_w, g_b))
        return (to if wanted[0] else None,)
