"""Closed-form steps of single operations: the value, and both vector-Jacobian products.

Where autograd builds a graph at every call, a kernel keeps the tensors of its products in a list
whose memory is used again for a later sample (`old`), so that in steady state nothing but a block's
signals is allocated. Sources: the derivatives are those of PyTorch's own backward operators, called
directly.

B: batch; R: rows, that is the batch times further dimensions; I, O: inputs and outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Size, Tensor, nn

from hamdist.dynamics.modules.subspace import Subspace
from hamdist.dynamics.native.chain import Activation, Operation, OperationKind
from hamdist.dynamics.native.convolution import Convolution
from hamdist.dynamics.native.rows import reads as is_readable
from hamdist.dynamics.vjp.gradient import Column, Gradients, Outer, TableRows

aten = torch.ops.aten

# What a kernel keeps of one call: its output first, then its own things.
KeptTensors = list[Any]
Wanted: TypeAlias = tuple[bool, ...]  # by input of a kernel, whether its message is needed
ToInputs: TypeAlias = tuple[Tensor | None, ...]  # by input, z^T df/dx


class Kernel(ABC):
    """One operation. weights: places of its parameters in the function's list; None: not trained.

    owns: the output is memory of the kernel that the products do not read, so that an activation
    behind it may work in place. in_place: it works in its input's memory. forward: from (old, *x)
    to f(x) and the tensors that `pull` needs; old: those of an earlier call, to be overwritten.
    """

    owns = True
    in_place = False
    weights: tuple[int | None, ...] = ()
    forward: Callable[..., KeptTensors]

    def operation(self, reads: tuple[int, ...]) -> Operation | None:  # noqa: ARG002
        """Return it for the C code, on these values; None where that has none."""
        return None

    @abstractmethod
    def pull(self, saved: KeptTensors, z: Tensor, wanted: Wanted, g: Gradients | None) -> ToInputs:
        """Return z^T df/dx per input (None where not wanted); put z^T df/dtheta into `g`.

        Args:
            saved: what `forward` has returned for these inputs.
            z: cotangent of the output, of its shape.
            wanted: by input, whether its product is.
            g: collects the gradients of the weights; None: they stay where they are.
        """


def like(old: KeptTensors | None, place: int, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """Return memory for a result of `shape`: entry `place` of an earlier call's tensors, where that
    fits; else new memory, of the type and on the device of x.
    """
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


class Linear(Kernel):
    """f = x W^T + b, or the relu of it; with d = z (behind a relu: where f > 0)
    z^T df/dx = d W, z^T df/dW = d^T x, z^T df/db = sum of d's rows.

    relu: set where a relu is the only reader of the layer.
    """

    def __init__(self, module: nn.Linear, weights: tuple[int | None, ...]) -> None:
        self.weights = weights
        self.relu = False
        self.into, self.out = module.in_features, module.out_features
        self._w = module.weight.data
        self._w_t = self._w.t()
        self._b = None if module.bias is None else module.bias.data

    def operation(self, reads: tuple[int, ...]) -> Operation | None:
        act = Activation.RELU if self.relu else Activation.IDENTITY
        return Operation(OperationKind.LINEAR, reads, self._w, self._b, act, width=self.out)

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

    def pull(self, saved: KeptTensors, z: Tensor, wanted: Wanted, g: Gradients | None) -> ToInputs:
        _, x, y = saved
        d = z if z.dim() == 2 else z.reshape(y.shape)
        if self.relu:
            d = aten.threshold_backward(d, y, 0)
        to = d @ self._w if wanted[0] else None
        if g is not None:
            g.put(self.weights, (Outer(d, x), Column(d)))
        return (to if to is None or z.dim() == 2 else to.view(*z.shape[:-1], self.into),)


class Embedding(Kernel):
    """f = rows of a table at the indices x, an integer tensor; the table's product are z's rows."""

    def __init__(self, module: nn.Embedding, weights: tuple[int | None, ...]) -> None:
        self.weights = weights
        self._table = module.weight.data
        self._padding = module.padding_idx

    def operation(self, reads: tuple[int, ...]) -> Operation | None:
        padding = -1 if self._padding is None else self._padding
        return Operation(
            OperationKind.EMBEDDING, reads, self._table, number=padding, width=self._table.shape[1]
        )

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        return [nn.functional.embedding(x, self._table), x]

    def pull(self, saved: KeptTensors, z: Tensor, wanted: Wanted, g: Gradients | None) -> ToInputs:
        (w,) = self.weights
        if g is not None and w is not None:
            index, z_rows = saved[1].reshape(-1), z.reshape(-1, z.shape[-1])
            if self._padding is not None:
                z_rows = z_rows * (index != self._padding).unsqueeze(1).to(z_rows.dtype)
            g[w] = TableRows(index, z_rows, self._table.shape[0])
        return (None,) * len(wanted)


class Unary(Kernel):
    """An operation without weights on one input."""

    def product(self, saved: KeptTensors, z: Tensor) -> Tensor:
        """Return z^T df/dx."""
        raise NotImplementedError

    def pull(self, saved: KeptTensors, z: Tensor, wanted: Wanted, g: Gradients | None) -> ToInputs:  # noqa: ARG002
        return (self.product(saved, z) if wanted[0] else None,)


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
        act: Activation = Activation.IDENTITY,
    ) -> None:
        self.in_place = in_place
        self.act = act
        self._run = run_in_place if in_place else run
        self._back = back

    def operation(self, reads: tuple[int, ...]) -> Operation | None:
        return Operation(OperationKind.ACTIVATION, reads, act=self.act) if self.act else None

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        return [self._run(x)]

    def product(self, saved: KeptTensors, z: Tensor) -> Tensor:
        return self._back(z, saved[0])


class FromInput(Unary):
    """An elementwise operation whose derivative follows from its input: df/dx z = back(z, x)."""

    def __init__(
        self, run: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self._run = run
        self._back = back

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        return [self._run(x), x]

    def product(self, saved: KeptTensors, z: Tensor) -> Tensor:
        return self._back(z, saved[1])


class MaxPool2d(Unary):
    """PyTorch's largest of a window, whose place is kept."""

    def __init__(self, m: nn.MaxPool2d) -> None:
        self._how = *pairs(m.kernel_size, m.stride, m.padding, m.dilation), m.ceil_mode

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        y, places = aten.max_pool2d_with_indices(x, *self._how)
        return [y, x, places]

    def product(self, saved: KeptTensors, z: Tensor) -> Tensor:
        product: Tensor = aten.max_pool2d_with_indices_backward(z, saved[1], *self._how, saved[2])
        return product


