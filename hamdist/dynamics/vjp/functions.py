"""Functions without weights, by the module that computes them (of some, their derivatives)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from hamdist.dynamics.native.chain import Activation
from hamdist.dynamics.vjp.kernels import aten, pairs

ActivationForward: TypeAlias = Callable[[Tensor], Tensor]
ActivationVjp: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # of dL/dy, and y or x


def average(m: nn.AvgPool2d) -> tuple[ActivationForward, ActivationVjp]:
    """Return y of x, and dL/dx of dL/dy and x, of means over windows."""
    sizes = pairs(m.kernel_size, m.stride, m.padding)
    how = m.ceil_mode, m.count_include_pad, m.divisor_override
    return m, lambda z, x: aten.avg_pool2d_backward(z, x, *sizes, *how)


# Activations: y = f(x), dL/dx = dL/dy f'(x), where f' is a function of y or of x.

# By kind: y of x; the same in the memory of x; dL/dx of dL/dy and y; what the C code has.
FROM_RESULT: dict[type, tuple[ActivationForward, ActivationForward, ActivationVjp, Activation]] = {
    nn.ReLU: (
        torch.relu,
        torch.relu_,
        lambda z, y: aten.threshold_backward(z, y, 0),
        Activation.RELU,
    ),
    nn.Tanh: (torch.tanh, torch.tanh_, aten.tanh_backward, Activation.TANH),
    nn.Sigmoid: (torch.sigmoid, torch.sigmoid_, aten.sigmoid_backward, Activation.SIGMOID),
}
# By kind, of such a module: y of x; dL/dx of dL/dy and x.
FROM_INPUT: dict[type, Callable[[Any], tuple[ActivationForward, ActivationVjp]]] = {
    nn.AvgPool2d: average,
    nn.AdaptiveAvgPool2d: lambda m: (m, aten._adaptive_avg_pool2d_backward),
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

# What a forward of one's own calls, as a module: with arguments, and of a value alone.
POOLS: dict[object, Callable[..., nn.Module]] = {
    functional.max_pool2d: nn.MaxPool2d,
    functional.avg_pool2d: nn.AvgPool2d,
    functional.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
}
FUNCTIONS: dict[object, Callable[[], nn.Module]] = {
    **dict.fromkeys((torch.relu, functional.relu, "relu"), nn.ReLU),
    **dict.fromkeys((torch.tanh, functional.tanh, "tanh"), nn.Tanh),
    **dict.fromkeys((torch.sigmoid, functional.sigmoid, "sigmoid"), nn.Sigmoid),
    functional.gelu: nn.GELU,
    functional.silu: nn.SiLU,
}
