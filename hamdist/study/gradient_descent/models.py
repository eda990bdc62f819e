"""The six models of HL Appendix E, each as a body and a head, in float64.

    linear   Iris       body: h = W u                                   head: y = h + b
    mlp      Iris       body: h = tanh(W u + b), 30 units               head: linear
    resnet   images     body: a convolution, 4 residual blocks, mean    head: linear
    vit      images     body: 1 encoder layer on patches of 7 x 7       head: linear
    rnn      sequences  body: embedding 50, tanh RNN of 30 units        head: linear
    lstm     sequences  body: embedding 50, LSTM of 30 units            head: linear

Batches hold one sample, so there is no batch norm; the residual branches are scaled down instead.
B: batch, T: tokens, C: channels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

SIDE, PATCH = 28, 7
CHANNELS, RESIDUAL_BLOCKS = 8, 4
WIDTH, HEADS = 30, 3
EMBEDDING, HIDDEN = 50, 30


class Shift(nn.Module):
    """h + b. h: (B, O)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(features).uniform_(-0.5, 0.5))

    def forward(self, h: Tensor) -> Tensor:
        """Return h + b."""
        return h + self.bias


class ResidualCell(nn.Module):
    """h + alpha conv(relu(conv(h))), alpha = 1/sqrt(blocks). h: (B, C, H, W)."""

    def __init__(self, channels: int, alpha: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.alpha = alpha

    def forward(self, h: Tensor) -> Tensor:
        """Return the state behind the branch."""
        out: Tensor = self.second(torch.relu(self.first(h)))
        return h + self.alpha * out


class PatchTokens(nn.Module):
    """Patches as tokens, with learned places. u: (B, 1, 28, 28); returns (B, 16, 30)."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.place = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, WIDTH))

    def forward(self, u: Tensor) -> Tensor:
        """Return the tokens of an image."""
        tokens: Tensor = self.project(u).flatten(2).transpose(1, 2)
        return tokens + self.place


class MeanToken(nn.Module):
    """(B, T, H) to (B, H)."""

    def forward(self, h: Tensor) -> Tensor:
        """Return the mean over tokens."""
        return h.mean(1)


class LastState(nn.Module):
    """The state of a recurrent net after its last token. (B, T, I) to (B, H)."""

    def __init__(self, net: nn.RNN | nn.LSTM) -> None:
        super().__init__()
        self.net = net

    def forward(self, u: Tensor) -> Tensor:
        """Return the last state."""
        states: Tensor = self.net(u)[0]
        return states[:, -1]


def _linear(features: int, classes: int) -> tuple[nn.Module, nn.Module]:
    return nn.Linear(features, classes, bias=False), Shift(classes)


def _mlp(features: int, classes: int) -> tuple[nn.Module, nn.Module]:
    return nn.Sequential(nn.Linear(features, HIDDEN), nn.Tanh()), nn.Linear(HIDDEN, classes)


def _resnet(_: int, classes: int) -> tuple[nn.Module, nn.Module]:
    alpha = 1 / math.sqrt(RESIDUAL_BLOCKS)
    body = nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1),
        nn.ReLU(),
        *(ResidualCell(CHANNELS, alpha) for _ in range(RESIDUAL_BLOCKS)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return body, nn.Linear(CHANNELS, classes)


def _vit(_: int, classes: int) -> tuple[nn.Module, nn.Module]:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)
    return nn.Sequential(PatchTokens(), layer, MeanToken()), nn.Linear(WIDTH, classes)


def _recurrent(
    kind: type[nn.RNN | nn.LSTM], words: int, classes: int
) -> tuple[nn.Module, nn.Module]:
    net = kind(EMBEDDING, HIDDEN, batch_first=True)
    return nn.Sequential(nn.Embedding(words, EMBEDDING), LastState(net)), nn.Linear(HIDDEN, classes)


MODELS: Mapping[str, Callable[[int, int], tuple[nn.Module, nn.Module]]] = {
    "linear": _linear,
    "mlp": _mlp,
    "resnet": _resnet,
    "vit": _vit,
    "rnn": partial(_recurrent, nn.RNN),
    "lstm": partial(_recurrent, nn.LSTM),
}


def make_model(name: str, inputs: int, classes: int, seed: int) -> nn.Sequential:
    """Return the model `name` as an `nn.Sequential` of `body` and `head`.

    torch's initial weights are drawn from `seed` alone. `inputs`: features of a sample, or words of
    the vocabulary.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body, head = MODELS[name](inputs, classes)
    return nn.Sequential(OrderedDict(body=body, head=head)).to(torch.float64)
