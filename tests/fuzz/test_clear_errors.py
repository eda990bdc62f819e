"""Input that is far beyond what anybody means: one line that names the setting, and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from bad_input import MODELS, TINY
from torch import nn
from typer.testing import CliRunner

import hamdist
from hamdist.cli import app
from hamdist.config import Settings, read_settings
from hamdist.dynamics.vjp.seeding import OwnGenerator
from hamdist.errors import ClusterError, SettingsError, SnapshotError
from hamdist.launch.driver import _hand_over, _Results
from hamdist.launch.events import File, FilesStay, Results, from_line, tell
from hamdist.runtime.results.events import Warned
from hamdist.runtime.storage.snapshot_files import (
    Manifest,
    SnapshotFile,
    read_manifest,
    settings_of,
)
from hamdist.study.shared.machine import check_time


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
        ("steps: 4\nseed: 010\n", "line 2: 010: .*octal; write it without, or '010' if"),
        ("stream: {batch: -032}\n", "line 1: -032: .*octal"),
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


@pytest.mark.parametrize("name", ["lock", "generator", "without"])
def test_a_model_of_train(name):
    defined = {}
    exec(MODELS, defined)
    items = [(torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64))] * 2
    with pytest.raises(SettingsError, match=r"1.guard is a (lock|generator)|model has no weights"):
        hamdist.train(defined[name](), items, level="trace", engine={"kind": "inprocess"})


def test_an_activation_that_a_model_keeps_is_no_reason():
    """It cannot be copied by itself, as it has a history."""
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 10))
    model.last = model(torch.zeros(2, 64))
    items = [(torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64))] * 2
    assert hamdist.train(model, items, level="trace", engine={"kind": "inprocess"}).samples == 2


def test_a_run_of_thousands_of_years():
    """6 operations x 1000 layers x 1000^2 weights x batch 100 are 60 s of a sample at 1e10 / s."""
    sizes = {"model": {"depth": 1000, "width": 1000}, "stream": {"batch": 100}}
    year = 365 * 24 * 3600 // 60
    assert check_time(Settings(**sizes, steps=9 * year)) == []
    (warning,) = check_time(Settings(**sizes, steps=7000 * year))
    assert "about 7,000 years" in warning
    assert check_time(Settings(**sizes)) == []


MANIFEST = Manifest(
    format=1,
    tick=8,
    run="a",
    parts={"block0": SnapshotFile(file="block-0.1.safetensors", nbytes=3, sha256="00")},
    settings={},
    network={},
    delays={},
    versions={},
)


@pytest.mark.parametrize("character", ["\ud800", "\0"])
@pytest.mark.parametrize("changed", ["file", "settings"])
def test_a_manifest_with_characters_of_no_text(character, changed):
    """Its checksum is right, so that nothing else is wrong with it."""
    part = MANIFEST.parts["block0"]
    values = {
        "file": {"parts": {"block0": part.model_copy(update={"file": f"a{character}"})}},
        "settings": {"settings": {"snapshots": {"path": f"a{character}b"}}},
    }
    body = json.loads(MANIFEST.model_copy(update=values[changed]).dumped())
    with pytest.raises(SnapshotError, match="here") as raised:
        settings_of(read_manifest(json.dumps(body).encode(), "here"), "here")
    assert "\n" not in str(raised.value)


def test_a_full_disk_of_the_log_ends_no_run(monkeypatch, capfd):
    write, full = os.write, [True]

    def half(descriptor, data):
        if full and descriptor == 1:
            if len(data) <= 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data[: len(data) - 20])
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", half)
    assert not tell(Warned(text="lost"))
    full.clear()
    assert tell(written := Warned(text="written"))
    read = [from_line(line)[1] for line in capfd.readouterr().out.splitlines()]
    assert read == [None, written]


@pytest.mark.parametrize("written", [True, False])
def test_results_that_the_log_did_not_take_stay(written, tmp_path, monkeypatch):
    order = SimpleNamespace(id="x", storage=None, most=100)
    said = []
    monkeypatch.setattr("hamdist.launch.driver.mkdtemp", lambda **_: str(tmp_path / "results"))
    monkeypatch.setattr("hamdist.launch.driver.tell", lambda event: said.append(event) or written)
    (tmp_path / "results").mkdir()
    with _Results(order) as results:
        (results.path / "summary.json").write_text("{}")
        results.handed_over = _hand_over(results.path, order)
    assert (tmp_path / "results" / "summary.json").exists() is not written
    assert isinstance(said[-1], FilesStay) is not written


def test_random_bytes_are_no_generator():
    with pytest.raises(SnapshotError, match="random generator"):
        OwnGenerator(0).load_state_dict({"cpu": torch.zeros(5, dtype=torch.uint8), "gpu": None})
