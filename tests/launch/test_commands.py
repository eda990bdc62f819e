"""The commands of a cluster as a user types them: wrong input, and once the whole way on a machine.
Oracle of the run: the in-process engine, to the bit."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

import hamdist as hamdist_
from hamdist.cli import app
from hamdist.cli.cluster import follow_run
from hamdist.errors import SettingsError
from hamdist.launch.events import Ended, Results, to_line
from hamdist.launch.jobs_api import missing_extras

RUN = ["--steps", "40", "--set", "engine.actors=2", "--set", "metrics.window=10"]
MODEL = """
import torch

def make():
    layers = torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10)
    return torch.nn.Sequential(*layers)

def data(seed):
    import hamdist
    own = hamdist.streams.digits(batch=32, seed=seed + 1, dtype=torch.float32)
    return own.train, (own.x, own.y)
"""
ALONE = ["--engine", "inprocess", "--set", "engine.actors=auto"]
PORT, JOBS_PORT = 26379, 28265

needs_extras = pytest.mark.skipif(
    bool(missing_extras()), reason="no ray[default]: pip install 'hamdist[cluster]'"
)


def command(*arguments):
    return CliRunner().invoke(app, list(arguments))


def flat(text):
    return " ".join(text.split())


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch, tmp_path):
    """No test finds a cluster of the user's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HAMDIST_CLUSTER", raising=False)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["launch", "digits"], 2, "which cluster? Name it (--cluster FILE|ADDRESS"),
        (["launch", "nothing", "--cluster", "x:1"], 2, "no settings file 'nothing'"),
        (["launch", "digits", "--cluster", "gone.yaml"], 2, "'gone.yaml': cannot be read"),
        (["launch", "digits", "--cluster", "ftp://x"], 2, "jobs: write it as http://HOST:PORT"),
        (["launch", "digits", "--set", "lr=1", "--cluster", "x:1"], 2, "lr: no such setting"),
        (
            ["launch", "digits", "--set", "engine.address=h:1", "--cluster", "x:1"],
            2,
            "engine.address 'h:1': --cluster says where",
        ),
        (["launch", "digits", "--detach", "--out", "o", "--cluster", "x:1"], 2, "attach --out"),
        (["launch", "digits", "--model", "x:y", "--cluster", "x:1"], 2, "no module 'x'"),
        (["launch", "digits", "--out", "/proc/x", "--cluster", "x:1"], 2, "cannot write there"),
        (["cluster", "start", "--port", "0"], 2, "--port"),
    ],
)
def test_wrong_input(arguments, code, words):
    result = command(*arguments)
    assert result.exit_code == code
    assert words in flat(result.output)
    assert "Traceback" not in result.output


