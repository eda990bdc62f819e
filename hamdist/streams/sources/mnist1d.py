"""MNIST-1D (Greydanus and Kobak, 2024), made by its authors' package `mnist1d`.

Ten templates of 12 points, padded, stretched, scaled, shifted, with noise and a slope, 40 points in
all: small, and yet a task on which an MLP, a convnet and a linear model differ by much. The package
draws the 5,000 signals on this machine; its own download of a pickled file is not used.

B: batch, N: signals of a part.
"""

from __future__ import annotations

import importlib.util
import random
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hamdist.errors import StreamError
from hamdist.streams.sources.arrays import ArrayStream
from hamdist.streams.sources.datasets import DataSet
from hamdist.streams.sources.parts import without_test

CLASSES = 10
PACKAGE = "mnist1d"


def mnist1d(batch: int, seed: int, dtype: torch.dtype, *, validation: bool = False) -> DataSet:
    """Return MNIST-1D: 4,000 signals of 40 points, 10 classes; 1,000 held out.

    Items: u (B, 40) of `dtype`, mean 0 and deviation 1 over all; y (B,) int64. The data are the
    authors' (their seed 42).

    Args:
        validation: hold out a sixth of the training part instead (sources/parts.py).

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
            made = make_dataset(get_dataset_args())
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    x, y, x_held, y_held = (torch.from_numpy(made[key]) for key in ("x", "y", "x_test", "y_test"))
    return x, y.to(torch.int64), x_held, y_held.to(torch.int64)
