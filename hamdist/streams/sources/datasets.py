"""The data sets that come with the dependencies: scikit-learn's digits.

B: batch, N: images of a part. A data set is a portable stream of its training part, and its
held-out part as two tensors. The held-out part never depends on the seed.
"""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hamdist.errors import need_package
from hamdist.streams.sample import Stream
from hamdist.streams.sources.arrays import ArrayStream
from hamdist.streams.sources.parts import without_test


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

    Items: u (B, 64) of `dtype`, y (B,) int64. Of each class every fifth image, counted from the
    third, is held out (20 %, stratified). Pixels are standardised with the mean and the standard
    deviation of all pixels of the training part; per-pixel factors would blow up the pixels that
    are nearly always blank.

    Args:
        validation: hold out a sixth of the training part instead (sources/parts.py).

    Raises:
        SettingsError: `batch` is below 1.
    """
    pixels, targets = _digits()
    held = torch.zeros(len(targets), dtype=torch.bool)
    for label in range(10):
        held[(targets == label).nonzero().squeeze(1)[2::5]] = True
    train = pixels[~held]
    pixels = ((pixels - train.mean()) / train.std(correction=0)).to(dtype)
    x, y, x_held, y_held = pixels[~held], targets[~held], pixels[held], targets[held]
    if validation:
        x, y, x_held, y_held = without_test(x, y)
    return DataSet(ArrayStream(x, y, batch, seed, classes=10), x_held, y_held)


def _digits() -> tuple[Tensor, Tensor]:
    """Return all digits: pixels (1797, 64) float64, targets (1797,) int64.

    They are read from scikit-learn's own file: `import sklearn` takes a second.
    """
    need_package("sklearn", "scikit-learn", "stream.source digits, which reads its data set")
    found = importlib.util.find_spec("sklearn")
    if found is not None and found.origin is not None:
        file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            with gzip.open(file, "rt", encoding="ascii") as text:
                table = np.loadtxt(text, delimiter=",")
            return torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, -1].astype(np.int64))
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.data.astype(np.float64))
    return pixels, torch.from_numpy(bunch.target.astype(np.int64))
