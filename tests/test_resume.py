"""A run that was ended goes on: by the command, and after a signal. Oracle: one that was not."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from runtime.networks import PortableStream, chain
from runtime.test_engines_equal import assert_equal, settings
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.runtime.snapshot import latest
from hamdist.runtime.train import snapshot_model, train
from hamdist.streams import from_iterable

SMALL = ["--steps", "60", "--set", "engine.kind=inprocess"]


def command(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_resume_and_export(tmp_path):
    whole, on, kept = tmp_path / "whole", tmp_path / "on", tmp_path / "kept"
    command("run", "digits", *SMALL, "--out", whole)
    every = ["--set", "snapshots.every=20", "--set", "snapshots.keep=9"]
    shown = command("run", "digits", *SMALL, *every, "--snapshots", kept, "--out", tmp_path / "x")
    assert "latest snapshot" in shown.stdout
    assert equal(weights(whole), weights(tmp_path / "x"))
    first = sorted(kept.iterdir())[0]
    command("run", "digits", *SMALL, "--resume", first, "--out", on)
    assert equal(weights(whole), weights(on))

    command("export", first, tmp_path / "then.safetensors")
    then = load_file(tmp_path / "then.safetensors")
    assert then.keys() == weights(whole).keys()
    assert not equal(then, weights(whole))
    assert all(torch.isfinite(value).all() for value in then.values())


def test_weights_to_begin_with(tmp_path):
    """No step: what comes out is what went in."""
    command("run", "digits", *SMALL, "--out", tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    still = ["--set", "learning.lr=0", "--out", tmp_path / "b"]
    command("run", "digits", *SMALL, "--weights", file, *still)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_wrong_input(tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.ones(2)}, other)
    for arguments, words in (
        (["--resume", tmp_path / "nothing"], "no snapshots there"),
        (["--weights", tmp_path / "nothing"], "cannot be read"),
        (["--weights", __file__], "no safetensors file"),
        (["--weights", other], "of another model"),
        (["--weights", other, "--resume", tmp_path], "begins with one of them"),
        (["--snapshots", "nowhere://x", "--steps", "4"], "no file system for it"),
        (["--snapshots", other / "x"], "cannot be read: Not a directory"),
        (["--snapshots", "/proc/hamdist"], "snapshots.path '/proc/hamdist': "),
    ):
        result = CliRunner().invoke(app, ["run", "digits", *SMALL, *map(str, arguments)])
        assert result.exit_code in (1, 2)
        assert words in " ".join(result.output.split()), result.output
    result = CliRunner().invoke(app, ["export", str(tmp_path), str(tmp_path / "f")])
    assert result.exit_code == 1
    assert not (tmp_path / "f").exists()


def test_more_steps_after_the_end(tmp_path):
    """The last snapshot lies behind the end of the stream: a run of more steps goes on with its
    weights, at its place in the stream. Oracle: a new run with those weights and that stream."""
    kept = {"path": str(tmp_path), "every": 30, "keep": 1}

    def own(steps, **fields):
        return settings({"kind": "inprocess"}, steps, level="trace", **fields)

    train(chain(), PortableStream(30), own(30, snapshots=kept))
    with pytest.warns(UserWarning, match=r"its steps were over, and steps differ.*\(30 items\)"):
        on = train(chain(), PortableStream(50), own(50), resume=tmp_path)
    assert on.samples == 20
    stream = PortableStream(50)
    then = latest(tmp_path, pytest.fail)
    assert then.tick == 30
    begin = snapshot_model(then, chain(), stream.spec, own(30))
    rest = from_iterable(list(stream.samples())[30:], classes=stream.spec.classes)
    assert_equal(train(begin, rest, own(20)), on)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("level", ["local", "trace"])
def test_a_signal(tmp_path, monkeypatch, number, level):
    """A snapshot first, then the end of the stream."""
    monkeypatch.setattr("hamdist.runtime.inprocess.PROGRESS_SECONDS", 0.0)
    alone = {"kind": "inprocess"}
    whole = train(chain(), PortableStream(60), settings(alone, 60, level=level))
    sent = []

    def end(progress):
        if progress.samples >= 30 and not sent:
            sent.append(progress.samples)
            os.kill(os.getpid(), number)

    kept = settings(alone, 60, level=level, snapshots={"path": str(tmp_path)})
    part = train(chain(), PortableStream(60), kept, on_progress=end)
    assert part.interrupted
    assert part.samples < 60
    assert len(part.snapshots) == 1
    assert_equal(whole, train(chain(), PortableStream(60), kept, resume=tmp_path))
