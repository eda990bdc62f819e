"""MNIST-1D against its authors' package, where that is installed."""

from __future__ import annotations

import importlib.util
import random
from itertools import islice

import numpy as np
import pytest
import torch

from hamdist.config import StreamSettings
from hamdist.errors import StreamError
from hamdist.streams import held_out, make_stream, mnist1d

INSTALLED = importlib.util.find_spec("mnist1d") is not None


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StreamError, match="pip install mnist1d"):
        mnist1d(4, 0, torch.float32)


@pytest.mark.skipif(not INSTALLED, reason="the package mnist1d is not installed")
def test_against_the_package() -> None:
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    own = StreamSettings.model_validate({"source": "mnist1d", "batch": 4000})
    x, y = held_out(own, seed=7, dtype=torch.float64, samples=1)
    assert np.array_equal(x.numpy(), made["x_test"])
    assert np.array_equal(y.numpy(), made["y_test"])
    (epoch,) = islice(make_stream(own, seed=0, dtype=torch.float64).samples(), 1)
    rows = {tuple(row) for row in epoch.u.tolist()}
    assert rows == {tuple(row) for row in made["x"].tolist()}
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