def pairs(*sizes: int | tuple[int, int]) -> list[list[int]]:
    """Return sizes of images or windows by row and column."""
    return [[size, size] if isinstance(size, int) else list(size) for size in sizes]


class Reshape(Unary):
    """f = x in another shape."""

    owns = False

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self._run = run

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        return [self._run(x), x.shape]

    def product(self, saved: KeptTensors, z: Tensor) -> Tensor:
        return z.reshape(saved[1])


class Projection(Unary):
    """f = Q Q^T x of the last dimension (dynamics/modules/subspace.py), which is symmetric."""

    def __init__(self, module: Subspace) -> None:
        self._projection = module.projection
        self._table = module.table()

    def operation(self, reads: tuple[int, ...]) -> Operation | None:
        width = self._table.shape[1]
        return Operation(OperationKind.PROJECTION, reads, b=self._table, width=width)

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        return [x @ self._projection]

    def product(self, saved: KeptTensors, z: Tensor) -> Tensor:  # noqa: ARG002
        return z @ self._projection


class ScaleKernel(Unary):
    """f = a x, with a number a."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def operation(self, reads: tuple[int, ...]) -> Operation | None:
        return Operation(OperationKind.SCALE, reads, number=self._factor)

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        return [x * self._factor]

    def product(self, saved: KeptTensors, z: Tensor) -> Tensor:  # noqa: ARG002
        return z * self._factor


class Add(Kernel):
    """f = x_1 + s x_2, of tensors of one shape (a residual add)."""

    def __init__(self, sign: float = 1.0) -> None:
        self._sign = sign

    def operation(self, reads: tuple[int, ...]) -> Operation | None:
        return Operation(OperationKind.ADD, reads, number=self._sign)

    def forward(self, old: KeptTensors | None, *x: Tensor) -> KeptTensors:  # noqa: ARG002
        a, b = x
        return [torch.add(a, b, alpha=self._sign), a.shape, b.shape]

    def pull(self, saved: KeptTensors, z: Tensor, wanted: Wanted, g: Gradients | None) -> ToInputs:  # noqa: ARG002
        a, b = wanted
        second = z if self._sign == 1 else z * self._sign
        return (
            (z if z.shape == saved[1] else z.sum_to_size(saved[1])) if a else None,
            (second if z.shape == saved[2] else second.sum_to_size(saved[2])) if b else None,
        )


class LayerNorm(Kernel):
    """PyTorch's layer norm and its backward operator, on the weights of today."""

    def __init__(self, module: nn.LayerNorm, weights: tuple[int | None, ...]) -> None:
        self.weights = weights
        self._shape = list(module.normalized_shape)
        self._w = None if module.weight is None else module.weight.data
        self._b = None if module.bias is None else module.bias.data
        self._eps = module.eps

    def operation(self, reads: tuple[int, ...]) -> Operation | None:
        if self._w is not None and len(self._shape) > 1:
            return None
        width = math.prod(self._shape)
        return Operation(OperationKind.NORM, reads, self._w, self._b, number=self._eps, width=width)

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        y, mean, rstd = torch.native_layer_norm(x, self._shape, self._w, self._b, self._eps)
        return [y, x, mean, rstd]

    def pull(self, saved: KeptTensors, z: Tensor, wanted: Wanted, g: Gradients | None) -> ToInputs:
        _, x, mean, rstd = saved
        mask = [wanted[0], *(g is not None and w is not None for w in self.weights)]
        to, g_w, g_b = aten.native_layer_norm_backward(
            z.contiguous(), x, self._shape, mean, rstd, self._w, self._b, mask
        )
        if g is not None:
            g.put(self.weights, (g_w, g_b))
        return (to if wanted[0] else None,)


