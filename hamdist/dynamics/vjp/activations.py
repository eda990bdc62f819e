"""Activations whose derivative has a closed form in their result, or in their input.

y = f(x),      dL/dx = dL/dy f'(x), where f' is a function of y or of x
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from hamdist.dynamics.native.chain import Activation
from hamdist.dynamics.vjp.kernels import aten

ActivationForward: TypeAlias = Callable[[Tensor], Tensor]
ActivationVjp: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # dL/dy, and y or x

# By kind: y of x; the same in the memory of x; dL/dx of dL/dy and y.
FROM_RESULT: dict[type, tuple[ActivationForward, ActivationForward, ActivationVjp]] = {
    nn.ReLU: (torch.relu, torch.relu_, lambda z, y: aten.threshold_backward(z, y, 0)),
    nn.Tanh: (torch.tanh, torch.tanh_, lambda z, y: aten.tanh_backward(z, y)),
    nn.Sigmoid: (torch.sigmoid, torch.sigmoid_, lambda z, y: aten.sigmoid_backward(z, y)),
}


def _gelu(m: Any) -> tuple[ActivationForward, ActivationVjp]:
    how = m.approximate
    return (
        lambda x: functional.gelu(x, approximate=how),
        lambda z, x: aten.gelu_backward(z, x, approximate=how),
    )


def _silu(m: Any) -> tuple[ActivationForward, ActivationVjp]:  # noqa: ARG001
    return functional.silu, lambda z, x: aten.silu_backward(z, x)


def _leaky_relu(m: Any) -> tuple[ActivationForward, ActivationVjp]:
    slope = m.negative_slope
    return (
        lambda x: functional.leaky_relu(x, slope),
        lambda z, x: aten.leaky_relu_backward(z, x, slope, False),
    )


def _softplus(m: Any) -> tuple[ActivationForward, ActivationVjp]:
    b, limit = m.beta, m.threshold
    return (
        lambda x: functional.softplus(x, b, limit),
        lambda z, x: aten.softplus_backward(z, x, b, limit),
    )


def _elu(m: Any) -> tuple[ActivationForward, ActivationVjp]:
    alpha = m.alpha
    return (
        lambda x: functional.elu(x, alpha),
        lambda z, x: aten.elu_backward(z, alpha, 1.0, 1.0, False, x),
    )


def _hardtanh(m: Any) -> tuple[ActivationForward, ActivationVjp]:
    low, high = m.min_val, m.max_val
    return (
        lambda x: functional.hardtanh(x, low, high),
        lambda z, x: aten.hardtanh_backward(z, x, low, high),
    )


# By kind, of such a module: y of x; dL/dx of dL/dy and x.
FROM_INPUT: dict[type, Callable[[Any], tuple[ActivationForward, ActivationVjp]]] = {
    nn.GELU: _gelu,
    nn.SiLU: _silu,
    nn.LeakyReLU: _leaky_relu,
    nn.Softplus: _softplus,
    nn.ELU: _elu,
    nn.Hardtanh: _hardtanh,
    nn.ReLU6: _hardtanh,
}

# What the C code has.
IN_C: dict[type, Activation] = {
    nn.ReLU: Activation.RELU,
    nn.Tanh: Activation.TANH,
    nn.Sigmoid: Activation.SIGMOID,
    nn.SiLU: Activation.SILU,
}

# What a forward of one's own calls, as a module.
FUNCTIONS: dict[object, Callable[[], nn.Module]] = {
    torch.relu: nn.ReLU,
    functional.relu: nn.ReLU,
    "relu": nn.ReLU,
    torch.tanh: nn.Tanh,
    functional.tanh: nn.Tanh,
    "tanh": nn.Tanh,
    torch.sigmoid: nn.Sigmoid,
    functional.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    functional.gelu: nn.GELU,
    functional.silu: nn.SiLU,
}
