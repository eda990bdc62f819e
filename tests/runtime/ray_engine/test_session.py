"""Documented contract: a local Ray waits for the next run of its process, and leaves nothing."""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

import hamdist
from hamdist.config import EngineSettings
from hamdist.errors import ClusterError, SettingsError
from hamdist.runtime.ray_engine import local_ray
from hamdist.runtime.ray_engine import local_ray as local_ray_module
from hamdist.runtime.ray_engine import session as cluster
from hamdist.streams import from_iterable

pytestmark = pytest.mark.timeout(180)


@pytest.mark.ray
@pytest.mark.timeout(60)
def test_a_forked_process_leaves_the_garbage_of_its_parent_alone(session):
    """A handle of Ray's that a child collects speaks on the connections of its parent."""
    import ray

    class Actor:
        def answer(self, seconds):
            time.sleep(seconds)

    gc.disable()
    try:
        handle = ray.remote(Actor).options(num_cpus=0).remote()
        ray.get(handle.answer.remote(0), timeout=30)
        cycle = [handle, handle.answer.remote(100)]
        cycle.append(cycle)
        ray.kill(handle)
        ray.wait(cycle[1:2], timeout=30)
        del handle, cycle
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join(20)
        child.kill()
        child.join()
    finally:
        gc.enable()
    assert child.exitcode == 0
    asked = threading.Thread(target=ray.cluster_resources, daemon=True)
    asked.start()
    asked.join(20)
    assert not asked.is_alive()


@pytest.mark.ray
@pytest.mark.parametrize("current", [False, True])
def test_actors_of_an_earlier_run_find_modules_of_a_later_one(
    session, tmp_path, monkeypatch, current
):
    """In a folder that is on the path by then, or is the current one."""
    engine = {"kind": "ray", "actors": 2, "balance": "parameters"}
    items = [(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))] * 5

    def run(last):
        net = nn.Sequential(nn.Linear(4, 4), last)
        return hamdist.train(net, items, classes=4, level="trace", engine=engine)

    run(nn.Linear(4, 4))
    name = f"later_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("from torch import nn\nclass Own(nn.Linear):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("" if current else str(tmp_path))
    own = importlib.import_module(name).Own(4, 4)
    assert run(own).samples == 5


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_ray_waits_for_the_next_run(tmp_path):
    folder = Path("/tmp") / f"h-{os.getpid()}-s"  # Ray's sockets need a short path
    folder.mkdir()
    command = [sys.executable, str(Path(__file__).parent / "idle.py")]
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=170,
            env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        left = [p.name for p in folder.glob("hd*")]
    finally:
        subprocess.run(["rm", "-rf", folder], check=True, timeout=20)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout.splitlines()[-1])
    for one, two in (report["inside"], report["runs"]):
        assert one["samples"] == two["samples"] == 5
        assert len(one["raylet"]) == 1
        assert one["raylet"] == two["raylet"]
        assert one["workers"] == two["workers"]
        assert len(one["workers"]) == 2
        assert one["own_session"]
    assert report["after"]
    assert report["timed_out"]
    assert report["inside"][0]["raylet"] != report["runs"][0]["raylet"]
    assert report["environment"]
    assert report["handler"]
    assert report["native"]
    assert left == []
    assert "SIGTERM" not in ended.stderr


@pytest.mark.parametrize(
    ("fields", "takes"),
    [
        ({"actors": 2}, True),
        ({"actors": 4}, False),
        ({"placement": [["a"], ["b"], ["c"]]}, False),
        ({"address": "10.0.0.1:6379"}, False),
    ],
)
def test_which_runs_a_waiting_ray_takes(session, fields, takes):
    waiting = cluster._Standing(session, ExitStack(), 2, {psutil.Process()})
    assert waiting.takes(EngineSettings.model_validate({"kind": "ray", **fields})) is takes


def test_a_ray_that_died_takes_no_run(session):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ended:
        waiting = cluster._Standing(session, ExitStack(), 2, {psutil.Process(ended.pid)})
        assert waiting.takes(EngineSettings(kind="ray", actors=2))
        ended.kill()
        ended.wait(10)
        assert not waiting.takes(EngineSettings(kind="ray", actors=2))


@pytest.fixture
def dead():
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        process = psutil.Process(ended.pid)
        ended.wait(20)
    return process


