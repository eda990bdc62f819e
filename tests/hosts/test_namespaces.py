"""The hosts of namespaces.py are what tests of hosts need them to be."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hosts.namespaces import hosts, why_not

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(reason := why_not()), reason=reason or "hosts can be made"),
]

ECHO = """
import socket
server = socket.create_server(("", 9))
print("listening", flush=True)
while True:
    peer, _ = server.accept()
    while came := peer.recv(99):
        peer.send(came)
"""
ASK = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], 9), float(sys.argv[2]))
begin = time.monotonic()
peer.send(b"x")
assert peer.recv(1) == b"x"
print(time.monotonic() - begin)
"""


@pytest.fixture
def pair():
    """Two hosts with cables that can delay; on host 1 somebody answers."""
    with hosts(2, ray=False, delay=0.0) as h:
        h.start(1, [sys.executable, "-u", "-c", ECHO]).await_text("listening")
        yield h


def test_a_host_has_its_own_everything(pair):
    show = "import os, socket; print(socket.gethostname(), os.listdir('/dev/shm'), os.getpid())"
    name, shm, pid = pair.python(1, show).split()
    assert (name, shm) == ("host1", "[]")
    assert int(pid) < 100
    assert pair.run(1, ["hostname", "-I"]).split()[0] == pair.ip(1)
    assert [p.cmdline()[-1] for p in pair.processes(1)] == [ECHO]
    assert pair.processes(0) == []
    assert len(pair.run(1, ["ip", "route"]).splitlines()) == 1  # no way leads out


def test_cables(pair):
    assert float(pair.python(0, ASK, pair.ip(1), "20")) > 0
    pair.delay(1, 0.05)
    assert float(pair.python(0, ASK, pair.ip(1), "20")) >= 0.1  # there and back
    pair.delay(1, 0.0)
    pair.cut(1)
    with pytest.raises(RuntimeError, match="TimeoutError"):
        pair.python(0, ASK, pair.ip(1), "0.5")
    pair.mend(1)
    pair.python(0, ASK, pair.ip(1), "20")


SEND = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], 9), 20)
begin = time.monotonic()
sent = peer.sendall(bytes(int(sys.argv[2])))
left = int(sys.argv[2])
while left:
    left -= len(peer.recv(min(left, 99)))
print(time.monotonic() - begin)
"""


def test_a_narrow_cable_takes_its_time_one_way(pair):
    """100 kB through 200 kB/s, back at once; then through both ways."""
    pair.delay(1, 0.0, rate=2e5, way="back")  # to host 1
    there = float(pair.python(0, SEND, pair.ip(1), "100000"))
    assert 0.4 <= there < 5
    pair.delay(1, 0.0, rate=2e5)
    assert float(pair.python(0, SEND, pair.ip(1), "100000")) >= 0.4


def test_a_killed_host_is_gone_and_comes_back(pair):
    listening = pair.processes(1)
    pair.kill(1)
    assert not any(process.is_running() for process in listening)
    pair.boot(1)
    assert pair.processes(1) == []
    pair.start(1, [sys.executable, "-u", "-c", ECHO]).await_text("listening")
    pair.python(0, ASK, pair.ip(1), "20")


def test_errors_come_with_the_output(pair):
    with pytest.raises(RuntimeError, match="exit status 3\nsaid"):
        pair.run(0, ["sh", "-c", "echo said; exit 3"])
    with pytest.raises(RuntimeError, match="not over in 0.5 s\nsaid"):
        pair.run(0, ["sh", "-c", "echo said; sleep 99"], seconds=0.5)
    assert pair.processes(0) == []


def test_a_harness_that_is_killed_leaves_no_process():
    code = (
        "from hosts.namespaces import hosts\n"
        "with hosts(1, ray=False) as h:\n"
        "    h.start(0, ['sleep', '99'])\n"
        "    print(h.folder, *h.pids, flush=True)\n"
        "    input()"
    )
    harness = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])},
    )
    folder, *pids = harness.stdout.readline().split()
    ends = [os.pidfd_open(int(pid)) for pid in pids]
    assert len(ends) == 2
    harness.send_signal(signal.SIGKILL)
    harness.communicate()
    for end in ends:
        assert select.select([end], [], [], 20)[0]
        os.close(end)
    for file in sorted(Path(folder).rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    Path(folder).rmdir()
