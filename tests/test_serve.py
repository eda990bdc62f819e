"""A live run over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import hamdist
from hamdist.cli import app

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from hamdist.serve import serving

X, Y = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1])
ARRAYS = "application/x-safetensors"


class Client:
    def __init__(self, address):
        self.address = address

    def __call__(self, path, body=None, *, token="secret", **headers):
        """Return status and body of a reply; body: JSON values, or bytes."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        if path in ("/snapshot", "/predict", "/learn"):
            data = data or b""
        request = urllib.request.Request(f"{self.address}{path}", data)
        for name, value in {"Authorization": f"Bearer {token}", **headers}.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def json(self, path, body=None):
        status, reply = self(path, body)
        assert status == 200, reply
        return json.loads(reply)


@pytest.fixture
def served(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    example = {"example": (X, Y), "classes": 2, "out": tmp_path, "idle": None}
    with (
        hamdist.start(model, level="backprop", learning={"lr": 0.1}, **example) as run,
        serving(run, token="secret", out=tmp_path) as there,
    ):
        yield run, Client(there.address), model
    assert not (tmp_path / "address.json").exists()


def test_an_interface_of_ipv6(served):
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("a kernel without IPv6")
    run, *_ = served
    with serving(run, "::1", token="secret") as there:
        assert there.address.startswith("http://[::1]:")
        assert Client(there.address).json("/status")["fed"] == 0


def test_predictions_and_labels_over_http(served):
    run, client, model = served
    answer = client.json("/predict", {"u": X.tolist()})
    assert answer["number"] == 0
    np.testing.assert_allclose(answer["prediction"], model(X).tolist(), rtol=1e-6)
    assert set(answer["versions"]) == set(run._plan.graph.blocks)
    assert client.json("/learn", {"u": X.tolist(), "y": [1]}) == {"number": 1}
    assert client.json("/learn", {"u": X.tolist()}) == {"number": 2}
    assert client.json("/learn", {"number": 2, "y": [0]}) == {"number": 2}
    status = client.json("/status")
    assert (status["fed"], status["answered"], status["waiting"], status["paused"]) == (3, 3, 0, 0)
    assert b"hamdist_fed 3\n" in client("/metrics")[1]
    assert client.json("/snapshot")["snapshot"].startswith(str(run._journal.folder))
    _, got = client("/predict", save({"u": X.numpy()}), Content_Type=ARRAYS, Accept=ARRAYS)
    assert load(got)["y"].shape == (1, 2)


def test_what_does_not_fit_is_refused(served):
    run, client, _ = served
    assert client("/status", token="")[0] == client("/status", token="x")[0] == 401
    for path, body, kind in (
        ("/predict", {"u": [[1.0]]}, ""),
        ("/predict", {"u": "text"}, ""),
        ("/predict", {}, ""),
        ("/learn", {"u": X.tolist(), "y": [5]}, ""),
        ("/learn", {"number": 9, "y": [0]}, ""),
        ("/learn", [1], ""),
        ("/predict", b"not json", ""),
        ("/predict", b"no arrays", ARRAYS),
        ("/predict", save({"v": X.numpy()}), ARRAYS),
    ):
        status, reply = client(path, body, Content_Type=kind or "application/json")
        assert status == 400, (path, body)
        assert json.loads(reply)["error"]
    assert run.status().fed == 0
    run.stop()
    assert client("/predict", {"u": X.tolist()})[0] == 503


def test_clients_that_are_faster_than_the_network_come_again(served, monkeypatch):
    monkeypatch.setattr("hamdist.serve.AT_ONCE", 3)
    run, client, _ = served
    hold, replies = threading.Event(), []
    predict = run.predict
    run.predict = lambda *u, **how: (hold.wait(30), predict(*u, **how))[1]
    ask = lambda: replies.append(client("/predict", {"u": X.tolist()})[0])  # noqa: E731
    clients = [threading.Thread(target=ask) for _ in range(5)]
    for one in clients:
        one.start()
    while len(replies) < 2:  # (pytest has a time limit)
        assert client.json("/status")["answered"] == 0
    hold.set()
    for one in clients:
        one.join(30)
    assert replies == [429] * 2 + [200] * 3


@pytest.mark.parametrize(("host", "said"), [("127.0.0.1", "in use"), ("192.0.2.1", "requested")])
def test_an_address_that_cannot_be_had_starts_nothing(host, said, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ["serve", "digits", "--host", host, "--port", port, "--out", str(tmp_path / "o")]
        done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert f"--host {host}, --port {port}" in " ".join(done.output.split())
    assert said in done.output
    assert not (tmp_path / "o").exists()


HAMDIST = [sys.executable, "-m", "hamdist"]
ENVIRONMENT = {**os.environ, "HAMDIST_TOKEN": "secret", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def serves(out, *more):
    """Start the command; give its process, its first line, and a client."""
    command = [*HAMDIST, "serve", "digits", "--engine", "inprocess", "--level", "trace", "--json"]
    with subprocess.Popen(
        [*command, "--port", "0", "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
    ) as process:
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if line.endswith("Bearer secret\n"):
                    break
            assert lines[-1].endswith("Bearer secret\n"), lines
            yield process, lines[-1], Client(lines[-1].split()[0])
        finally:
            process.kill()


REFUSES = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.y = (torch.nn.Linear(64, n) for n in (64, 64, 10))
        self.b.weight = self.a.weight
    def forward(self, u):
        if u.max() > 5:
            raise ValueError("five is too much")
        return self.y(torch.tanh(self.b(torch.tanh(self.a(u)))))
"""


@pytest.mark.slow
def test_a_run_that_fails_ends_the_command_with_what_it_has_learned(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(REFUSES)
    with serves(tmp_path / "out", "--model", f"{file}:Net") as (process, _, client):
        client.json("/learn", {"u": [[0.5] * 64] * 32, "y": [1] * 32})
        client.json("/settle", {})
        client("/learn", {"u": [[6.0] * 64] * 32, "y": [1] * 32})
        assert client("/settle", {})[0] == 503
        assert process.wait(60) == 1
        assert "five is too much" in json.loads(process.stdout.read())["error"]
    learned = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(learned["a.weight"], learned["b.weight"])


@pytest.mark.slow
def test_the_command_serves_ends_in_order_and_is_repeated(tmp_path):
    with serves(tmp_path) as (process, line, client):
        x = [[0.5] * 64] * 32
        for k in range(5):
            number = client.json("/predict", {"u": x})["number"]
            client.json("/learn", {"number": number, "y": [k] * 32})
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.stderr.read()
        assert json.loads(process.stdout.read())["address"] == line.split()[0]
    repeated = [*HAMDIST, "replay", str(tmp_path), "--json"]
    done = subprocess.run(repeated, capture_output=True, env=ENVIRONMENT, text=True, timeout=60)
    assert json.loads(done.stdout)["samples"] == 5, done.stderr
    learned, again = (load_file(tmp_path / f"{n}.safetensors") for n in ("model", "replay"))
    assert learned.keys() == again.keys()
    assert all(torch.equal(w, again[name]) for name, w in learned.items())
