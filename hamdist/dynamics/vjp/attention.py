"""Self-attention in closed form, and which of torch's modules are made of it.

B: batch; T: tokens; H: heads; D: inputs of a head; E = H D.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from hamdist.dynamics.vjp.kernels import KeptTensors, Unary, aten

# Of nn.MultiheadAttention.
ARGUMENTS = "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"
ACTIVATIONS: dict[object, type[nn.Module]] = {
    **dict.fromkeys((functional.relu, torch.relu), nn.ReLU),
    functional.gelu: nn.GELU,
}


class SelfAttention(Unary):
    """f = softmax(q k^T / sqrt(D)) v by head, of q, k and v side by side, (B, T, 3 E) -> (B, T, E).

    It is PyTorch's operator on processors, which keeps the sums of the softmax and not its (T, T)
    weights, and its backward operator.
    """

    owns = False

    def __init__(self, heads: int) -> None:
        self._heads = heads

    def forward(self, old: KeptTensors | None, x: Tensor) -> KeptTensors:  # noqa: ARG002
        q, k, v = self._by_head(x)
        y, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return [y.transpose(1, 2).reshape(*x.shape[:-1], -1), x, y, sums]

    def product(self, saved: KeptTensors, z: Tensor) -> Tensor:
        _, x, y, sums = saved
        q, k, v = self._by_head(x)
        by_head = z.reshape(-1, z.shape[-2], self._heads, y.shape[-1]).transpose(1, 2)
        products = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            by_head, q, k, v, y, sums, 0.0, False
        )
        to = torch.empty_like(x)
        for place, product in zip(self._by_head(to), products, strict=True):
            place.copy_(product)
        return to

    def _by_head(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return q, k and v, (B, H, T, D), in the memory of x."""
        parts = x.view(-1, x.shape[-2], 3, self._heads, x.shape[-1] // (3 * self._heads))
        return torch.unbind(parts.permute(2, 0, 3, 1, 4))


def is_plain(m: nn.MultiheadAttention) -> bool:
    """Return True for self-attention of whole batches on a processor, without dropout."""
    return (
        m.batch_first
        and m.in_proj_weight is not None
        and m.bias_k is None
        and not m.add_zero_attn
        and m.dropout == 0
        and m.in_proj_weight.device.type == "cpu"
        and m.in_proj_weight.dtype in (torch.float32, torch.float64)
    )


def attends_to(call: fx.Node) -> fx.Node | None:
    """Return what a call of nn.MultiheadAttention attends to, all of it, as query, key and value.

    None where these differ, where there is a mask, or where somebody reads the weights.
    """
    given = dict(zip(ARGUMENTS, call.args, strict=False)) | call.kwargs
    x = given.get("query")
    same = given.get("key") is x and given.get("value") is x
    masked = any(given.get(name) for name in ("key_padding_mask", "attn_mask", "is_causal"))
    plain = all(
        user.target is operator.getitem and (user.args[1] == 0 or not user.users)
        for user in call.users
    )
    return x if isinstance(x, fx.Node) and same and plain and not masked else None


def in_projection(m: nn.MultiheadAttention) -> nn.Linear:
    """Return the projection of the inputs as a layer that has its weights."""
    layer = nn.Linear(m.embed_dim, 3 * m.embed_dim, device="meta")
    layer.weight = m.in_proj_weight
    layer.bias = m.in_proj_bias
    return layer
