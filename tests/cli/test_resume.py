"""A run that was ended goes on: by the command, and after a signal. Oracle: one that was not."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal, settings
from runtime.networks import PortableStream, batches, chain
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.config import Late
from hamdist.runtime.advice.advice import of_resumed
from hamdist.runtime.storage.snapshot_files import latest
from hamdist.runtime.train.train import train
from hamdist.streams import Paced, from_iterable
from hamdist.streams.wrappers.derived import Chosen

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


LONGER = {
    "momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.2},
    "adam": {"lr": 0.02, "momentum": 0.8, "adaptive": {}, "weight_decay": 0.01, "average": 0.9},
}


@pytest.mark.parametrize("level", ["trace", "backprop", "local", "heads"])
@pytest.mark.parametrize(
    ("recipe", "every"),
    [("momentum", {"every": 7}), ("adam", {"every": 7}), ("adam", {"seconds": 1e6})],
)
def test_more_steps_are_one_long_run(tmp_path, level, recipe, every):
    """Oracle: the long run, to the bit: with momentum, moments, and what was under way."""
    fields = {"level": level, "learning": LONGER[recipe]}
    alone = {"kind": "inprocess"}
    kept = {"path": str(tmp_path), "keep": 1, **every}
    whole = train(chain(), PortableStream(50), settings(alone, 50, **fields))
    train(chain(), PortableStream(50), settings(alone, 30, **fields, snapshots=kept))
    with pytest.warns(UserWarning, match="other settings than before: steps"):
        on = train(chain(), PortableStream(50), settings(alone, 50, **fields), resume=tmp_path)
    assert_equal(whole, on)
    assert on.samples == whole.samples == 50
    assert on.windows == whole.windows


@pytest.mark.ray
def test_more_steps_on_ray(session, leaves_no_socket, tmp_path):
    fields = {"level": "trace", "learning": LONGER["adam"]}
    spread = {"kind": "ray", "actors": 2}
    kept = {"path": str(tmp_path), "keep": 1, "every": 7}
    whole = train(chain(), PortableStream(50), settings({"kind": "inprocess"}, 50, **fields))
    train(chain(), PortableStream(50), settings(spread, 30, **fields, snapshots=kept))
    on = train(chain(), PortableStream(50), settings(spread, 50, **fields), resume=tmp_path)
    assert_equal(whole, on)


def test_more_steps_bend_a_course_that_falls_over_them(tmp_path):
    fields = {"level": "trace", "learning": {"lr": 0.1, "decay": "linear"}}
    kept = {"path": str(tmp_path), "every": 7}
    alone = {"kind": "inprocess"}
    train(chain(), PortableStream(50), settings(alone, 30, **fields, snapshots=kept))
    with pytest.warns(UserWarning, match=r"now falls over 60 .*at sample 30 .* from 0 to 0.5 of"):
        train(chain(), PortableStream(60), settings(alone, 60, **fields), resume=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("level", ["local", "trace"])
def test_a_signal(tmp_path, monkeypatch, number, level):
    """A snapshot first, then the end of the stream."""
    monkeypatch.setattr("hamdist.runtime.engines.inprocess.PROGRESS_SECONDS", 0.0)
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


class Clock:
    """Each look takes 2.5 periods of a second."""

    now = 0.0

    def __call__(self):
        self.now += 2.5
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def paced(late, items=40):
    clock = Clock()
    return Paced(PortableStream(items), 1.0, late, clock=clock, sleep=clock.sleep)


@pytest.mark.parametrize("blocks", [5, 2])
def test_what_was_dropped_stays_dropped(tmp_path, blocks):
    """Every sample was given or dropped, once; cut in another way, the run counts its own
    samples."""
    kept = {"path": str(tmp_path), "every": 5, "keep": 100}
    chosen = settings({"kind": "inprocess"}, None, level="trace", snapshots=kept)
    whole = train(chain(), paced(Late.DROP), chosen)
    assert whole.samples + whole.stream["dropped"] == 40
    assert whole.stream["dropped"] > 10
    first = sorted(p for p in tmp_path.iterdir())[1]
    then = latest(first, print).manifest
    assert then.passed > 5
    other = settings({"kind": "inprocess"}, None, level="trace", partition={"blocks": blocks})
    with pytest.warns(UserWarning, match="drops samples that come late"):
        on = train(chain(), paced(Late.DROP), other, resume=first)
    before = 0 if blocks == 5 else then.samples
    assert before + on.samples + on.stream["dropped"] == 40


def test_late_samples_that_are_kept(tmp_path):
    alone = {"kind": "inprocess"}
    whole = train(chain(), PortableStream(40), settings(alone, 40, level="trace"))
    kept = {"path": str(tmp_path), "every": 9, "keep": 100}
    chosen = settings(alone, 40, level="trace", snapshots=kept)
    train(chain(), paced(Late.KEEP), chosen)
    first = sorted(p for p in tmp_path.iterdir())[1]
    assert_equal(whole, train(chain(), paced(Late.KEEP), chosen, resume=first))


def test_a_stream_that_cannot_go_on(tmp_path):
    alone = {"kind": "inprocess"}
    kept = settings(alone, None, level="trace", snapshots={"path": str(tmp_path), "every": 5})
    train(chain(), from_iterable(iter(batches(20)), classes=3), kept)
    with pytest.warns(UserWarning, match="does not give the same samples again"):
        train(chain(), from_iterable(iter(batches(20)), classes=3), kept, resume=tmp_path)


@pytest.mark.parametrize(
    ("source", "late", "told"),
    [
        (PortableStream(9), Late.KEEP, None),
        (PortableStream(9), Late.DROP, "drops samples that come late"),
        (from_iterable(iter(batches(9)), classes=3), Late.KEEP, "does not give the same samples"),
        (from_iterable(iter(batches(9)), classes=3), Late.DROP, "does not give the same samples"),
    ],
)
def test_what_is_told_of_a_stream_is_that_of_its_source(source, late, told):
    """It was told of every paced stream that it drops samples; also with targets left out."""
    stream = Paced(source, 1.0, late)
    for one in (stream, Chosen(stream, ["out"])):
        (text,) = of_resumed(one) or ("",)
        assert text == "" if told is None else told in text


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_has_begun_with_anothers_weights_goes_on(tmp_path, again):
    """Its own place in the stream, and in the course of its step size. again: its snapshot lies
    behind another one from which it went on itself."""
    alone = {"kind": "inprocess"}
    decay = {"lr": 0.05, "decay": "linear"}

    def run(blocks, resume, name):
        kept = {"path": str(tmp_path / name), "every": 4, "keep": 100}
        chosen = settings(
            alone, 40, level="trace", learning=decay, partition={"blocks": blocks}, snapshots=kept
        )
        return train(chain(), PortableStream(40), chosen, resume=resume)

    def folder(name, number):
        return sorted(p for p in (tmp_path / name).iterdir() if p.name.startswith("tick"))[number]

    run(5, None, "first")
    with pytest.warns(UserWarning, match="its weights and its place in the stream"):
        whole = run(3, folder("first", 2), "second")
    assert 20 < whole.samples < 40
    name = "second"
    if again:
        run(3, folder(name, 1), "third")
        name = "third"
    assert_equal(whole, run(3, folder(name, 1), "last"))
