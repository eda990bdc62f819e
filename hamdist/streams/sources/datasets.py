"""Data sets that packages bring, scikit-learn's digits and MNIST-1D, and the parts of a data set.

B: batch, N: rows of a part. A data set is a portable stream of its training part, and its held-out
part as two tensors. Step sizes and other settings are chosen on a validation part, never on the
test part: a run with `stream.evaluate: validation` learns from five sixths of the training part and
is scored on the rest. Which rows are held out depends on their number alone, not on a seed.
"""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hamdist.errors import StreamError, need_package
from hamdist.streams.sample import Stream
from hamdist.streams.sources.arrays import ArrayStream

CLASSES = 10  # of both
PACKAGE = "mnist1d"
VALIDATION_EVERY = 6
FIRST = 2

T = TypeVar("T")


def validation_rows(rows: int) -> Tensor:
    """Return a mask (N,) of the validation part of N `rows`: every sixth from the third on."""
    return torch.arange(rows) % VALIDATION_EVERY == FIRST


def without_test(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split x, y (N, ...) of a training part into x, y to learn from and x, y for validation."""
    rows = validation_rows(len(y))
    return x[~rows], y[~rows], x[rows], y[rows]


def validation_split(values: list[T]) -> tuple[list[T], list[T]]:
    """Split a list of samples into those to learn from and the validation part."""
    chosen = validation_rows(len(values)).tolist()
    learned = [value for value, held in zip(values, chosen, strict=True) if not held]
    return learned, [value for value, held in zip(values, chosen, strict=True) if held]


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set in two parts.

    Attributes:
        train: an endless stream of the training part.
        x: the inputs (N, F) of the held-out part.
        y: its targets (N,) int64.
    """

    train: Stream
    x: Tensor
    y: Tensor


def digits(batch: int, seed: int, dtype: torch.dtype, *, validation: bool = False) -> DataSet:
    """Return scikit-learn's handwritten digits: 1797 images of 8 x 8, 10 classes, no download.

    Samples: u (B, 64) of `dtype`, y (B,) int64. Of each class every fifth image, counted from the
    third, is held out (20 %, stratified). Pixels are standardised with the mean and the standard
    deviation of all pixels of the training part; per-pixel factors would blow up the pixels that
    are nearly always blank.

    Args:
        batch, seed: rows of a sample; of the order of the samples.
        dtype: of u.
        validation: hold out a sixth of the training part instead (`without_test`).

    Raises:
        SettingsError: `batch` is below 1.
    """
    pixels, targets = _digits()
    test = torch.zeros(len(targets), dtype=torch.bool)
    for label in range(CLASSES):
        test[(targets == label).nonzero().squeeze(1)[2::5]] = True
    train = pixels[~test]
    pixels = ((pixels - train.mean()) / train.std(correction=0)).to(dtype)
    x, y, x_held, y_held = pixels[~test], targets[~test], pixels[test], targets[test]
    if validation:
        x, y, x_held, y_held = without_test(x, y)
    return DataSet(ArrayStream(x, y, batch, seed, classes=CLASSES), x_held, y_held)


def _digits() -> tuple[Tensor, Tensor]:
    """Return all digits: pixels (1797, 64) float64, targets (1797,) int64.

    They are read from scikit-learn's own file: `import sklearn` takes a second.
    """
    need_package("sklearn", "scikit-learn", "stream.source digits, which reads its data set")
    module_spec = importlib.util.find_spec("sklearn")
    if module_spec is not None and module_spec.origin is not None:
        file = Path(module_spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            table = np.loadtxt(file, delimiter=",", encoding="ascii")
            return torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, -1].astype(np.int64))
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.data.astype(np.float64))
    return pixels, torch.from_numpy(bunch.target.astype(np.int64))


def mnist1d(batch: int, seed: int, dtype: torch.dtype, *, validation: bool = False) -> DataSet:
    """Return MNIST-1D: 4,000 signals of 40 points, 10 classes; 1,000 held out.

    Samples: u (B, 40) of `dtype`, mean 0 and deviation 1 over all; y (B,) int64. The data are the
    authors' (Greydanus and Kobak, 2024; their seed 42): ten templates of 12 points, padded,
    stretched, scaled, shifted, with noise and a slope. Small, and yet an MLP, a convnet and a
    linear model differ by much. The package draws them here; its pickled file is not used.

    Args:
        batch, seed: rows of a sample; of the order of the samples.
        dtype: of u.
        validation: hold out a sixth of the training part instead (`without_test`).

    Raises:
        StreamError: the package `mnist1d` is not installed.
        SettingsError: `batch` is below 1.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise StreamError(
            "stream.source mnist1d: the package `mnist1d`, which draws these signals, is not "
            "installed: pip install mnist1d (or hamdist[mnist1d])"
        )
    x, y, x_held, y_held = _signals()
    if validation:
        x, y, x_held, y_held = without_test(x, y)
    stream = ArrayStream(x.to(dtype), y, batch, seed, classes=CLASSES)
    return DataSet(stream, x_held.to(dtype), y_held)


@lru_cache(maxsize=1)
def _signals() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x (4000, 40) float64, y (4000,), and the same of the 1,000 that are held out.

    The package seeds the generators of Python, NumPy and torch; their states are restored.
    """
    from mnist1d.data import get_dataset_args, make_dataset

    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            arrays = make_dataset(get_dataset_args())
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    x, y, x_held, y_held = (torch.from_numpy(arrays[key]) for key in ("x", "y", "x_test", "y_test"))
    return x, y.to(torch.int64), x_held, y_held.to(torch.int64)
