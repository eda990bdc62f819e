"""Data of the six models: Iris, 100 images, 100 sequences; one sample at a time.

N: samples, T: tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from hamdist.errors import StreamError, need_package
from hamdist.streams import ArrayStream, Stream, fashion_mnist
from hamdist.streams.sources.images import FASHION
from hamdist.streams.sources.texts import classes_of, corpus, load_glove, padded
from hamdist.study.gradient_descent.models import EMBEDDING, SIDE

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
    """stream: endless, batch 1, N samples an epoch. inputs: features of a sample, or words of the
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
    if path is None and not any(folder.is_dir() for folder in FASHION.folders):
        pixels, y, source = *_digits(), "digits (scikit-learn) at 28 x 28"
    else:
        held_out = fashion_mnist(1, seed, DTYPE, path)
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
