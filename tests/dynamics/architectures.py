"""Networks as people write them: nothing here knows of hamdist.

A residual network in torchvision's manner, a block in the manner of transformers (configuration
object, views, masks, dictionaries), a U-Net, a vision transformer, a small GPT, recurrent nets.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

# -- a residual network, in the manner of torchvision -------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out  # noqa: RET504


class ResNet(nn.Module):
    """Three residual branches, the second with a convolution on its skip."""

    def __init__(self, classes=3, width=4):
        super().__init__()
        self.inplanes = width
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._make_layer(width, 1)
        self.layer2 = self._make_layer(2 * width, 1, 2)
        self.layer3 = self._make_layer(2 * width, 1)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2 * width, classes)

    def _make_layer(self, planes, blocks, stride=1):
        downsample = None
        if stride != 1 or self.inplanes != planes:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )
        layers = [BasicBlock(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes
        layers += [BasicBlock(planes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


# -- a U-Net: skips over the whole depth ----------------------------------------------------------


def _double(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(1, outputs),
        nn.SiLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.SiLU(inplace=True),
    )


class UNet(nn.Module):
    """Two levels; the prediction is an image."""

    def __init__(self, width=4, outputs=2):
        super().__init__()
        self.downs = nn.ModuleList([_double(1, width), _double(width, 2 * width)])
        self.middle = _double(2 * width, 2 * width)
        self.ups = nn.ModuleList([_double(4 * width, width), _double(2 * width, width)])
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, x):
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.middle(x)
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = functional.interpolate(x, size=skip.shape[-2:], mode="nearest")
            x = up(torch.cat([x, skip], dim=1))
        return self.head(x)


# -- transformers ---------------------------------------------------------------------------------


@dataclass
class Config:
    hidden_size: int = 8
    num_attention_heads: int = 2
    intermediate_size: int = 16
    num_hidden_layers: int = 2
    vocab_size: int = 11
    max_position_embeddings: int = 6
    layer_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_probs_dropout_prob: float = 0.0


class SelfAttention(nn.Module):
    """Views and transposes in the manner of transformers; a causal mask from the shape."""

    def __init__(self, config: Config, causal: bool):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.causal = causal

    def _shape(self, tensor: Tensor, seq_len: int, bsz: int) -> Tensor:
        return tensor.view(bsz, seq_len, self.num_heads, self.head_dim).transpose(1, 2).contiguous()

    def forward(self, hidden_states, attention_mask=None, output_attentions=False):
        if not isinstance(hidden_states, torch.Tensor):
            raise TypeError("hidden_states has to be a tensor")
        bsz, tgt_len, embed_dim = hidden_states.size()
        assert embed_dim == self.num_heads * self.head_dim
        proj_shape = (bsz * self.num_heads, -1, self.head_dim)
        query = self._shape(self.query(hidden_states), tgt_len, bsz).view(*proj_shape)
        key = self._shape(self.key(hidden_states), tgt_len, bsz).view(*proj_shape)
        value = self._shape(self.value(hidden_states), tgt_len, bsz).view(*proj_shape)
        weights = torch.bmm(query, key.transpose(1, 2)) / math.sqrt(self.head_dim)
        if self.causal:
            smallest = torch.finfo(weights.dtype).min
            kind = {"dtype": weights.dtype, "device": weights.device}
            mask = torch.full((tgt_len, tgt_len), smallest, **kind)  # type: ignore[call-overload]
            position = torch.arange(mask.size(-1), device=weights.device)
            mask.masked_fill_(position < (position + 1).view(mask.size(-1), 1), 0)
            weights = weights + mask
        if attention_mask is not None:
            weights = weights.view(bsz, self.num_heads, tgt_len, tgt_len)
            weights = weights.masked_fill(attention_mask[:, None, None, :] == 0, -1e4)
            weights = weights.view(bsz * self.num_heads, tgt_len, tgt_len)
        probabilities = self.dropout(nn.functional.softmax(weights, dim=-1))
        context = torch.bmm(probabilities, value)
        context = context.view(bsz, self.num_heads, tgt_len, self.head_dim).transpose(1, 2)
        context = self.out(context.reshape(bsz, tgt_len, embed_dim))
        return (context, probabilities) if output_attentions else (context,)


class Layer(nn.Module):
    def __init__(self, config: Config, causal: bool):
        super().__init__()
        self.attention = SelfAttention(config, causal)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states, attention_mask=None):
        outputs = self.attention(self.layernorm_before(hidden_states), attention_mask)
        hidden_states = outputs[0] + hidden_states
        layer_output = self.intermediate(self.layernorm_after(hidden_states))
        layer_output = nn.functional.gelu(layer_output)
        return (self.output(layer_output) + hidden_states, *outputs[1:])


class Encoder(nn.Module):
    """Token numbers and a mask come in as keyword arguments, a dictionary goes out."""

    def __init__(self, config: Config, classes=3):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.register_buffer(
            "position_ids",
            torch.arange(config.max_position_embeddings).expand((1, -1)),
            persistent=False,
        )
        self.layer = nn.ModuleList([Layer(config, False) for _ in range(config.num_hidden_layers)])
        self.classifier = nn.Linear(config.hidden_size, classes)

    def forward(self, input_ids=None, attention_mask=None):
        if input_ids is None:
            raise ValueError("give input_ids")
        if input_ids.dim() == 1:
            input_ids = input_ids[None]
        seq_length = input_ids.size(1)
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape, device=input_ids.device)
        states = self.embeddings(input_ids)
        states = states + self.positions(self.position_ids[:, :seq_length])
        for layer_module in self.layer:
            states = layer_module(states, attention_mask)[0]
        return OrderedDict(logits=self.classifier(states[:, 0]))


class ViT(nn.Module):
    """Patches by a convolution, a class token, positions, pre-norm layers."""

    def __init__(self, config: Config, classes=3, image=8, patch=4):
        super().__init__()
        hidden = config.hidden_size
        self.patch = nn.Conv2d(1, hidden, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, hidden) * 0.02)
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, hidden) * 0.02)
        self.blocks = nn.ModuleList(Layer(config, False) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.position
        for block in self.blocks:
            (x,) = block(x)
        return self.head(self.norm(x)[:, 0])


class GPT(nn.Module):
    """Predictions (B, T, V) of the next token."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, hidden),
                "wpe": nn.Embedding(config.max_position_embeddings, hidden),
                "h": nn.ModuleList([Layer(config, True) for _ in range(config.num_hidden_layers)]),
                "ln_f": nn.LayerNorm(hidden),
            }
        )
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx):
        device = idx.device
        _, t = idx.size()
        longest = self.config.max_position_embeddings
        assert t <= longest, f"cannot forward a sequence of length {t}, it is longer than {longest}"
        pos = torch.arange(0, t, dtype=torch.long, device=device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for block in self.transformer.h:
            (x,) = block(x)
        return self.lm_head(self.transformer.ln_f(x))


# -- recurrent nets, several inputs and outputs ---------------------------------------------------


class Tagger(nn.Module):
    """A two-layer LSTM on tokens, time in front inside; a zero state of the batch's size."""

    def __init__(self, tokens=7, hidden=5, classes=3):
        super().__init__()
        self.hidden = hidden
        self.embed = nn.Embedding(tokens, 4)
        self.lstm = nn.LSTM(4, hidden, num_layers=2)
        self.norm = nn.LayerNorm(hidden)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, tokens):
        x = self.embed(tokens).permute(1, 0, 2)
        start = torch.zeros(2, tokens.shape[0], self.hidden, dtype=x.dtype, device=x.device)
        out, (h, _) = self.lstm(x, (start, start))
        return self.fc(self.norm(out[-1] + h[-1]))


class TwoByTwo(nn.Module):
    """Two inputs, one of them read twice, and two readouts."""

    def __init__(self, classes=3):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
        self.vector = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.join = nn.Linear(3 * 16 + 6, 8)
        self.deep = nn.Linear(8, 8)
        self.kind = nn.Sequential(nn.Linear(8 + 5, 8), nn.Tanh(), nn.Linear(8, classes))
        self.angle = nn.Linear(8, 1)

    def forward(self, image, vector):
        both = torch.cat([self.image(image), self.vector(vector)], 1)
        h = torch.tanh(self.join(both))
        h = h + torch.tanh(self.deep(h))
        return {"kind": self.kind(torch.cat([h, vector], 1)), "angle": self.angle(h)}
