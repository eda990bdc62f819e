"""Input that is far beyond what anybody means: one line that names the setting, and exit code 2."""

from __future__ import annotations

import re
import sys

import pytest
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.config import read_settings
from hamdist.dynamics.cell import OwnGenerator
from hamdist.errors import ClusterError, SettingsError, SnapshotError
from hamdist.launch.events import File
from hamdist.launch.follow import Results

TINY = """
level: trace
steps: 6
model: {kind: residual-mlp, width: 8, depth: 2}
stream: {source: digits, batch: 4}
engine: {kind: inprocess}
"""
MODELS = """
import threading
from torch import nn

def made(value):
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 10))
    model[1].guard = value
    return model

def lock(): return made(threading.Lock())
def generator(): return made(x for x in "abc")
def without(): return nn.Sequential(nn.Flatten())
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "9" * 23], r"seed: .*less than or equal to 1000000000000000000"),
        (["--steps", "1" + "0" * 400], r"steps: .*less than or equal"),
        (["--set", "steps=true"], r"steps: give a number, not true or false"),
        (["--set", "learning.lr=true"], r"learning.lr: give a number, not true or false"),
        (["--set", "steps=1:30"], r"steps: .*received '1:30'"),
        (["--level", "backprob"], r"level: .*did you mean 'backprop'\?"),
        (["--set", "engine.actors=2"], r"'actors' is 2 with kind 'inprocess'"),
        (["--set", "model.width=1000000000"], r"model.width 1,000,000,000, .* this host has"),
        (["--set", "stream.batch=1000000000000"], r"stream.batch 1,000,000,000,000: .* this host"),
        (["--set", "model.depth=1000000000"], r"model.depth 1,000,000,000, .* this host has"),
        (["--set", 'stream.path="a\\0b"'], r"'path' has a NUL character"),
        (["--snapshots", "a\0b"], r"'path' has a NUL character"),
        (["--resume", "a\0b"], r"a path has no NUL character"),
        (["--model", "models_here.py:lock"], r"the model's 1.guard is a lock, which cannot be"),
        (["--model", "models_here.py:generator"], r"the model's 1.guard is a generator, which"),
        (["--model", "models_here.py:without"], r"the model has no weights"),
    ],
)
def test_one_error_that_names_it(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models_here", raising=False)
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "models_here.py").write_text(MODELS)
    result = CliRunner().invoke(app, ["run", "tiny.yaml", *arguments])
    text = " ".join(result.output.split())
    assert re.search(words, text), text
    assert result.exit_code == (1 if "--resume" in arguments else 2)
    assert not list(tmp_path.glob("results/*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("level: trace\nsteps: 3\nlevel: local\n", "line 3: 'level' is given twice"),
        ("model: {width: 8, depth: 2, width: 9}\n", "line 1: 'width' is given twice"),
        ("steps: 1:30\n", "steps: .*1:30"),
        ("name: 'a\0b'", "YAML"),
    ],
)
def test_settings_that_look_like_others(text, words):
    with pytest.raises(SettingsError, match=words):
        read_settings(text, "here")


def test_a_comparison_of_a_level_that_is_none(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    result = CliRunner().invoke(
        app, ["compare", str(tmp_path / "tiny.yaml"), "--levels", "backprob"]
    )
    assert result.exit_code == 2
    assert "did you mean 'backprop'?" in " ".join(result.output.split())


def test_a_folder_where_a_file_of_the_result_goes(tmp_path):
    (tmp_path / "summary.json").mkdir()
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with pytest.raises(ClusterError, match=r"summary.json'?: cannot be written"):
        Results(tmp_path).take(File(name="summary.json", size=0, sha256=empty))


def test_random_bytes_are_no_generator():
    import torch

    with pytest.raises(SnapshotError, match="random generator"):
        OwnGenerator(0).restore({"cpu": torch.zeros(5, dtype=torch.uint8), "gpu": None})
