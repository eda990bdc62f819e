"""Workers of a local Ray as forks of one process that has imported torch and hamdist.

    raylet -> worker_process.py, as a script -> a socket -> the process that forks, whose child
    takes over the script's arguments, environment, folder and open files

A worker so takes 0.3 s of processor time instead of 1.8, most of it for Ray's import: a run starts
sooner, and the next spare process costs the run beside it little. Where it does not work (another
system than Linux, a runtime environment), the script becomes the worker itself.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from hamdist.runtime.process.module_path import WITHOUT_CURRENT_FOLDER, module_variables
from hamdist.runtime.ray_engine.worker_process import ADDRESS, FORKED

# What workers import but Ray, which keeps the variables that it finds when it is imported.
PRELOADED = (
    *("hamdist.runtime.engines.worker", "hamdist.runtime.placement.links"),
    *("jsonschema", "google.protobuf.descriptor_pb2"),
)
GONE_SECONDS = 10.0


@contextmanager
def forked_workers(folder: str) -> Iterator[None]:
    """Have the workers of a Ray that is started inside forked, by a socket in `folder`.

    The process that forks has the environment of now, and ends with the context or its owner. With
    an empty environment variable HAMDIST_FORKED_WORKERS there is none.
    """
    # (elsewhere a fork may not use what the imports have started)
    if sys.platform != "linux" or os.environ.get(ADDRESS) == "":
        yield
        return
    address = os.path.join(folder, "forks")
    command = f"{WITHOUT_CURRENT_FOLDER}from {__name__} import serve; serve()"
    flags = ["-s"] if sys.flags.no_user_site else []
    # Ray gives a worker's libraries as many threads as it has processors, here before it is known.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **module_variables()}
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        forking = subprocess.Popen(
            [sys.executable, *flags, "-c", command, address, str(listening.fileno())],
            stdin=subprocess.PIPE,  # whose end ends the process
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            pass_fds=[listening.fileno()],
            start_new_session=True,
        )
    os.environ[ADDRESS] = address
    try:
        yield
    finally:
        os.environ.pop(ADDRESS, None)
        assert forking.stdin is not None
        forking.stdin.close()
        try:
            forking.wait(GONE_SECONDS)
        except subprocess.TimeoutExpired:
            forking.kill()
            forking.wait()


def serve() -> None:
    """Fork a worker for each script that asks, until standard input ends."""
    listening = socket.socket(fileno=int(sys.argv[2]))
    for name in PRELOADED:
        import_module(name)
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
            _become(asking)
        asking.close()


def _become(asking: socket.socket) -> None:
    """Become the worker that a script asks for, and end with it."""
    os.setpgid(0, 0)  # (Ray ends the group of a worker that has died)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(asking, 1, 3)
    with asking.makefile("rb") as order:
        script, environment, folder = json.load(order)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    asking.sendall(FORKED)
    asking.close()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # (Python's own is new in a fork, torch's the same in all processes)
    sys.argv = script
    sys.path.insert(0, str(Path(script[0]).parent))
    runpy.run_path(script[0], run_name="__main__")
    sys.exit()
