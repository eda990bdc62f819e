"""The arithmetic alone: the steps of some Linear layers as the least sequence of torch calls, or as
one call of hamdist's C code a pass.

    h = relu(x W^T + b)                        forward
    d = d * (h > 0),  m = d W                  to the layer below
    W <- W - lr d^T x,  b <- b - lr sum_B d    in place, no gradient tensor

No signal is taken or sent, nothing is allocated, nothing goes through autograd. This is the floor
of a block's step.

B: batch, I: inputs, O: outputs.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hamdist.dynamics.native.chain import Activation, NativeChain, Operation, OperationKind
from hamdist.dynamics.native.rows import built, gemm
from harness.turns import per_step
from harness.works import LR, Work

# Arriving messages of a share that is not the last one: small, so that its weights stay put.
MESSAGE_SCALE = 1e-4
MATRICES, VECTORS, NATIVE = "matrices", "vectors", "C code"


class Linear:
    """A layer and its buffers. wanted: whether a message goes on below. vectors: products of
    vectors instead of matrices of one row (batch 1)."""

    def __init__(
        self, layer: nn.Linear, batch: int, *, relu: bool, wanted: bool, vectors: bool
    ) -> None:
        weight, bias = layer.weight.data, layer.bias.data
        self.weight, self.bias = weight, bias
        self._relu, self._wanted, self._vectors = relu, wanted, vectors
        self.x = torch.zeros(batch, layer.in_features, dtype=weight.dtype)
        self.h = torch.zeros(batch, layer.out_features, dtype=weight.dtype)
        self.message = torch.zeros_like(self.x)
        self._d = torch.zeros_like(self.h)
        self._g = torch.zeros_like(bias)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        if self._vectors:
            torch.addmv(self.bias, self.weight, x[0], out=self.h[0])
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=self.h)
        return self.h.relu_() if self._relu else self.h

    def backward(self, d: Tensor) -> Tensor:
        if self._relu:
            d = torch.ops.aten.threshold_backward.grad_input(d, self.h, 0.0, grad_input=self._d)
        if self._vectors:
            self._vector_products(d[0])
        else:
            if self._wanted:
                torch.mm(d, self.weight, out=self.message)
            self.weight.addmm_(d.t(), self.x, alpha=-LR)
            self.bias.add_(torch.sum(d, 0, out=self._g), alpha=-LR)
        return self.message

    def _vector_products(self, d: Tensor) -> None:
        if self._wanted:
            torch.mv(self.weight.t(), d, out=self.message[0])
        self.weight.addr_(d, self.x[0], alpha=-LR)
        self.bias.add_(d, alpha=-LR)


class Layers:
    """Linear layers, one call of torch after the other."""

    def __init__(
        self, layers: Sequence[nn.Linear], batch: int, *, first: bool, last: bool, vectors: bool
    ) -> None:
        ends = len(layers) - 1
        self._layers = [
            Linear(
                layer, batch, relu=i < ends or not last, wanted=i > 0 or not first, vectors=vectors
            )
            for i, layer in enumerate(layers)
        ]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._layers:
            x = layer.forward(x)
        return x

    def backward(self, d: Tensor) -> None:
        for layer in reversed(self._layers):
            d = layer.backward(d)


class NativeLayers:
    """Linear layers in one call of the C code a pass."""

    def __init__(self, layers: Sequence[nn.Linear], batch: int, *, first: bool, last: bool) -> None:
        widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
        operations = []
        for i, layer in enumerate(layers):
            relu = i < len(layers) - 1 or not last
            operations.append(
                Operation(
                    OperationKind.LINEAR,
                    (i,),
                    layer.weight.data,
                    layer.bias.data,
                    Activation.RELU if relu else Activation.IDENTITY,
                    width=layer.out_features,
                )
            )
        torch.set_num_threads(1)
        self._chain = NativeChain(operations, [(batch * width, width) for width in widths])
        like = layers[0].weight.data
        self._x = like.new_zeros(batch, widths[0])
        self._y = like.new_zeros(batch, widths[-1])
        self._inner, self._d = like.new_zeros(self._chain.inner), like.new_zeros(self._chain.d)
        self._messages = like.new_zeros(self._chain.messages(wanted=not first))
        self._to = None if first else torch.zeros_like(self._x)
        self._rates = array("d", [-LR] * (2 * len(layers)))

    def forward(self, x: Tensor) -> Tensor:
        self._x = x
        self._chain.forward(x, self._inner, self._y)
        return self._y

    def backward(self, d: Tensor) -> None:
        memory = self._inner, self._y, d, self._d, self._messages, self._to
        self._chain.pull(self._x, *memory, self._rates, math.inf)


class Loss:
    """Cross-entropy, mean over the batch: its value, and (softmax - one-hot) / B."""

    def __init__(self, batch: int, classes: int, dtype: torch.dtype) -> None:
        self._log = torch.zeros(batch, classes, dtype=dtype)
        self._d = torch.zeros_like(self._log)

    def __call__(self, logits: Tensor, y: Tensor, hot: Tensor) -> Tensor:
        torch.log_softmax(logits, 1, out=self._log)
        torch.nn.functional.nll_loss(self._log, y)
        torch.exp(self._log, out=self._d)
        return self._d.sub_(hot).div_(len(logits))


class Share:
    """The layers `first` ... `last` - 1 of a chain. A share that is not the first one reads random
    activations, one that is not the last gets the same message each time."""

    def __init__(
        self, work: Work, model: nn.Sequential, first: int, last: int, *, way: str
    ) -> None:
        linear = [m for m in model if isinstance(m, nn.Linear)]
        end = len(linear)
        mine, places = linear[first:last], {"first": first == 0, "last": last == end}
        self._layers: Layers | NativeLayers
        if way == NATIVE:
            self._layers = NativeLayers(mine, work.batch, **places)
        else:
            self._layers = Layers(mine, work.batch, **places, vectors=way == VECTORS)
        dtype = linear[0].weight.dtype
        draw = torch.Generator().manual_seed(2)
        shape = work.batch, linear[first].in_features
        self._items = [
            (u if first == 0 else torch.randn(shape, generator=draw).to(dtype), y, one_hot(y, work))
            for u, y in work.items()
        ]
        self._loss = Loss(work.batch, work.classes, dtype) if last == end else None
        outputs = linear[last - 1].out_features
        message = torch.randn(work.batch, outputs, generator=draw).to(dtype)
        self._arriving = message * MESSAGE_SCALE
        self._n = 0

    def step(self) -> None:
        x, y, hot = self._items[self._n % len(self._items)]
        h = self._layers.forward(x)
        self._layers.backward(self._arriving if self._loss is None else self._loss(h, y, hot))
        self._n += 1


def one_hot(y: Tensor, work: Work) -> Tensor:
    return torch.nn.functional.one_hot(y, work.classes).to(getattr(torch, work.dtype))


class Arithmetic:
    """Steps shares of the layers of one work on its samples."""

    def __init__(self) -> None:
        self._shares: dict[str, Share] = {}

    def clear(self) -> None:
        """Another work comes."""
        self._shares.clear()

    def build(self, work: dict[str, Any], first: int, last: int) -> list[str]:
        """The ways of doing it, of which the fastest counts."""
        made = Work.of(work)
        native = built() and (made.batch == 1 or gemm(torch.float32) != 0)
        ways = [MATRICES, *([VECTORS] if made.batch == 1 else []), *([NATIVE] if native else [])]
        for way in ways:
            self._shares[f"{first}-{last}, {way}"] = Share(made, made.model(), first, last, way=way)
        return [f"{first}-{last}, {way}" for way in ways]

    def run(self, way: str, seconds: float) -> float:
        torch.set_num_threads(1)
        with torch.inference_mode():
            return per_step(self._shares[way].step, seconds)
