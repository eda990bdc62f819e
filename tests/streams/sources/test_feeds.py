"""Samples from outside: nothing that was acknowledged is lost, whatever ends in between."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch

import hamdist
from hamdist import streams
from hamdist.errors import StreamError
from hamdist.runtime.live.journal import Journal
from hamdist.streams.sources import feeds


def line(number):
    return json.dumps({"u": [[float(number), 0.5]], "y": [number % 3]}).encode() + b"\n"


def numbers(items):
    return [int(item["u"][0, 0]) for item in items]


def test_a_connection_that_is_lost_is_made_again():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def serve():
            for first in (0, 3):
                one, _ = server.accept()
                with one:
                    one.sendall(b"".join(map(line, range(first, first + 3))) + b'{"u": [[9')

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        source = streams.socket("127.0.0.1", server.getsockname()[1], patience=5, wait=0.01)
        items = list(islice(source, 6))
        thread.join(10)
    assert numbers(items) == [*range(6)]
    assert items[4]["u"].dtype == torch.float32
    assert items[4]["y"].tolist() == [1]
    free = server_port()
    with pytest.raises(StreamError, match="no connection"):
        next(streams.socket("127.0.0.1", free, patience=0.05, wait=0.01))


def test_a_line_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(feeds, "LONGEST", 1000)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def serve():
            one, _ = server.accept()
            with one:
                one.sendall(line(0) + b"x" * 1000)
                one.recv(1)  # until the other side has closed

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        source = streams.socket("127.0.0.1", server.getsockname()[1], patience=5, wait=0.01)
        assert numbers([next(source)]) == [0]
        with pytest.raises(StreamError, match="a line of more than"):
            next(source)
        thread.join(10)
        assert not thread.is_alive()


def server_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_folder_grows_and_each_file_comes_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line(0) + line(1))
    (tmp_path / "c.jsonl.part").write_bytes(b"not written yet")
    source = streams.files(tmp_path, look=0.01)
    assert numbers(islice(source, 2)) == [0, 1]
    np.savez(tmp_path / "b.npz", u=np.array([[2.0, 0.5]]), y=np.array([2]))
    (tmp_path / "c.jsonl.part").write_bytes(line(3))
    assert numbers(islice(source, 1)) == [2]
    (tmp_path / "c.jsonl.part").rename(tmp_path / "c.jsonl")
    assert numbers(islice(source, 1)) == [3]
    assert numbers(streams.files(tmp_path, after="a.jsonl", look=None)) == [2, 3]
    np.savez(tmp_path / "d.npz", u=np.array([object()]))
    with pytest.raises(StreamError, match="d.npz"):
        list(streams.files(tmp_path, after="c.jsonl", look=None))
    with pytest.raises(StreamError, match="'none'"):
        next(streams.files("none"))


WRONG = [b"", b"[1]", b'{"y": [1]}', b'{"u": ["x"]}', b'{"u": [[1], [2, 3]]}']


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_sample_is_said(text):
    with pytest.raises(StreamError, match="is no sample"):
        streams.read_json(text)


class Broker:
    """A mosquitto on loopback that keeps its state."""

    def __init__(self, folder):
        self.port, self.file = server_port(), folder / "mosquitto.conf"
        lines = [f"listener {self.port} 127.0.0.1", "allow_anonymous true", "user root"]
        lines += ["persistence true", f"persistence_location {folder}/", "autosave_interval 1"]
        self.file.write_text("\n".join([*lines, ""]))

    def __enter__(self):
        self.process = subprocess.Popen([shutil.which("mosquitto"), "-c", self.file])
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                time.sleep(0.02)
        raise AssertionError("no broker")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mosquitto") is None, reason="needs mosquitto")
def test_a_broker_that_is_started_again_in_the_middle_of_a_run_loses_nothing(tmp_path):
    paho = pytest.importorskip("paho.mqtt.client")
    broker, sent = Broker(tmp_path), []

    def publish(first, last):
        client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        client.connect("127.0.0.1", broker.port)
        client.loop_start()
        for number in range(first, last):
            client.publish("s/one", line(number), qos=1).wait_for_publish(10)
            sent.append(number)  # the broker has said that it has it
        client.disconnect()
        client.loop_stop()

    source = streams.mqtt("s/+", port=broker.port, patience=30)
    found = []
    example = (torch.zeros(1, 2), torch.tensor([0]))
    begin = {"level": "trace", "example": example, "classes": 3, "learning": {"lr": 1e-6}}

    def feed(items):
        for item in items:
            run.feed(**item)
            found.append(item)

    with hamdist.start(torch.nn.Linear(2, 3), **begin, out=tmp_path / "live") as run:
        with broker:
            taken = threading.Thread(target=feed, args=(islice(source, 10),))
            taken.start()
            while not found and taken.is_alive() and len(sent) < 30:  # (until it has subscribed)
                publish(len(sent), len(sent) + 10)
            taken.join(30)
            publish(len(sent), len(sent) + 20)  # nobody takes these now
        with broker:
            publish(len(sent), len(sent) + 5)
            while max(numbers(found)) < sent[-1]:
                feed([next(source)])
        source.close()  # type: ignore[attr-defined]
    entries = Journal(tmp_path / "live", reads=True).entries()
    fed = [int(one.sample.u[0, 0]) for one in entries if one.event == "feed"]
    assert fed == numbers(found)
    came = sorted(set(fed))
    assert came == [*range(came[0], sent[-1] + 1)]  # (what came first may be before it subscribed)
    assert run.result.samples == len(fed)
    with pytest.raises(StreamError, match="no connection to the broker"):
        next(streams.mqtt("s/+", port=broker.port, patience=0.1))
