"""Replays of recorded runs. Oracles: a bit that the model itself flips in a known tick; a run that
ends behind the tick, by its result; the digests that the run recorded."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.study.replay.replay import recorded_run

pytestmark = pytest.mark.timeout(300)
SAMPLES, WRONG = 1500, 1111  # the sample at which a bit flips
SETTINGS = """
level: trace
stream: {batch: 2}
partition: {cuts: ["2", "4"]}
engine: {digests: 4}
snapshots: {every: 250, keep: 9}
"""
MODEL = """
import struct
import torch
from torch import nn

class Flip(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if x.device.type == "meta":
            return x * 1
        self.calls += 1
        y = x.clone()
        if int(self.calls) == WRONG + 1:
            (bits,) = struct.unpack("<i", struct.pack("<f", float(y[0, 0])))
            (other,) = struct.unpack("<f", struct.pack("<i", bits ^ 1))
            with torch.no_grad():
                y[0, 0] = other
        return y

def model(*_, **__):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 8), Flip(), nn.Linear(8, 10)]
    return nn.Sequential(*layers)
"""


WITHOUT = f"""
import hamdist, torch
class Lacking:
    portable = True
    def __init__(self):
        self.inner = hamdist.streams.digits(batch=2, seed=0, dtype=torch.float32).train
        self.spec = self.inner.spec
    def samples(self):
        for n, sample in zip(range({SAMPLES}), self.inner.samples()):
            if n != {WRONG}:
                yield sample
def stream(seed):
    return Lacking()
"""


def command(*words, code=0):
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == code, found.output
    return found.stdout if not code else " ".join(found.output.split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, one of which has flipped a bit; one was killed in a later snapshot."""
    where = tmp_path_factory.mktemp("runs")
    (where / "s.yaml").write_text(SETTINGS)
    for name, wrong in (("right", -9), ("wrong", WRONG)):
        (where / f"{name}.py").write_text(f"WRONG = {wrong}\n{MODEL}")
        words = ["--model", f"{where / name}.py:model", "--snapshots", where / f"{name}-snapshots"]
        command("run", where / "s.yaml", "--steps", SAMPLES, "--out", where / name, *words)
    (where / "right-snapshots" / f"tick-{WRONG - 5:012d}").mkdir()
    return where


def models(where, *names):
    return [f"{where / name}.py:model" for name in names]


def test_the_first_bit_that_differs_is_found_in_two_replays(runs):
    """Block 1 meets sample n in tick n + 1; one in four signals was hashed."""
    right, wrong = models(runs, "right", "wrong")
    words = ["bisect", runs / "right", runs / "wrong", "--model", right, "--second-model", wrong]
    found = json.loads(command(*words, "--json", code=1))
    assert found["parting"] == {
        "tick": WRONG + 1,
        "block": "block1",
        "channel": "state block1->block2",
        "after": WRONG,
        "replays": 2,
        "cause": None,
    }
    assert json.loads(command(*words[:2], runs / "right", "--json"))["equal"]


def test_a_run_that_differs_from_its_replay_is_named(runs):
    """The second run is replayed with the model that flips no bit: as if memory had failed."""
    right, _ = models(runs, "right", "wrong")
    words = ["bisect", runs / "right", runs / "wrong", "--model", right, "--json"]
    parting = json.loads(command(*words, code=1))["parting"]
    assert parting["block"] == "block1"
    assert parting["after"] <= WRONG < parting["tick"]
    assert "wrong': its replay is not the run: at tick" in parting["cause"]


