"""The arithmetic alone: the steps of some Linear layers as the least sequence of torch calls.

    h = relu(x W^T + b)                        forward
    d = d * (h > 0),  m = d W                  to the layer below
    W <- W - lr d^T x,  b <- b - lr sum_B d    in place, no gradient tensor

No signal is taken or sent, nothing is allocated, nothing goes through autograd. This is the floor
of a block's step.

B: batch, I: inputs, O: outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.turns import per_step
from harness.works import LR, Work

# Arriving messages of a share that is not the last one: small, so that its weights stay put.
MESSAGE_SCALE = 1e-4


class Linear:
    """A layer and its buffers. wanted: whether a message goes on below. vectors: products of
    vectors instead of matrices of one row (batch 1)."""

    def __init__(
        self, layer: nn.Linear, batch: int, *, relu: bool, wanted: bool, vectors: bool
    ) -> None:
        weight, bias = layer.weight.data, layer.bias.data
        self.weight, self.bias = weight, bias
        self._relu, self.weightanted, self._vectors = relu, wanted, vectors
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
            if self.weightanted:
                torch.mm(d, self.weight, out=self.message)
            self.weight.addmm_(d.t(), self.x, alpha=-LR)
            self.bias.add_(torch.sum(d, 0, out=self._g), alpha=-LR)
        return self.message

    def _vector_products(self, d: Tensor) -> None:
        if self.weightanted:
            torch.mv(self.weight.t(), d, out=self.message[0])
        self.weight.addr_(d, self.x[0], alpha=-LR)
        self.bias.add_(d, alpha=-LR)


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
        self, work: Work, model: nn.Sequential, first: int, last: int, *, vectors: bool
    ) -> None:
        linear = [m for m in model if isinstance(m, nn.Linear)]
        end = len(linear)
        self.layers = [
            Linear(linear[i], work.batch, relu=i < end - 1, wanted=i > 0, vectors=vectors)
            for i in range(first, last)
        ]
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
        for layer in self.layers:
            x = layer.forward(x)
        d = self._arriving if self._loss is None else self._loss(x, y, hot)
        for layer in reversed(self.layers):
            d = layer.backward(d)
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
        """The ways of doing it, of which the fastest counts: with matrices, with vectors."""
        made, model = Work.of(work), Work.of(work).model()
        ways = ["matrices", *(["vectors"] if made.batch == 1 else [])]
        for way in ways:
            share = Share(made, model, first, last, vectors=way == "vectors")
            self._shares[f"{first}-{last}, {way}"] = share
        return [f"{first}-{last}, {way}" for way in ways]

    def run(self, way: str, seconds: float) -> float:
        torch.set_num_threads(1)
        with torch.inference_mode():
            return per_step(self._shares[way].step, seconds)