def endless():
    while True:
        yield torch.randn(2, 4), torch.randint(3, (2,))


def trained(**given):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    stream = from_iterable(endless(), classes=3)
    engine = {"kind": "ray", "actors": 2}
    return hamdist.train(net, stream, level="trace", engine=engine, **given)


def test_a_local_ray_that_ended_is_named(session, dead, monkeypatch, tmp_path):
    """Before a run, and during it: then with what was learned."""
    names = sorted(session.needed.values())
    assert names in ([], ["gcs_server", "raylet"])  # (none: a Ray of the user's)
    monkeypatch.setattr(session, "needed", {dead: "raylet"})
    with pytest.raises(ClusterError, match="the local Ray has ended: its raylet is gone"):
        trained()
    monkeypatch.setattr(session, "needed", {})

    def end(progress):
        if progress.samples > 20:
            session.needed = {dead: "gcs_server"}

    kept = {"path": str(tmp_path), "every": 10}
    said = rf"its gcs_server is gone .* go on from the latest snapshot: --resume {tmp_path}"
    with pytest.raises(ClusterError, match=said) as raised:
        trained(on_progress=end, snapshots=kept)
    assert raised.value.result.samples > 20


def test_a_local_ray_starts_no_process_in_vain(session):
    commands = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    script = local_ray.PARAMETERS["setup_worker_path"]
    assert [c for c in commands if "raylet/raylet" in c and script in c]
    assert not [c for c in commands if re.search(r"/(monitor|log_monitor|dashboard)\.py", c)]


def test_a_ray_that_does_not_come_up_is_one_clear_error(monkeypatch, tmp_path):
    import ray

    def late(**_):
        raise Exception("The current node timed out during startup.\nMore of it.")

    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # (another test's Ray may be up)
    monkeypatch.setattr(local_ray_module, "short_folder", lambda: str(tmp_path))
    said = r"did not start: The current node timed out during startup. \(is this.*inprocess$"
    with pytest.raises(ClusterError, match=said), local_ray_module.local_ray(1):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_session_names_a_wrong_field():
    with pytest.raises(SettingsError, match=r"actorz"), hamdist.session(actorz=2):
        pass


def test_a_ray_of_a_thread_does_not_outlast_it(monkeypatch):
    """Linux ends its processes with the thread; this process would end a minute later."""
    for there, thread in ((False, None), (True, threading.main_thread())):
        closed = []
        with ExitStack() as stack:
            stack.callback(closed.append, "closed")
            own = {} if thread is None else {"thread": thread}

            def work(stack=stack, own=own):
                made = cluster._Standing(cluster.Session(), stack.pop_all(), 1, {1}, **own)
                monkeypatch.setattr(cluster, "_opened", lambda _: made)
                monkeypatch.setattr(cluster, "_close_after", lambda _: None)
                with cluster._outermost(EngineSettings(), stays=True):
                    pass

            runner = threading.Thread(target=work)
            runner.start()
            runner.join(10)
        assert (closed == []) is there
        assert (cluster._standing is not None) is there
        monkeypatch.setattr(cluster, "_standing", None)


@pytest.mark.ray
def test_a_forked_process_has_no_ray(session):
    """Its parent's goes on; what a child does at its end is not done to it."""
    reader, writer = multiprocessing.Pipe(duplex=False)

    def child():
        try:
            trained(steps=5)
        except ClusterError as error:
            writer.send(str(error))
        waiting = ExitStack()
        waiting.callback(writer.send, "closed")
        cluster._standing = cluster._Standing(session, waiting, 4, set())
        cluster.close_idle_session()
        writer.send("end")

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    process.kill()
    assert reader.recv().startswith("this process is a fork of one that uses Ray")
    assert reader.recv() == "end"
    assert trained(steps=5).samples == 5


@pytest.mark.ray
def test_standard_output_is_the_commands_alone(session, capsys):
    """Ray would print there that an actor died, in the midst of a JSON document."""
    from ray._private import worker

    for text in ("A worker died or was killed while executing a task", "1 Workers killed (OOM)"):
        worker.print_to_stdstream({"lines": [text], "pid": "raylet", "is_err": False}, False)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "killed (OOM)" in shown.err
    assert "A worker died" not in shown.err
