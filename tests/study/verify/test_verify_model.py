"""`hamdist verify --model`: what is said about a user's own module."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.config import Settings, TargetOf
from hamdist.dynamics.objective.losses import mse
from hamdist.runtime.train.prepare import as_graph
from hamdist.streams.sample import SampleSpec
from hamdist.study.propagation.gradients import (
    TRIED,
    as_network,
    exact_gradients,
    local_gradients,
    relative_error,
)
from hamdist.study.propagation.streams import StreamKind, timed_stream
from hamdist.study.verify.topics import backpropagation, own_model
from hamdist.study.verify.topics.own_model import VerifiedModel

NETS = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

def images():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(36, 5),
    )

def tokens():
    return nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(12, 2))

class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return h + self.b(h)

class Counts(nn.Module):
    # is another function in every pass but the first one
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return self.a(x) * self.passes

class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        raise IndexError("the user's own mistake")

def weightless():
    return nn.Sequential(nn.Tanh())
"""


@pytest.fixture
def verify(tmp_path, monkeypatch):
    (tmp_path / "verified_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(name, *arguments):
        model = ["--model", f"verified_nets:{name}", "--json", "rows.json"]
        result = CliRunner().invoke(app, ["verify", *model, *arguments])
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
        return result, rows

    return run


@pytest.mark.parametrize(
    ("name", "arguments", "blocks"),
    [
        ("mlp", ["--input-shape", "6"], 3),
        ("mlp", ["--input-shape", "6", "--classes", "3", "--blocks", "2", "--batch", "1"], 2),
        ("images", ["--input-shape", "3,8,8", "--classes", "5"], 3),
        ("Whole", ["--input-shape", "6"], 2),
    ],
)
def test_modules_for_which_backprop_is_autograd(verify, name, arguments, blocks):
    result, rows = verify(name, *arguments)
    assert result.exit_code == 0, result.output
    assert [row["passed"] for row in rows] == [True, True, True]
    assert [row["bound"] for row in rows] == pytest.approx([2.2e-13, 1.2e-4, 0.01], rel=0.1)
    assert f"{blocks} block" in rows[0]["note"]
    assert re.search(r"weights moved by up to [\d.e-]*[1-9]", rows[0]["note"])
    assert re.search(r"from c = \d+ on", rows[2]["note"])


def test_the_speed_is_the_smallest_of_those_tried(verify):
    """Oracle: the error, asked for at every speed in turn."""
    _, rows = verify("mlp", "--input-shape", "6")
    torch.manual_seed(own_model.SEED)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    ).double()
    spec = SampleSpec((4, 6), torch.float64, (4, 3), torch.float64)
    settings = Settings.model_validate({"level": "local", "dtype": "float64"})
    network = as_network(as_graph(model, settings, spec, mse), (6,))
    stream = timed_stream(StreamKind.SMOOTH, network.values, own_model.SEED)
    exact = exact_gradients(network, stream)
    errors = {}
    for c in TRIED[:9]:
        gradients, _ = local_gradients(network, stream, c, 1.0, TargetOf.SAMPLE)
        errors[c] = relative_error(gradients, exact)
    first = next(c for c, error in errors.items() if error <= 0.01)
    assert first > TRIED[0]
    assert f"from c = {first:g} on" in rows[2]["note"]
    assert rows[2]["difference"] == pytest.approx(errors[first], rel=1e-9)


def test_tokens_are_drawn_for_an_embedding_and_local_is_left_out(verify):
    result, rows = verify("tokens", "--input-shape", "3", "--classes", "2")
    assert result.exit_code == 0, result.output
    assert len(rows) == 2
    assert "whole-number inputs cannot change smoothly" in rows[0]["note"]


def test_a_module_that_is_another_function_in_each_pass_is_found_out(verify, monkeypatch):
    # hamdist's first look at the shapes is a pass as well, and so is the oracle's
    right = backpropagation.sgd

    def after_two_more(model, items, learning, loss):
        with torch.no_grad():
            model(next(iter(items.samples())).u)
        return right(model, items, learning, loss=loss)

    monkeypatch.setattr(own_model, "sgd", after_two_more)
    result, rows = verify("Counts", "--input-shape", "6")
    assert result.exit_code == 1
    assert [row["passed"] for row in rows[:2]] == [False, False]


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("Fails", ["--input-shape", "6"], "IndexError: the user's own mistake"),
        ("mlp", ["--input-shape", "7"], "RuntimeError: mat1 and mat2"),
        ("mlp", ["--input-shape", "6", "--classes", "4"], "--classes 4: the model predicts (4, 3)"),
        (
            "Whole",
            ["--input-shape", "6", "--blocks", "9"],
            "cannot cut the model into 9 blocks; use",
        ),
        ("weightless", ["--input-shape", "6"], "no weights that learn"),
    ],
)
def test_what_cannot_be_verified_is_one_red_row_with_the_reason(verify, name, arguments, reason):
    result, (row,) = verify(name, *arguments)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert row["passed"] is False
    assert reason in row["note"]


def test_a_module_that_returns_several_things():
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(Exception, match="returns tuple, not a tensor"):
        list(VerifiedModel(lambda: Two(6, 3), "two", (6,)).checks())


def test_too_slow_a_speed_is_said(monkeypatch):
    monkeypatch.setattr(own_model, "TRIED", (1.0, 2.0))
    own = VerifiedModel(
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), "small", (6,)
    )
    *_, last = own.checks()
    found = last.measure()
    assert found.difference > last.bound
    assert found.where == "not up to c = 2 hops per second"
