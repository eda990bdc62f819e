"""The six models of HL Appendix E, each as a body and a head, in float64, and their data: Iris, 100
images, 100 sequences; one sample at a time.

    linear   Iris       body: h = W u                                   head: y = h + b
    mlp      Iris       body: h = tanh(W u + b), 30 units               head: linear
    resnet   images     body: a convolution, 4 residual blocks, mean    head: linear
    vit      images     body: 1 encoder layer on patches of 7 x 7       head: linear
    rnn      sequences  body: embedding 50, tanh RNN of 30 units        head: linear
    lstm     sequences  body: embedding 50, LSTM of 30 units            head: linear

Batches hold one sample, so there is no batch norm; the residual branches are scaled down instead.
N: samples, B: batch, T: tokens, C: channels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.errors import StreamError, need_package
from hamdist.streams import FASHION_MNIST, ArrayStream, Stream, read_images
from hamdist.streams.sources.texts import classes_of, corpus, load_glove, padded

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
    "linear": lambda n, classes: (nn.Linear(n, classes, bias=False), Shift(classes)),
    "mlp": lambda n, classes: (
        nn.Sequential(nn.Linear(n, HIDDEN), nn.Tanh()),
        nn.Linear(HIDDEN, classes),
    ),
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
    with generator_kept(seed):
        body, head = MODELS[name](inputs, classes)
    return nn.Sequential(OrderedDict(body=body, head=head)).to(torch.float64)


# -- data ------------------------------------------------------------------------------------------


DTYPE = torch.float64
CLASSES, PER_CLASS = 10, 10
SEQUENCES, TOKENS = 100, 12


@dataclass(frozen=True, slots=True)
class Paths:
    """Real files instead of the installed data.

    `images`: a folder of IDX files; `texts`: two classes of texts (hamdist.streams.sources.texts);
    `glove`: word vectors of 50 numbers.
    """

    images: Path | None = None
    texts: Path | None = None
    glove: Path | None = None


@dataclass(frozen=True, slots=True)
class Data:
    """The data of a model.

    stream: endless, batch 1, N samples an epoch. inputs: features of a sample, or words of the
    vocabulary. embedding: (words, 50) to begin with, if it was read. source: what it is."""

    stream: Stream
    rows: int
    inputs: int
    classes: int
    source: str
    embedding: Tensor | None = None


@lru_cache(maxsize=1)
def iris(seed: int) -> Data:
    """Return Iris as scikit-learn ships it: 150 flowers, 4 raw features, 3 classes."""
    need_package("sklearn", "scikit-learn", "Iris, a data set of it")
    from sklearn.datasets import load_iris  # heavy: imported only where it is used

    bunch = load_iris()
    x, y = torch.from_numpy(bunch.data).to(DTYPE), torch.from_numpy(bunch.target).long()
    return _data(x, y, seed, x.shape[1], 3, "Iris")


@lru_cache(maxsize=1)
def images(seed: int, path: Path | None = None) -> Data:
    """Return 10 images of 28 x 28 of each of 10 classes, (100, 1, 28, 28): Fashion-MNIST, or
    another data set of its format in the folder `path`; where it is not installed, scikit-learn's
    digits.

    Raises StreamError for files that are not there, or hold too few images of a class.
    """
    if path is None and not any(folder.is_dir() for folder in FASHION_MNIST.folders):
        pixels, y, source = *_digits(), "digits (scikit-learn) at 28 x 28"
    else:
        held_out = read_images(FASHION_MNIST, 1, seed, DTYPE, path)
        pixels, y = held_out.x.reshape(-1, 1, SIDE, SIDE), held_out.y
        source = "Fashion-MNIST" if path is None else str(path)
    rows = []
    for label in range(CLASSES):
        of_class = (y == label).nonzero().squeeze(1)
        if len(of_class) < PER_CLASS:
            raise StreamError(
                f"{source}: class {label} has {len(of_class)} images in the held-out part, "
                f"{PER_CLASS} are needed"
            )
        rows.append(of_class[:PER_CLASS])
    chosen = torch.cat(rows)
    return _data(pixels[chosen], y[chosen], seed, SIDE * SIDE, CLASSES, source)


@lru_cache(maxsize=1)
def sequences(seed: int, path: Path | None = None, glove: Path | None = None) -> Data:
    """Return 100 texts of two classes as their last 12 tokens, (100, 12) int64: made-up ones, or
    those of `path`. glove: a file of word vectors, with which the embedding begins.

    Raises StreamError for files that are not there, cannot be read, or do not fit.
    """
    texts, vocabulary = corpus(SEQUENCES, seed, path)
    ids = padded([vocabulary.encode(tokens) for tokens, _ in texts.train], TOKENS)
    source = "made-up sentences" if path is None else str(path)
    embedding = None
    if glove is not None:
        embedding = load_glove(glove, vocabulary, seed=seed, dtype=DTYPE)
        if embedding.shape[1] != EMBEDDING:
            raise StreamError(
                f"{glove}: vectors of {embedding.shape[1]} numbers, but the networks take "
                f"{EMBEDDING}: give glove.6B.{EMBEDDING}d.txt"
            )
        source += f", {glove.name}"
    return _data(ids, classes_of(texts.train), seed, len(vocabulary), 2, source, embedding)


def _digits() -> tuple[Tensor, Tensor]:
    need_package("sklearn", "scikit-learn", "the digits, a data set of it")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).to(DTYPE).unsqueeze(1)
    large = functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return (large - large.mean()) / large.std(correction=0), torch.from_numpy(bunch.target).long()


def _data(
    x: Tensor,
    y: Tensor,
    seed: int,
    inputs: int,
    classes: int,
    source: str,
    embedding: Tensor | None = None,
) -> Data:
    stream = ArrayStream(x, y, batch=1, seed=seed, classes=classes)
    return Data(stream, len(x), inputs, classes, source, embedding)
