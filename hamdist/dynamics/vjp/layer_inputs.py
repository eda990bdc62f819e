"""Records inputs and costates of a module's linear layers and convolutions, beside gradients.

They are needed by steps that do not depend on the scale of these inputs (updates/whitening.py). A
convolution is a linear layer of its patches. Layers that cannot be observed are left out: one
without a bias, with a weight that it shares or that is made from others, or one that is not called
itself (the projections inside nn.MultiheadAttention).

R: rows (batch, times further dimensions), I: inputs of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from hamdist.dynamics.vjp.gradient import Gradient


@dataclass(frozen=True, slots=True)
class InputLayer:
    """An observed layer. weight, bias: their places among the function's weights."""

    module: nn.Linear | nn.Conv2d
    weight: int
    bias: int


class GradientsWithInputs(list[Gradient]):
    """Gradients as tensors. read: layers, each with its inputs, one for each of its calls.

    costates: by layer of `read`, the derivatives by its outputs, in the order in which they came.
    """

    def __init__(
        self,
        gradients: Sequence[Gradient],
        read: Sequence[tuple[InputLayer, Sequence[Tensor]]],
        costates: Sequence[Sequence[Tensor]],
    ) -> None:
        super().__init__(gradients)
        self.read = read
        self.costates = costates


class LayerInputs:
    """The layers of `module` that can be observed. theta: its trained weights, in their order."""

    def __init__(self, module: nn.Module, theta: Sequence[Tensor]) -> None:
        places = {id(p): i for i, p in enumerate(theta)}
        layers = [
            InputLayer(m, places[id(m.weight)], places[id(m.bias)])
            for m in module.modules()
            if is_watched(m) and id(m.weight) in places and id(m.bias) in places
        ]
        many = Counter(place for layer in layers for place in (layer.weight, layer.bias))
        self.layers = [layer for layer in layers if many[layer.weight] == many[layer.bias] == 1]
        self._costates: list[list[Tensor]] = [[] for _ in self.layers]  # of the latest pull

    @contextmanager
    def reading(self) -> Iterator[list[list[Tensor]]]:
        """Append the inputs of the layers to the list, in their order, while it is open."""
        read: list[list[Tensor]] = [[] for _ in self.layers]
        hooks = [
            layer.module.register_forward_pre_hook(_noting(into))
            for layer, into in zip(self.layers, read, strict=True)
        ]
        hooks += [
            layer.module.register_forward_hook(_noting_costates(into))
            for layer, into in zip(self.layers, self._costates, strict=True)
        ]
        try:
            yield read
        finally:
            for hook in hooks:
                hook.remove()

    def watched(
        self, g: Sequence[Gradient], read: Sequence[Sequence[Tensor]]
    ) -> GradientsWithInputs:
        """Return gradients with the inputs of their forward pass, and its costates."""
        costates = [list(z) for z in self._costates]
        self.forget()
        passes = [*zip(self.layers, read, costates, strict=True)]
        return GradientsWithInputs(
            g, [(layer, x) for layer, x, _ in passes if x], [z for _, x, z in passes if x]
        )

    def forget(self) -> None:
        """Drop the costates of an earlier pull."""
        for costates in self._costates:
            costates.clear()


def is_watched(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Return True if a layer's inputs can be laid out as rows."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and module.padding != "same"
    return isinstance(module, nn.Linear)


def rows_of(layer: nn.Linear | nn.Conv2d, inputs: Sequence[Tensor]) -> Tensor:
    """Return the inputs of all calls of a layer as rows (R, I)."""
    rows = [_patches(layer, x) if isinstance(layer, nn.Conv2d) else x for x in inputs]
    flat = [x.reshape(-1, x.shape[-1]) for x in rows]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def costate_rows(layer: nn.Linear | nn.Conv2d, costates: Sequence[Tensor]) -> Tensor:
    """Return the costates of all calls of a layer as rows (R, O); none where nothing came."""
    last = [z.movedim(1, -1) if isinstance(layer, nn.Conv2d) else z for z in costates]
    flat = [z.reshape(-1, z.shape[-1]) for z in last]
    return torch.cat(flat) if flat else layer.weight.new_zeros(1, len(layer.weight))


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the patches (B, patches, I) of images (B, C, S, S)."""
    padding: Any = 0 if layer.padding == "valid" else layer.padding
    patches = nn.functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return patches.transpose(1, 2)


def _noting(into: list[Tensor]) -> Any:
    def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        into.append(arguments[0].detach())

    return note


def _noting_costates(into: list[Tensor]) -> Any:
    def note(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda z: into.append(z.detach()))  # type: ignore[no-untyped-call]

    return note
