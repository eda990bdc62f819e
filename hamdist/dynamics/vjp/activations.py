"""Activations whose derivative has a closed form in their result, or in their input.

y = f(x),      dL/dx = dL/dy f'(x), where f' is a function of y or of x
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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


# By kind, of such a module: y of x; dL/dx of dL/dy and x.
FROM_INPUT: dict[type, Callable[[Any], tuple[ActivationForward, ActivationVjp]]] = {
    nn.GELU: lambda m: (
        partial(functional.gelu, approximate=m.approximate),
        lambda z, x: aten.gelu_backward(z, x, approximate=m.approximate),
    ),
    nn.SiLU: lambda _: (functional.silu, aten.silu_backward),
    nn.LeakyReLU: lambda m: (
        partial(functional.leaky_relu, negative_slope=m.negative_slope),
        lambda z, x: aten.leaky_relu_backward(z, x, m.negative_slope, False),
    ),
    nn.Softplus: lambda m: (
        partial(functional.softplus, beta=m.beta, threshold=m.threshold),
        lambda z, x: aten.softplus_backward(z, x, m.beta, m.threshold),
    ),
    nn.ELU: lambda m: (
        partial(functional.elu, alpha=m.alpha),
        lambda z, x: aten.elu_backward(z, m.alpha, 1.0, 1.0, False, x),
    ),
    **dict.fromkeys(
        (nn.Hardtanh, nn.ReLU6),
        lambda m: (
            partial(functional.hardtanh, min_val=m.min_val, max_val=m.max_val),
            lambda z, x: aten.hardtanh_backward(z, x, m.min_val, m.max_val),
        ),
    ),
}

# What the C code has.
IN_C: dict[type, Activation] = {
    nn.ReLU: Activation.RELU,
    nn.Tanh: Activation.TANH,
    nn.Sigmoid: Activation.SIGMOID,
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