@needs_extras
@pytest.mark.parametrize("arguments", [["launch", "digits"], ["attach"], ["runs"], ["stop", "x"]])
def test_nobody_there(arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # bound, but nobody listens
        result = command(*arguments, "--cluster", f"127.0.0.1:{port}")
    assert result.exit_code == 1
    assert f"http://127.0.0.1:{port}: no Jobs API of Ray answers there" in flat(result.output)
    assert "ssh -N -L 8265:127.0.0.1:8265 HEAD" in flat(result.output)


def test_a_run_that_failed_behind_its_first_sample_says_how_far_it_came(caplog):
    class Told:
        def lines(self, name):
            return [to_line(Ended(code=1, samples=120, error=f"{name}: disk gone"))]

    with pytest.raises(typer.Exit):
        follow_run(Told(), "run", Results(None))
    assert caplog.messages == ["Error: run: disk gone", "Stopped after 120 samples."]


def test_without_rays_extras(monkeypatch):
    monkeypatch.setattr("hamdist.launch.jobs_api.find_spec", lambda name: None)
    for arguments in (["launch", "digits", "--cluster", "127.0.0.1:1"], ["cluster", "start"]):
        result = command(*arguments)
        assert result.exit_code == 1
        assert "pip install 'hamdist[cluster]'" in flat(result.output)


def test_stop_without_a_cluster():
    assert "No Ray of hamdist runs" in flat(command("cluster", "stop").output)


def test_doctor_of_this_host():
    result = command("doctor")
    assert result.exit_code == 0, result.output
    assert "versions: hamdist" in flat(result.output)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A Ray of this machine, as `hamdist cluster start` starts it; its cluster file."""
    folder = tmp_path_factory.mktemp("cluster")
    own = ["--folder", str(folder)]
    ports = ["--port", str(PORT), "--jobs-port", str(JOBS_PORT), "--cpus", "4"]
    result = command("cluster", "start", *own, *ports)
    assert result.exit_code == 0, result.output
    yield folder / "cluster.yaml"
    head = json.loads((folder / "head.json").read_text())
    result = command("cluster", "stop", *own)
    assert result.exit_code == 0, result.output
    assert not Path(head["folder"]).exists()
    assert not Path(f"/proc/{head['pid']}").exists() or _is_zombie(head["pid"])
    assert {path.name for path in folder.iterdir()} == {"ray.log", "storage"}


def _is_zombie(pid):
    return ") Z " in Path(f"/proc/{pid}/stat").read_text()


def hamdist(cluster, *arguments, cwd=None):
    """The command in a process of its own, which is returned. cluster: None for one without."""
    where = [] if cluster is None else ["--cluster", str(cluster)]
    return subprocess.Popen(
        [sys.executable, "-m", "hamdist", *arguments, *where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200"},
    )


def done(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, flat(out), flat(err)


@needs_extras
@pytest.mark.ray
@pytest.mark.hosts  # it takes a minute
@pytest.mark.timeout(400)
def test_the_whole_way(machine, tmp_path):
    """One start of Ray for all of it: each command talks to what the others have left."""
    (tmp_path / "own_model.py").write_text(MODEL)
    wanted = ["digits", *RUN, "--model", "own_model:make", "--stream", "own_model.py:data"]
    code, out, _ = done(hamdist(machine, "launch", *wanted, "--dry-run", cwd=tmp_path))
    assert code == 0
    assert "own_model.py travels along" in out

    alone = hamdist(None, "run", *wanted, *ALONE, "--out", "alone", cwd=tmp_path)
    code, out, err = done(hamdist(machine, "launch", *wanted, "--out", "far", cwd=tmp_path))
    assert done(alone)[0] == 0
    assert code == 0, err
    assert "samples 40 of 32 rows" in out
    assert_equal(tmp_path / "alone", tmp_path / "far")
    name = re.search(r"digits-trace-\w+", out).group()

    # again, by another terminal, after it has ended
    code, out, err = done(hamdist(machine, "attach", "--out", "again", cwd=tmp_path))
    assert (code, "samples 40" in out) == (0, True), err
    assert_equal(tmp_path / "far", tmp_path / "again")

    # a long one: its terminal is killed as soon as the run has begun, and it goes on
    endless = ["digits", "--set", "learning.decay=none", "--set", "engine.actors=2"]
    slow = ["--set", "stream.pace.period=0.01", "--set", "stream.pace.late=keep"]
    process = hamdist(machine, "launch", *endless, *slow, "--steps", "1000000", cwd=tmp_path)
    long = process.stdout.readline().strip()
    for line in process.stderr:
        if "sample " in line:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, out, _ = done(hamdist(machine, "runs"))
    assert f"{long} RUNNING trace 1000000" in out
    assert f"{name} SUCCEEDED trace 40" in out
    code, out, err = done(hamdist(machine, "stop", long, "--out", "stopped", cwd=tmp_path))
    assert code == 0, err
    summary = json.loads((tmp_path / "stopped/summary.json").read_text())
    assert summary["interrupted"]
    assert 0 < summary["samples"] < 1000000
    # the same samples alone: the same weights
    steps = str(summary["samples"])
    wanted = [*endless, *ALONE, "--steps", steps, "--out", "short"]
    short = hamdist(None, "run", *wanted, cwd=tmp_path)
    code, out, err = done(hamdist(machine, "doctor"))
    assert code == 0, err
    assert done(short)[0] == 0
    assert_equal(tmp_path / "short", tmp_path / "stopped")
    assert "links: 1 measured" in out

    # what fails there is told here
    wrong = machine.with_name("wrong.yaml")
    token = machine.with_name("wrong-token")
    token.write_text("0" * 64)
    token.chmod(0o600)
    text = machine.read_text()
    wrong.write_text(re.sub("token: .*", f"token: {token}", text))
    code, _, err = done(hamdist(wrong, "runs"))
    assert (code, "asks for Ray's token, and this is not it" in err) == (1, True)
    wrong.write_text(re.sub("python: .*", "python: /no/python", text))
    code, _, err = done(hamdist(wrong, "launch", "digits", "--steps", "5"))
    assert code == 1
    assert "Is hamdist installed for the Python that runs there?" in err
    wrong.unlink()
    token.unlink()


PACE = ["--set", "stream.pace.late=keep", "--set"]
LOSSES = ["digits", "--steps", "700", "--set", "engine.actors=2", "--set", "metrics.window=10"]


@needs_extras
@pytest.mark.ray
@pytest.mark.hosts
@pytest.mark.timeout(400)
def test_a_lost_driver_and_a_stop_change_no_number(machine, tmp_path):
    alone = hamdist(None, "run", *LOSSES, *ALONE, "--out", "alone", cwd=tmp_path)
    often = [*PACE, "stream.pace.period=0.01", "--set", "snapshots.every=100"]
    run = hamdist(machine, "launch", *LOSSES, *often, "--out", "lost", cwd=tmp_path)
    name = run.stdout.readline().strip()
    kept = machine.parent / "storage" / name / "snapshots"
    while not list(kept.glob("*/manifest.json")):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)
    driver_on(machine).kill()
    code, _, err = done(run)
    assert code == 0, err
    assert re.search(r"the driver was lost \(SIGKILL\); the run goes on from tick [1-9]", err), err
    assert done(alone)[0] == 0
    assert_equal(tmp_path / "alone", tmp_path / "lost")
    assert len(metrics(tmp_path / "alone")) == 70
    assert metrics(tmp_path / "alone") == metrics(tmp_path / "lost")
    assert not kept.exists()  # a run that has ended well needs none

    slow = [*PACE, "stream.pace.period=0.1"]  # it is stopped long before its end
    run = hamdist(machine, "launch", *LOSSES, *slow, cwd=tmp_path)
    name = run.stdout.readline().strip()
    for line in run.stderr:
        if "sample " in line:
            break
    code, _, err = done(hamdist(machine, "stop", name, "--out", "stopped", cwd=tmp_path))
    assert (code, f"--resume {name}" in err) == (0, True), err
    assert done(run)[0] == 130
    assert 0 < json.loads((tmp_path / "stopped/summary.json").read_text())["samples"] < 700
    on = hamdist(machine, "launch", *LOSSES, "--resume", name, "--out", "on", cwd=tmp_path)
    code, _, err = done(on)
    assert code == 0, err
    assert_equal(tmp_path / "alone", tmp_path / "on")
    assert metrics(tmp_path / "alone") == metrics(tmp_path / "on")


def driver_on(machine):
    head = psutil.Process(json.loads(machine.with_name("head.json").read_text())["pid"])
    [found] = [p for p in head.children(recursive=True) if "hamdist.launch.driver" in p.cmdline()]
    return found


def metrics(folder):
    """The windows, without the times they took."""
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(w["first"], w["samples"], w["loss"], w["correct"]) for w in told if "loss" in w]


def assert_equal(one, other):
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.equal(b[key]), key


@needs_extras
@pytest.mark.ray
@pytest.mark.hosts
@pytest.mark.timeout(400)
def test_a_live_run_is_talked_to_from_here_and_loses_nothing_with_its_driver(machine, tmp_path):
    pytest.importorskip("uvicorn")
    wanted = ["digits", "--live", "--detach", "--set", "engine.actors=2", "--level", "trace"]
    code, name, err = done(hamdist(machine, "launch", *wanted))
    assert code == 0, err
    run = hamdist_.attach(name, cluster=str(machine), timeout=90)
    drawn = torch.Generator().manual_seed(0)
    for k in range(20):
        n = run.feed(torch.rand(32, 64, generator=drawn))
        run.teach(n, torch.full((32,), k % 10))
    drivers = [
        p for p in psutil.process_iter(["cmdline"]) if "hamdist.launch.driver" in str(p.info)
    ]
    (driver,) = [p for p in drivers if name in str(p.environ())]
    driver.kill()
    run = hamdist_.attach(name, cluster=str(machine), timeout=90)
    assert run.status().fed == 20
    assert run.predict(torch.rand(32, 64, generator=drawn)).number == 20
    weights = run.weights()
    code, _, err = done(hamdist(machine, "stop", name))
    assert code == 0, err
    with pytest.raises(SettingsError, match="is over"):
        hamdist_.attach(name, cluster=str(machine))
    folder = machine.parent / "storage" / name
    again = hamdist_.replay(folder)
    saved = load_file(folder / "model.safetensors")
    assert again.samples == 21
    assert all(torch.equal(w, saved[n]) for n, w in again.model.state_dict().items())
    assert weights.keys() == saved.keys()