@pytest.mark.parametrize("tick", [3, 777, 1301])
def test_a_block_at_a_tick_has_the_weights_of_a_run_that_ends_there(runs, tmp_path, tick):
    """The last block learns from sample n in tick n + 2: its weights are those of n + 1 samples."""
    (right,) = models(runs, "right")
    words = ["rewind", runs / "right", "--model", right, "--block", "block2", "--tick", tick]
    before = sorted((runs / "right-snapshots").rglob("*"))
    found = json.loads(command(*words, "--out", tmp_path / "t.safetensors", "--json"))
    assert sorted((runs / "right-snapshots").rglob("*")) == before
    assert found["marks"] > 0
    assert found["began"].endswith(f"tick-{tick // 250 * 250:012d}") or tick < 250
    seen = load_file(tmp_path / "t.safetensors")
    short = tmp_path / "short"
    steps = ["--steps", tick - 1, "--out", short, "--model", right]
    command("run", runs / "s.yaml", *steps, "--set", "snapshots.every=null")
    whole = load_file(short / "model.safetensors")
    assert torch.equal(seen["theta 4.weight"], whole["4.weight"])
    assert seen["taken state block1->block2"].shape == (2, 8)
    assert seen["sent message block1->block2"].shape == (2, 8)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("block", "sent"), [("block0", "state"), ("block1", "message")])
def test_a_block_alone_is_the_same_to_the_bit(runs, block, sent, tmp_path):
    """From the snapshot of tick 1000 and a record of what the block took: as the whole network, at
    the last tick of the record and at an earlier one."""
    (right,) = models(runs, "right")
    words = ["rewind", runs / "right", "--model", right, "--block", block, "--json", "--tick"]
    record = tmp_path / "taken.safetensors"
    for tick, extra in ((1202, ["--record", record]), (1200, [])):
        whole, alone = tmp_path / f"whole{tick}", tmp_path / f"alone{tick}"
        command(*words, tick, "--out", whole, *extra)
        found = json.loads(command(*words, tick, "--out", alone, "--signals", record))
        assert found["stepped"] == "this block alone"
        assert found["began"].endswith("tick-000000001000")
        assert found["marks"] >= 40  # (of its own signals)
        one, other = load_file(whole), load_file(alone)
        assert {*one} == {*other}
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert f"sent {sent} block0->block1" in one


def test_a_block_alone_that_computes_other_bits_is_named(runs, tmp_path):
    """With the model that flips a bit at tick 1112, alone: its own marks say so."""
    right, wrong = models(runs, "right", "wrong")
    words = ["rewind", runs / "right", "--block", "block1", "--tick", 1202]
    record = ["--record", tmp_path / "r"]
    command(*words, "--model", right, *record)
    signals = ["--signals", tmp_path / "r"]
    found = command(*words, "--model", wrong, *signals, code=2)
    assert "block 'block1' sent other bits" in found
    for other, text in (
        (["--block", "block2", "--tick", 1202], "has what block 'block1' took at ticks 1000 to"),
        (["--block", "block1", "--tick", 1203], "not block 'block1' up to tick 1203"),
    ):
        found = command("rewind", runs / "right", "--model", right, *other, *signals, code=2)
        assert text in found
    (tmp_path / "r").write_bytes(b"x")
    assert "no file of a snapshot" in command(*words, "--model", right, *signals, code=1)


def test_ticks_before_a_run_that_was_resumed_with_other_settings(runs, tmp_path):
    """They are another run's: the error says so; behind a snapshot of its own it is the same."""
    (right,) = models(runs, "right")
    words = ["run", runs / "s.yaml", "--model", right, "--set", "snapshots.keep=1"]
    command(*words, "--snapshots", tmp_path / "s", "--steps", 300, "--out", tmp_path / "first")
    resume = ["--resume", tmp_path / "s", "--snapshots", tmp_path / "s", "--steps", 600]
    command(*words, *resume, "--set", "learning.lr=0.01", "--out", tmp_path / "second")
    rewind = ["rewind", tmp_path / "second", "--model", right, "--block", "block1", "--tick"]
    found = command(*rewind, 400, code=2)
    assert "the run had gone on from sample 300 of another, whose settings may have" in found
    assert "--model" in found
    (last,) = (tmp_path / "s").glob("tick-*")
    tick = int(last.name[-12:]) + 1
    assert json.loads(command(*rewind, tick, "--json"))["began"] == str(last)


