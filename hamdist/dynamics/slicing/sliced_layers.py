"""A layer's share of neurons as a layer of its own.

Each function gives slice i of m of a module, and by key of its tensors which places along which
axis of the module's they are (`SlicePlaces`; None: all of it). A unit is what stays together: a
neuron, a channel, an attention head.

B: batch; T, S: tokens of queries and keys; E: features; H: heads of a slice; D: features of a head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

SlicePlaces: TypeAlias = "dict[str, tuple[int, Tensor] | None]"

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Share(NamedTuple):
    """Slice `i` of `m` of `units`, repeated in each of `chunks` equal parts of an axis.

    Chunks are, for example, queries, keys and values of one layer.
    """

    units: int
    chunks: int
    i: int
    m: int

    @property
    def first(self) -> int:
        """Return its first unit. Where m does not divide, the first slices have one more."""
        return self.i * (self.units // self.m) + min(self.i, self.units % self.m)

    @property
    def many(self) -> int:
        """Return its number of units."""
        return self.units // self.m + (self.i < self.units % self.m)

    def length(self, size: int) -> int:
        """Return its number of places on an axis of `size`."""
        return size // self.units * self.many

    def start(self, size: int) -> int:
        """Return its first place on an axis of `size` (one chunk)."""
        return size // self.units * self.first

    def places(self, size: int) -> Tensor:
        """Return the places of this part's neurons among `size`."""
        part = size // self.chunks
        indices = torch.arange(self.start(part), self.start(part) + self.length(part))
        return torch.cat([indices + part * chunk for chunk in range(self.chunks)])


def _rows_of(parameter: Tensor, axis: int, index: Tensor) -> nn.Parameter:
    piece = parameter.detach().index_select(axis, index).clone()
    return nn.Parameter(piece, requires_grad=parameter.requires_grad)


def _bare(module: nn.Module) -> Any:
    """Return a copy of a layer's settings, with its tensors still those of `module`."""
    bare = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        bare.__dict__[name] = dict(module.__dict__[name])
    return bare


def outputs_of(module: Any, share: Share) -> tuple[nn.Module, SlicePlaces]:
    """Return the layer of some output neurons (channels) of a Linear or a convolution."""
    layer = _bare(module)
    size = module.weight.shape[0]
    index = share.places(int(size))
    places: SlicePlaces = {}
    for key in ("weight", "bias"):
        parameter = getattr(module, key)
        if parameter is not None:
            setattr(layer, key, _rows_of(parameter, 0, index))
            places[key] = (0, index)
    _rename(layer, ("out_features", "out_channels"), len(index))
    return layer, places


def inputs_of(module: Any, share: Share) -> tuple[nn.Module, SlicePlaces]:
    """Return the layer of some input neurons (channels) of a Linear or a convolution.

    The sum of all parts is the whole; the first part has the bias.
    """
    layer = _bare(module)
    index = share.places(int(module.weight.shape[1]))
    layer.weight = _rows_of(module.weight, 1, index)
    places: SlicePlaces = {"weight": (1, index)}
    layer.bias = None
    bias = module.bias
    if bias is not None and share.i == 0:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        places["bias"] = None
    _rename(layer, ("in_features", "in_channels"), len(index))
    return layer, places


def channels_of(module: Any, share: Share) -> tuple[nn.Module, SlicePlaces]:
    """Return the layer of some channels of a batch norm, with their statistics."""
    layer = _bare(module)
    index = share.places(int(module.num_features))
    places: SlicePlaces = {}
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if tensor.dim() == 0:  # the number of batches
            setattr(layer, key, tensor.clone())
            places[key] = None
        elif isinstance(tensor, nn.Parameter):
            setattr(layer, key, _rows_of(tensor, 0, index))
            places[key] = (0, index)
        else:
            setattr(layer, key, tensor.index_select(0, index).clone())
            places[key] = (0, index)
    layer.num_features = len(index)
    return layer, places


def heads_of(module: nn.MultiheadAttention, share: Share) -> tuple[nn.Module, SlicePlaces]:
    """Return some heads of an attention, with their part of the output projection."""
    heads = AttentionHeads(module, share)
    size = module.embed_dim
    rows = share._replace(chunks=3).places(3 * size)
    columns = share.places(size)
    places: SlicePlaces = {"in_proj_weight": (0, rows), "out_proj.weight": (1, columns)}
    if module.in_proj_bias is not None:
        places["in_proj_bias"] = (0, rows)
        if share.i == 0:
            places["out_proj.bias"] = None
    return heads, places


def _rename(module: nn.Module, names: Sequence[str], size: int) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, size)


class AttentionHeads(nn.Module):
    """Heads of an nn.MultiheadAttention: its call, with their part of the output (B, T, E) as the
    result, to which the other heads' parts have to be added.

        softmax(q k^T / sqrt(D) + mask) v, by head
    """

    def __init__(self, module: nn.MultiheadAttention, share: Share) -> None:
        super().__init__()
        size = module.embed_dim
        rows = share._replace(chunks=3).places(3 * size)
        self.heads = share.many
        self.dropout = module.dropout
        self.batch_first = module.batch_first
        self.in_proj_weight = _rows_of(module.in_proj_weight, 0, rows)
        self.in_proj_bias: nn.Parameter | None = None
        if module.in_proj_bias is not None:
            self.in_proj_bias = _rows_of(module.in_proj_bias, 0, rows)
        self.out_proj, _ = inputs_of(_as_linear(module.out_proj), share)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,  # noqa: ARG002
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: ARG002
        is_causal: bool = False,  # noqa: ARG002
    ) -> tuple[Tensor, None]:
        arguments = (query, key, value)
        if not self.batch_first:
            arguments = tuple(x.transpose(0, 1) for x in arguments)  # type: ignore[assignment]
        weights = self.in_proj_weight.chunk(3)
        biases: Sequence[Tensor | None] = (None,) * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(x, w, b).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for x, w, b in zip(arguments, weights, biases, strict=True)
        )  # (B, H, T, D), (B, H, S, D)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        for mask in self._masks(scores, key_padding_mask, attn_mask):
            scores = scores + mask
        shares = functional.dropout(scores.softmax(-1), self.dropout, self.training)
        out: Tensor = self.out_proj((shares @ v).transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _masks(
        self, scores: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> Sequence[Tensor]:
        """Return the summands of the scores: padding (B, S), and a mask (T, S) for all heads."""
        masks = []
        if padding is not None:
            masks.append(_additive(padding, scores)[:, None, None, :])
        if mask is not None:
            masks.append(_additive(mask, scores))
        return masks


def _additive(mask: Tensor, scores: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=scores.dtype).masked_fill(mask, -math.inf)


def _as_linear(module: nn.Linear) -> nn.Linear:
    """Return a plain Linear: torch's attention has a Linear of a class of its own."""
    linear = nn.Linear(
        module.in_features, module.out_features, bias=False, dtype=module.weight.dtype
    )
    linear.weight = module.weight
    linear.bias = module.bias
    return linear