class Conv2d(Kernel):
    """PyTorch's convolution and its backward operator, on the weights of today, or the C code's.

    native: the C code makes images of shapes for which that pays (native/convolution.py).
    """

    def __init__(
        self, module: nn.Conv2d, weights: tuple[int | None, ...], *, native: bool = False
    ) -> None:
        self.weights = weights
        self._w = module.weight.data
        self._b = None if module.bias is None else module.bias.data
        padding = module.padding
        # module.padding is a string only for 'same' and 'valid' (refused by program.py)
        self._how = (list(module.stride), [int(p) for p in padding], list(module.dilation))
        self._groups = module.groups
        tensors = [t for t in (self._w, self._b) if t is not None]
        self._native = native and self._groups == 1 and all(map(is_readable, tensors))
        self._convolutions: dict[Size, Convolution | None] = {}  # by shape of x

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        convolution = self.convolution(x)
        if convolution is not None:
            x = x.contiguous()
            return [convolution.forward(x, self._w, self._b), x]
        stride, padding, dilation = self._how
        y = torch.conv2d(x, self._w, self._b, stride, padding, dilation, self._groups)
        return [y, x]

    def pull(self, saved: KeptTensors, z: Tensor, wanted: Wanted, g: Gradients | None) -> ToInputs:
        (_, x), (stride, padding, dilation) = saved, self._how
        mask = [wanted[0], *(g is not None and w is not None for w in self.weights)]
        convolution = self.convolution(x)
        if convolution is not None:
            sums = {"message": wanted[0], "gradients": any(mask[1:])}
            to, g_wb = convolution.pull(x, self._w, z.contiguous(), **sums)
            if g is not None and g_wb is not None:
                g.put(self.weights, (g_wb[:, :-1].reshape(self._w.shape), g_wb[:, -1]))
            return (to,)
        sizes = None if self._b is None else list(self._b.shape)
        to, g_w, g_b = aten.convolution_backward(
            z, x, self._w, sizes, stride, padding, dilation, False, [0, 0], self._groups, mask
        )
        if g is not None:
            g.put(self.weights, (g_w, g_b))
        return (to if wanted[0] else None,)

    def convolution(self, x: Tensor) -> Convolution | None:
        """Return the C code's for images like x; None where torch makes them."""
        if not self._native or x.dtype is not self._w.dtype or not x.is_cpu:
            return None
        if x.shape not in self._convolutions:
            fits = x.dim() == 4 and x.shape[1] == self._w.shape[1]
            made = Convolution(x.shape, self._w.shape, *self._how) if fits else None
            self._convolutions[x.shape] = made if made is not None and made.pays else None
        return self._convolutions[x.shape]
