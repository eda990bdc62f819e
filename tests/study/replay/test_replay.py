"""Replays of recorded runs. Oracles: a bit that the model itself flips in a known tick; a run that
ends behind the tick, by its result; the digests that the run recorded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hamdist.cli import app

pytestmark = pytest.mark.timeout(120)
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


def command(*words, code=0):
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == code, found.output
    return found.stdout


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
