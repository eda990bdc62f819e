"""A live run of another process, talked to as if it were here: the same run, to the bit."""

from __future__ import annotations

import inspect
import json
import os
import socket
import stat
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import hamdist
from hamdist.errors import ClusterError, SettingsError, StreamError
from hamdist.runtime.live.run import LiveRun

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from hamdist.attached import AttachedRun
from hamdist.serve import serving

SERVER = """
import sys, torch
from pathlib import Path
from test_attach import begin
from hamdist.serve import serving
out = Path(sys.argv[1])
with begin(out, level=sys.argv[2]) as run, serving(run, out=out) as served:
    print("ready", flush=True)
    served.stopped.wait()
torch.save(run.result.model.state_dict(), out / "weights.pt")
"""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def begin(out=None, **more):
    fixed = {"learning": {"lr": 0.1}, "idle": None, "out": out, **more}
    return hamdist.start(network(), example=(torch.zeros(2, 3), torch.tensor([0, 1])), **fixed)


def talk(run, *, late=True):
    """Say everything once; return what came back."""
    u = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1])
    numbers, answers = [run.feed(u, y), run.feed(-u)], []
    if late:
        run.teach(numbers[1], y)
    answers.append(run.predict(2 * u))
    run.set(learning={"lr": 0.02})
    run.pause()
    numbers.append(run.feed(u + 1, y))
    status = run.status()
    run.go_on()
    run.settle()
    answers.append(run.predict(u))
    told = [(a.number, a.prediction, a.versions) for a in answers]
    scores = run.evaluate(torch.cat([u, 2 * u, -u]), y.repeat(3))
    return numbers, (status.fed, status.waiting, status.paused), told, scores, run.weights()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(one, b[name]) for name, one in a.items())
    return a == b


@pytest.mark.parametrize("level", ["trace", pytest.param("local", marks=pytest.mark.slow)])
def test_another_process_is_talked_to_as_if_it_were_here(level, tmp_path):
    command = [sys.executable, "-c", SERVER, str(tmp_path), level]
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=path, text=True) as server:
        assert server.stdout.readline() == "ready\n"
        file = tmp_path / "address.json"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        facts = json.loads(file.read_text())
        here = hamdist.attach(tmp_path)  # of this user, on this machine
        far = hamdist.attach(facts["address"], facts["token"])  # over the network
        there = talk(here, late=level == "trace")
        assert far.status().fed == 5
        with pytest.raises(SettingsError, match="token"):
            hamdist.attach(facts["address"], "x")
        for call, kind, text in (
            (lambda: far.feed(torch.zeros(2, 4)), StreamError, "shape"),
            (lambda: far.feed(torch.zeros(2, 3).double()), StreamError, "float64"),
            (lambda: far.teach(99, torch.tensor([0, 1])), StreamError, "99|local"),
            (lambda: far.set(learning={"lr": -1}), SettingsError, "lr"),
        ):
            with pytest.raises(kind, match=text):
                call()
        assert far.snapshot().startswith(str(tmp_path))
        far.stop()
        assert server.wait(60) == 0
    with begin(level=level) as run:
        assert same(there, talk(run, late=level == "trace"))
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    again = hamdist.replay(tmp_path, network())
    assert same(weights, again.model.state_dict())
    with pytest.raises(SettingsError, match="is over"):
        hamdist.attach(tmp_path)
    with pytest.raises(ClusterError, match="does not answer"):
        far.status()


def test_who_answers_in_another_way_is_no_run():
    """A server that speaks no HTTP, one that is no run, and what is no address."""
    for reply in (b"220 mail\r\n", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()

            def answer(server=server, reply=reply):
                one, _ = server.accept()
                with one:
                    one.recv(4096)
                    one.sendall(reply)

            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises(ClusterError, match="does not answer|is it a run of hamdist"):
                hamdist.attach(f"http://127.0.0.1:{server.getsockname()[1]}", "token", timeout=10)
            thread.join(10)
    with pytest.raises(SettingsError, match="http://HOST:PORT"):
        hamdist.attach("file:///etc/hosts", "token")
    with pytest.raises(SettingsError, match="needs a token"):
        hamdist.attach("http://127.0.0.1:1")


def test_its_calls_are_those_of_a_run():
    for name, call in inspect.getmembers(AttachedRun, inspect.isfunction):
        if not name.startswith("_"):
            own = inspect.signature(getattr(LiveRun, name)).parameters
            assert [*inspect.signature(call).parameters] == [*own], name


def test_several_inputs_and_outputs_and_back_pressure():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, left, right):
            return {"sum": self.a(left), "other": self.b(right)}

    u = {"left": torch.ones(1, 3), "right": torch.zeros(1, 3)}
    y = {"sum": torch.tensor([1]), "other": torch.tensor([0])}
    model = Two()
    classes = {"sum": 2, "other": 2}
    begun = {"level": "backprop", "example": (u, y), "classes": classes, "idle": None}
    with hamdist.start(model, **begun) as run, serving(run) as served:
        far = hamdist.attach(served.address, served.token)
        before = far.predict(u).prediction
        torch.testing.assert_close(before, dict(model(**u)))
        far.teach(0, y)
        far.pause()
        assert [far.feed(u, y) for _ in range(64)] == [*range(1, 65)]
        for wait in (True, False):  # as the run itself: nobody would make room
            with pytest.raises(BlockingIOError, match="paused"):
                far.feed(u, y, wait=wait)
        far.go_on()
        assert far.feed(u, y) == 65
        assert far.predict(u).number == 66
        with pytest.raises(StreamError, match="no tensor"):
            far.feed({"left": "text", "right": u["right"]}, y)
        run.stop()
        with pytest.raises(StreamError, match="stopped"):
            far.feed(u, y)


def test_sequences_end_where_it_is_said():
    u, y = torch.ones(2, 3), torch.tensor([0, 1])
    begun = {"level": "bptt", "example": (u, y), "classes": 2, "idle": None}
    with hamdist.start(network(), **begun) as run, serving(run) as served:
        far = hamdist.attach(served.address, served.token)
        assert far.feed(u, y) == 0
        assert far.predict(u, end=True).number == 1
        assert not run._stream.accepted.open
        assert far.weights().keys() == network().state_dict().keys()
    with hamdist.start(network(), **begun) as other:
        other.feed(u, y)
        other.predict(u, end=True)
    assert same(run.result.model.state_dict(), other.result.model.state_dict())
