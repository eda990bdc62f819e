"""What single commands need and training does not: without it one clear error that says how to get
it, before anything is computed; everything else works."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import hamdist
from hamdist.cli import app

PACKAGES = ("matplotlib", "sklearn", "mnist1d")


@pytest.fixture(autouse=True)
def _hidden(monkeypatch, tmp_path):
    """None of the packages can be imported."""
    monkeypatch.chdir(tmp_path)
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        ("run --steps 3 --engine inprocess", "scikit-learn"),
        ("run --steps 3 --engine inprocess --set stream.source=mnist1d", "mnist1d"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(arguments, package):
    done = CliRunner().invoke(app, arguments.split())
    assert done.exit_code in (1, 2), done.output
    assert f"pip install {package}" in done.stderr
    assert done.stderr.count("Error:") == 1


def test_training_needs_none_of_them():
    x = torch.randn(64, 4)
    rows = [(x[i : i + 4], x[i : i + 4, :2].argmax(1)) for i in range(0, 64, 4)]
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    result = hamdist.train(model, rows, classes=2, level="trace", learning={"lr": 0.1})
    assert result.samples == 16
