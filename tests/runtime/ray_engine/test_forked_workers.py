"""Workers of a local Ray are forks of one process; where it is gone, scripts become them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time

import psutil
import pytest

from hamdist.runtime.ray_engine import forked_workers as module
from hamdist.runtime.ray_engine import worker_process
from hamdist.runtime.ray_engine.forked_workers import forked_workers

pytestmark = pytest.mark.timeout(60)
LARGE = {f"LARGE{i}": 100_000 * "x" for i in range(10)}  # more than a socket holds
SCRIPT = """
import json, os, sys
import numpy, torch
print(json.dumps({"argv": sys.argv, "path": sys.path[0], "folder": os.getcwd(), "pid": os.getpid(),
                  "parent": os.getppid(), "group": os.getpgid(0), "name": __name__,
                  "mine": os.environ.get("MINE"), "python": os.environ.get("PYTHONPATH"),
                  "threads": torch.get_num_threads(), "random": numpy.random.rand()}))
raise SystemExit(3)
"""


@pytest.fixture
def folder(monkeypatch):
    monkeypatch.delenv(worker_process.ADDRESS, raising=False)
    with tempfile.TemporaryDirectory(prefix="f-") as path:
        yield path


def start(tmp_path, mine):
    """Run the script as Ray's raylet runs that of a worker; returns what it prints."""
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)
    language = worker_process.LANGUAGE  # (-s: as with PYTHONNOUSERSITE)
    ended = subprocess.run(
        [sys.executable, worker_process.__file__, "-s", str(script), language, "--a=1"],
        env={**os.environ, "MINE": mine, "PYTHONPATH": "of mine", **LARGE},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert not ended.stderr
    return json.loads(ended.stdout), ended.returncode


def forking():
    return [p for p in psutil.Process().children() if module.__name__ in " ".join(command_of(p))]


def command_of(process):
    """Its command; for an instant within the exec that its parent has seen there is none yet."""
    until = time.monotonic() + 10
    while not (command := process.cmdline()) and time.monotonic() < until:
        if process.status() == psutil.STATUS_ZOMBIE:
            break
    return command


def test_a_fork_takes_over_the_script(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sys, "path", [*filter(None, sys.path), tmp_path])  # (a Path is passed over)
    monkeypatch.chdir(tmp_path)  # where a file has the name of a module of Python's
    (tmp_path / "select.py").write_text("raise SystemExit('another module')")
    before = forking()
    with forked_workers(folder):
        (process,) = [p for p in forking() if p not in before]
        reports = [start(tmp_path, mine) for mine in ("ä", "b")]
        process_group = os.getpgid(process.pid)
    for (report, code), mine in zip(reports, ("ä", "b"), strict=True):
        assert code == 0  # of the script that asked
        assert report["argv"] == [str(tmp_path / "worker.py"), "--a=1"]
        assert report["path"] == report["folder"] == str(tmp_path)
        assert (report["mine"], report["python"]) == (mine, "of mine")
        assert (report["parent"], report["name"]) == (process.pid, "__main__")
        assert report["group"] == report["pid"] != process_group
        assert report["threads"] == 1
    assert reports[0][0]["random"] != reports[1][0]["random"]
    assert not process.is_running()
    assert "HAMDIST_FORKED_WORKERS" not in os.environ


def test_without_the_process_that_forks_a_script_is_the_worker(folder, tmp_path):
    before = forking()
    with forked_workers(folder):
        (process,) = [p for p in forking() if p not in before]
        process.kill()
        process.wait(20)
        report, code = start(tmp_path, "mine")
    assert code == 3
    assert report["argv"] == [str(tmp_path / "worker.py"), "--a=1"]
    assert report["parent"] == os.getpid()


def test_it_ends_with_its_owner(folder):
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from {module.__name__} import forked_workers\n"
            f"with forked_workers({folder!r}):\n    print('up', flush=True)\n    input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"up\n"
    (process,) = psutil.Process(owner.pid).children()
    owner.kill()
    owner.communicate(timeout=20)
    assert psutil.wait_procs([process], timeout=30)[1] == []


def test_none_are_forked_where_the_user_says_so(folder, monkeypatch):
    monkeypatch.setenv("HAMDIST_FORKED_WORKERS", "")
    before = forking()
    with forked_workers(folder):
        assert forking() == before


def test_a_process_that_ends_at_once_forks_nothing(folder, monkeypatch):
    path = os.path.join(folder, "ends")
    monkeypatch.setenv(worker_process.ADDRESS, path)
    assert not worker_process._is_forked(["script.py"])  # there is no such file
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        closing = threading.Thread(target=lambda: listening.accept()[0].close())
        closing.start()
        assert not worker_process._is_forked(["script.py"])
        closing.join(20)
    assert not worker_process._is_forked(["script.py"])  # nobody listens


@pytest.mark.ray
@pytest.mark.skipif(os.environ.get(worker_process.ADDRESS) == "", reason="none are to be forked")
def test_the_actors_of_a_local_ray_are_forks(session):
    import ray

    (process,) = forking()
    parent = ray.remote(lambda: os.getppid())
    parents = ray.get([parent.remote() for _ in range(4)], timeout=30)
    assert set(parents) == {process.pid}
