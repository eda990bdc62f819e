"""Ray's workers as forks of one process that has imported torch, Ray and hamdist: a tenth of a
second each instead of three. (The tests start, kill and replace a hundred of them. How a user's
workers start is shown by the tests that run the command: test_whole.py.)

    raylet -> this file as a script, in place of worker_process.py -> a socket -> the process that
    forks, whose child takes over the script's arguments, environment, folder and open files.
"""

from __future__ import annotations

import gc
import marshal
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

FORKS_AT = "HAMDIST_TEST_FORKS_AT"  # the socket's path
MOST = 2**20
STARTED = b"forked"
PRELOADED = (
    *("hamdist.runtime.engines.worker", "hamdist.runtime.placement.links"),
    *("hamdist.runtime.train.train", "hamdist.study.report.digests_diff"),
    *("jsonschema", "google.protobuf.descriptor_pb2", "pytest"),
)


@contextmanager
def forked_workers() -> Iterator[None]:
    """Let every Ray that is started inside fork its workers (with coverage: start them)."""
    from hamdist.runtime.ray_engine import local_ray

    if any(name.startswith("COVERAGE_") for name in os.environ):
        yield
        return
    path = tempfile.mktemp(prefix="f-")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    forking = subprocess.Popen(
        [sys.executable, __file__, "fork", str(listening.fileno())],
        stdin=subprocess.PIPE,  # its end ends the process
        pass_fds=[listening.fileno()],
    )
    listening.close()
    os.environ[FORKS_AT] = path
    before = local_ray.PARAMETERS["setup_worker_path"]
    local_ray.PARAMETERS["setup_worker_path"] = __file__
    try:
        yield
    finally:
        local_ray.PARAMETERS["setup_worker_path"] = before
        del os.environ[FORKS_AT]
        assert forking.stdin is not None
        forking.stdin.close()
        forking.wait(20)
        Path(path).unlink()


def ask() -> None:
    """Have the worker of the arguments forked; one with an environment of its own is started."""
    if not any(a.startswith("--serialized-runtime-env-context") for a in sys.argv):
        script = [a for a in sys.argv[1:] if a != "--language=PYTHON"]
        order = marshal.dumps((script, dict(os.environ), os.getcwd()))
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(os.environ[FORKS_AT])
            socket.send_fds(asking, [order], [0, 1, 2])
            if asking.recv(len(STARTED)) == STARTED:
                return
    from hamdist.runtime.ray_engine import worker_process

    os.execv(sys.executable, [sys.executable, worker_process.__file__, *sys.argv[1:]])


def fork_when_asked(listening: socket.socket) -> None:
    for name in PRELOADED:
        import_module(name)
    assert "ray" not in sys.modules  # (it keeps what its variables are when it is imported)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if listening not in ready:
            return
        asking, _ = listening.accept()
        if not os.fork():
            listening.close()
            become(asking)
        asking.close()


def become(asking: socket.socket) -> None:
    os.setpgid(0, 0)  # (Ray ends the group of a worker that has died)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    order, files, _, _ = socket.recv_fds(asking, MOST, 3)
    script, environment, folder = marshal.loads(order)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    asking.sendall(STARTED)
    asking.close()
    sys.argv = script
    sys.path[0] = str(Path(script[0]).parent)
    runpy.run_path(script[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    if sys.argv[1] == "fork":
        fork_when_asked(socket.socket(fileno=int(sys.argv[2])))
    else:
        ask()
