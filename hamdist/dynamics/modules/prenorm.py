"""Modules that learn under delay: normalised inputs and residuals scaled by depth.

    hidden layer, same shape    h + alpha f(LN(h)),  alpha = 1/sqrt(L)     (PreNorm)
    any other behind the first  f(LN(h))                                   (Normed)

LN: a layer norm over all features of a row, without weights, eps 1e-3; L: layers with weights. With
delay d a direction of curvature kappa is stable only for steps below about pi / ((2d + 1) kappa);
the norm bounds kappa whatever the weights before it do, and alpha keeps the sum of L branches from
growing. `stabilised` does it to a model whose owner asks for it; nothing else does.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hamdist.dynamics.graph.inputs import NetworkInputs, by_parent, called_by_parent
from hamdist.dynamics.user_modules.copies import copied
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.errors import GraphError

NORM_EPS = 1e-3
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TORCHS = "torch.nn.modules."


class PreNorm(nn.Module):
    """Residual module h + alpha branch(LN(h)), for a branch that keeps the shape.

    Args:
        branch: the module on the residual path.
        shape: shape of one row of h.
        alpha: scale of the branch; 1/sqrt(L) for a network of L layers.
    """

    def __init__(self, branch: nn.Module, shape: int | Sequence[int], alpha: float) -> None:
        super().__init__()
        self.norm = layer_norm(shape)
        self.branch = branch
        self.alpha = alpha

    def forward(self, h: Tensor) -> Tensor:
        """Return h + alpha branch(LN(h)), of the shape of h.

        Args:
            h: (B, ..., H).
        """
        output: Tensor = h + self.alpha * self.branch(self.norm(h))
        return output

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


class Normed(nn.Module):
    """Module behind a norm: branch(LN(h)).

    Args:
        branch: the module.
        shape: shape of one row of h.
    """

    def __init__(self, branch: nn.Module, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.norm = layer_norm(shape)
        self.branch = branch

    def forward(self, h: Tensor) -> Tensor:
        """Return branch(LN(h)).

        Args:
            h: (B, ..., H).
        """
        output: Tensor = self.branch(self.norm(h))
        return output


def layer_norm(shape: int | Sequence[int]) -> nn.LayerNorm:
    """Return a layer norm over the last axes, of this shape, without weights."""
    over = [shape] if isinstance(shape, int) else list(shape)
    return nn.LayerNorm(over, eps=NORM_EPS, elementwise_affine=False)


def linear_of(weight: Tensor, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    """Return a linear layer of these weights (O, I), its bias 0."""
    # Its own initialisation draws from the global generator, which is put back; and
    # nn.utils.skip_init would import half a second of torch for its meta tensors.
    with generator_kept():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias:
            linear.bias.zero_()
    return linear


@dataclass
class _Unit:
    """Neighbouring children of an nn.Sequential, of which the first has weights."""

    owner: nn.Sequential
    children: list[tuple[str, nn.Module]]
    before: tuple[int, ...] = ()  # shape of a row that comes in, and of one that goes out
    after: tuple[int, ...] = ()


def stabilised(model: nn.Module, example: NetworkInputs) -> tuple[nn.Module, list[str]]:
    """Return a copy of `model` whose layers are wrapped in `PreNorm` or `Normed`.

    Wrapped are the layers (linear, convolution) of its nn.Sequentials, all but the first. Children
    that are not layers of torch's own stay as they are, and so does everything outside an
    nn.Sequential. The weights are the same, under other keys of the `state_dict`.

    Args:
        model: the model, which does not change.
        example: an input of the right shape and dtype (several as a mapping by argument).

    Returns:
        The copy, and warnings about what was left out.

    Raises:
        GraphError: there is nothing to stabilise.
    """
    normed = copied(model)
    units, unchanged = _units(normed)
    order = _watched(normed, units, example)
    layers = len(order) + unchanged
    alpha = 1 / math.sqrt(layers) if layers else 1.0
    changed = {id(unit.owner) for unit in order[1:]}
    if not changed:
        raise GraphError(
            "model.stabilise: behind its first layer the model has no linear layer or convolution "
            "of torch's own in an nn.Sequential; put hamdist.PreNorm around its layers, or leave "
            "it out"
        )
    for unit in order[1:]:
        _wrap(unit, alpha)
    same = sum(unit.before == unit.after for unit in order[1:])
    notes = (
        f"stabilised: of {layers} layers {same} have become h + {alpha:.3g} f(LN(h)), "
        f"{len(order) - 1 - same} f(LN(h)); the keys of their weights have 'branch' in them"
    )
    return normed, [notes]


def _units(model: nn.Module) -> tuple[list[_Unit], int]:
    """Return the units of all nn.Sequentials, and the number of other children with weights."""
    units: list[_Unit] = []
    unchanged = 0
    for module in model.modules():
        if type(module) is not nn.Sequential:
            continue
        unit: _Unit | None = None
        for name, child in module.named_children():
            if type(child) in _WEIGHTED:
                unit = _Unit(module, [(name, child)])
                units.append(unit)
            elif unit is not None and _goes_along(child):
                unit.children.append((name, child))
            else:
                weighted = any(type(m) in _WEIGHTED for m in child.modules())
                unchanged += weighted and type(child) is not nn.Sequential
                unit = None
    return units, unchanged


def _goes_along(child: nn.Module) -> bool:
    """Return True for torch's own modules without layers inside: an activation, norm, dropout."""
    return type(child).__module__.startswith(_TORCHS) and not list(child.children())


def _watched(model: nn.Module, units: Sequence[_Unit], example: NetworkInputs) -> list[_Unit]:
    """Return the units in the order in which they run, with their shapes."""
    order: list[_Unit] = []
    hooks = []

    def watch(unit: _Unit) -> None:
        def enters(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if unit not in order:
                order.append(unit)
                unit.before = tuple(inputs[0].shape[1:])

        def leaves(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            unit.after = tuple(output.shape[1:])

        hooks.append(unit.children[0][1].register_forward_pre_hook(enters))
        hooks.append(unit.children[-1][1].register_forward_hook(leaves))

    for unit in units:
        watch(unit)
    modes = [(m, m.training) for m in model.modules()]
    try:
        with torch.no_grad(), generator_kept():
            called_by_parent(model.eval(), by_parent(example))
    finally:
        for module, training in modes:
            module.training = training
        for hook in hooks:
            hook.remove()
    return order


def _wrap(unit: _Unit, alpha: float) -> None:
    """Put the wrapper in the place of the unit's first child, and remove the others."""
    inner = nn.Sequential(OrderedDict(unit.children))
    wrapper: nn.Module
    if unit.before == unit.after:
        wrapper = PreNorm(inner, unit.before, alpha)
    else:
        wrapper = Normed(inner, unit.before)
    (first, _), *others = unit.children
    unit.owner._modules[first] = wrapper
    for name, _ in others:
        del unit.owner._modules[name]