def test_a_fork_without_a_sample_is_a_run_that_never_had_it(runs, tmp_path):
    """Sample 1111 is left out from the snapshot of tick 1000 on; the run that never had it draws
    from a stream that lacks it."""
    (right,) = models(runs, "right")
    (tmp_path / "stream.py").write_text(WITHOUT)
    fork = ["fork", runs / "right", "--model", right, "--without-sample", WRONG]
    command(*fork, "--out", tmp_path / "fork")
    words = ["--model", right, "--steps", SAMPLES, "--set", "snapshots.every=null"]
    lacking = ["--stream", f"{tmp_path / 'stream.py'}:stream"]
    command("run", runs / "s.yaml", *words, *lacking, "--out", tmp_path / "lacking")
    one, other, first = (
        load_file(where / "model.safetensors")
        for where in (tmp_path / "fork", tmp_path / "lacking", runs / "right")
    )
    del one["3.calls"]  # (a stream of the user's is looked at before: one call more)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not all(torch.equal(one[key], first[key]) for key in one)
    summary = json.loads((tmp_path / "fork" / "summary.json").read_text())
    assert (summary["samples"], summary["resumed"]) == (SAMPLES - 1, 1001)  # (0 to 1000)


def test_where_a_fork_begins(runs):
    """Behind tick 1000 samples 0 to 1000 have entered: 1111 has not, 1000 has."""
    run = recorded_run(runs / "right")
    assert run.latest_before(math.inf, WRONG).tick == 1000
    assert run.latest_before(1200, 1000).tick < 1000
    assert run.latest_before(5, WRONG) is None


def test_a_fork_with_another_setting_is_the_run_with_it(runs, tmp_path):
    (right,) = models(runs, "right")
    words = ["--set", "learning.lr=0.02", "--model", right, "--set", "steps=60"]
    command("fork", runs / "right", *words, "--out", tmp_path / "fork")
    every = ["--set", "snapshots.every=null"]
    command("run", runs / "s.yaml", *words, *every, "--out", tmp_path / "whole")
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("fork", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    late = ["fork", runs / "right", "--model", right, "--without-sample", SAMPLES]
    assert f"the run has samples 0 to {SAMPLES - 1}" in command(*late, code=2)


def test_a_fork_leaves_the_run_as_it_was(runs, tmp_path):
    """Its snapshots lie in its own folder, whence it is forked in turn."""
    (right,) = models(runs, "right")
    before = {path: path.stat().st_mtime_ns for path in (runs / "right-snapshots").rglob("*")}
    words = ["--tick", 600, "--model", right, "--set", "steps=900"]
    other = ["--set", "snapshots.every=50", "--set", "learning.lr=0.02"]
    command("fork", runs / "right", *words, *other, "--out", tmp_path / "a")
    assert {
        path: path.stat().st_mtime_ns for path in (runs / "right-snapshots").rglob("*")
    } == before
    assert recorded_run(tmp_path / "a").latest_before(700).tick == 700
    fewer = ["--without-sample", 870, "--model", right, "--out", tmp_path / "b"]
    command("fork", tmp_path / "a", *fewer)
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert (summary["samples"], summary["resumed"], summary["warnings"]) == (899, 851, [])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--block", "b", "--tick", "3"], "--block 'b': no block of the run; there are block0"),
        (["--block", "block2", "--tick", "1"], "block 'block2' does nothing then"),
    ],
)
def test_what_cannot_be_rewound_is_named(runs, words, text):
    (right,) = models(runs, "right")
    found = CliRunner().invoke(app, ["rewind", str(runs / "right"), "--model", right, *words])
    assert found.exit_code == 2
    assert text in " ".join(found.output.split())


def test_runs_whose_digests_are_of_other_signals_are_not_compared(runs, tmp_path):
    (right,) = models(runs, "right")
    words = ["--steps", 9, "--set", "engine.digests=true", "--set", "snapshots.every=null"]
    command("run", runs / "s.yaml", "--model", right, "--out", tmp_path / "o", *words)
    found = CliRunner().invoke(app, ["diff", str(runs / "right"), str(tmp_path / "o")])
    assert found.exit_code == 2
    assert "one hashed one in 4 signals, the other one in 1" in " ".join(found.output.split())


def test_folders_without_a_run_are_refused(tmp_path):
    found = CliRunner().invoke(app, ["bisect", str(tmp_path), str(tmp_path)])
    assert found.exit_code == 2
    assert "settings.yaml there; give the folder" in " ".join(found.output.split())
