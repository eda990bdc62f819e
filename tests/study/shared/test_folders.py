"""Folders of results: claimed, written while a run goes on, gone on from after kill -9, never
overwritten unasked. Oracles: the same comparison without interruption; the folders' own content."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.dynamics.objective.prequential import Window
from hamdist.errors import BlockError, SettingsError
from hamdist.runtime.results.events import RunBegun
from hamdist.runtime.results.measured import Replaced
from hamdist.runtime.results.result import Progress
from hamdist.study.shared.result_folder import ResultFolder, free_folder

TINY = """
name: tiny
steps: 12
stream: {batch: 4}
engine: {kind: inprocess}
"""
# Makes the model; ends its process by kill -9 when the fourth run asks for it, behind the plans of
# three levels.
FOURTH = """
import os, signal, torch

def make():
    with open("calls", "a") as file:
        file.write(".")
    if os.path.getsize("calls") == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10))
"""
COMPARE = ["compare", "tiny.yaml", "--levels", "trace,local,group", "--model", "fourth.py:make"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "fourth.py").write_text(FOURTH)
    return tmp_path


def command(*arguments):
    return CliRunner().invoke(app, list(arguments))


def rows(folder):
    """The numbers of a comparison, without times and memory."""
    summary = json.loads((folder / "summary.json").read_text())
    kept = ("level", "seeds", "held_out_loss", "prequential_loss", "gap_to_backprop", "staleness")
    return [[row[name] for name in kept] for row in summary["rows"]]


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_was(folder):
    killed = subprocess.run([sys.executable, "-m", "hamdist", *COMPARE], timeout=100, check=False)
    assert killed.returncode == -signal.SIGKILL
    out = folder / "results" / "tiny"
    summary = json.loads((out / "summary.json").read_text())
    assert [row["level"] for row in summary["rows"]] == ["centralised", "trace", "local"]
    assert summary["interrupted"]
    assert len(list((out / "runs").iterdir())) == 3
    assert len((out / "results.csv").read_text().splitlines()) == 4
    assert "only the runs that finished" in (out / "report.html").read_text()

    done = command(*COMPARE)
    assert done.exit_code == 0, done.output
    assert "Going on with the comparison in results/tiny" in done.stderr
    assert os.path.getsize("calls") == 9  # one more run was made, and its plan before
    whole = command(*COMPARE, "--out", "whole")
    assert whole.exit_code == 0
    assert os.path.getsize("calls") == 16
    assert rows(out) == rows(folder / "whole")
    assert not json.loads((out / "summary.json").read_text())["interrupted"]

    again = command(*COMPARE)  # it is finished: a new one
    assert "results go to results/tiny-2 (--overwrite: into results/tiny)" in again.stderr
    assert rows(folder / "results" / "tiny-2") == rows(out)


def test_an_interrupted_comparison_of_other_settings_or_code_is_not_gone_on_from(folder):
    def claimed(key):
        said = []
        with ResultFolder(folder / "out", overwrite=False, key=key, say=said.append) as one:
            one.watch(run_begun("trace", 0), print)(Progress(1.0, 1, 2, [], []))
        return one.path.name, one.goes_on

    assert claimed("a") == ("out", False)
    assert claimed("b") == ("out-2", False)
    assert claimed("a") == ("out", True)
    assert claimed("b") == ("out-2", True)
    first = ResultFolder(folder / "out", overwrite=False, key="a", say=print)
    assert claimed("a") == ("out-3", False)  # somebody works on the first one
    with first:
        pass
    assert claimed("a") == ("out", True)


def test_a_run_is_kept_and_overwrites_nothing(folder):
    for _ in range(2):
        done = command("run", "tiny.yaml")
        assert done.exit_code == 0
    names = sorted(path.name for path in (folder / "results").iterdir())
    assert len(names) == 2
    assert all(name.startswith("tiny-2") for name in names)  # and the time
    assert f"results/{names[-1]}" in done.output

    (folder / "own").mkdir()
    (folder / "own" / "notes.txt").write_text("mine")
    assert command("run", "tiny.yaml", "--out", "own").exit_code == 0
    assert [path.name for path in (folder / "own").iterdir()] == ["notes.txt"]
    assert (folder / "own-2" / "model.safetensors").exists()
    before = (folder / "own-2" / "model.safetensors").read_bytes()
    command("run", "tiny.yaml", "--seed", "1", "--out", "own-2", "--overwrite")
    assert (folder / "own-2" / "model.safetensors").read_bytes() != before
    command("run", "tiny.yaml", "--out", "own", "--overwrite")
    assert (folder / "own" / "notes.txt").read_text() == "mine"
    assert (folder / "own" / "model.safetensors").read_bytes() == before


def test_a_folder_that_is_being_written_is_not_overwritten(folder):
    with ResultFolder(folder / "o", say=print) as own:
        own.emit(run_begun("trace", 0))
        before = (folder / "o" / "events.jsonl").read_text()
        done = command("run", "tiny.yaml", "--out", "o", "--overwrite")
        assert done.exit_code == 2
        assert "another process writes its results there" in " ".join(done.stderr.split())
        assert (folder / "o" / "events.jsonl").read_text() == before
    assert command("run", "tiny.yaml", "--out", "o", "--overwrite").exit_code == 0


def run_begun(level, seed):
    return RunBegun(title="", engine="inprocess", level=level, seed=seed)


def test_what_happens_is_on_disk_at_once(folder):
    lines = lambda name: [json.loads(x) for x in (folder / "o" / name).read_text().splitlines()]  # noqa: E731
    windows = [Window(0, 9, 10, 5.0, 8, 10), Window(10, 19, 10, 2.0, 9, 10)]
    with ResultFolder(folder / "o", overwrite=False, say=print) as own:
        note = own.watch(run_begun("trace", 3), lambda _: None)
        note(Progress(0.0, 0, 40, [], [], phase="plan"))
        note(Progress(1.0, 10, 40, windows[:1], []))
        names = ["started", "run", "phase", "window", "progress"]
        assert [e["event"] for e in lines("events.jsonl")] == names
        one = lines("events.jsonl")[3]
        assert (one["level"], one["seed"], one["loss"], one["accuracy"]) == (
            "trace",
            3,
            0.5,
            0.8,
        )
        lost = Replaced("actor 1", ["b"], 7, 5, 1.5, 3)
        note(Progress(2.0, 20, 40, windows, [], replaced=[lost]))
        note(Progress(3.0, 20, 40, windows, [], replaced=[lost]))
        names = [e["event"] for e in lines("events.jsonl")][5:]
        assert names == ["replaced", "window", "progress", "progress"]
        windows = [e["last"] for e in lines("events.jsonl") if e["event"] == "window"]
        assert windows == [9, 19]


def test_a_warning_is_an_event_and_shown_as_before(folder):
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = mine = lambda message, *_, **__: shown.append(str(message))
        with ResultFolder(folder / "o", overwrite=False, say=print) as own:
            warnings.warn("mind the disk", stacklevel=1)
            last = json.loads((own.path / "events.jsonl").read_text().splitlines()[-1])
            assert (last["event"], last["text"]) == ("warning", "mind the disk")
        assert warnings.showwarning is mine
    assert shown == ["mind the disk"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_failed_before_its_first_item_leaves_nothing(folder, begun):
    with (
        contextlib.suppress(BlockError),
        ResultFolder(folder / "new", overwrite=False, say=print) as own,
    ):
        own.watch(run_begun("trace", 0), print)(
            Progress(1.0, 1, 2, [], [], phase=None if begun else "plan")
        )
        raise BlockError("a", 1, "no")
    assert (folder / "new").exists() == begun
    if begun:
        text = (folder / "new" / "events.jsonl").read_text()
        assert json.loads(text.splitlines()[-1])["error"] == "block 'a' failed at tick 1: no"


def test_a_full_disk_ends_the_events_and_not_the_run(folder, monkeypatch):
    said = []
    with ResultFolder(folder / "o", overwrite=False, say=said.append) as own:
        own._events._file.close()
        own._events._file = open("/dev/full", "w")  # noqa: SIM115
        note = own.watch(run_begun("trace", 0), lambda _: None)
        note(Progress(1.0, 1, 2, [], []))
        note(Progress(2.0, 2, 2, [], []))
    assert said == [f"Warning: {folder / 'o'}: events are written no more: No space left on device"]


def test_folders_that_cannot_be(folder):
    (folder / "file").touch()
    for wrong in (folder / "file", folder / "file" / "deeper", folder / "a\0b"):
        with pytest.raises(SettingsError, match="cannot write there"):
            free_folder(wrong, overwrite=False, say=print)


def test_events_go_on_behind_a_line_that_was_cut_off(folder):
    """By a process that was killed: its line is lost, and no other one."""
    with ResultFolder(folder / "o", key="k", say=print) as one:
        path = one.path / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with ResultFolder(folder / "o", key="k", say=print) as two:
        assert two.goes_on
    lines = path.read_text().splitlines()
    names = [json.loads(line)["event"] for line in (lines[0], *lines[2:])]
    assert names == ["started", "started", "ended"]
