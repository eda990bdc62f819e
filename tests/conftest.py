"""What every test shares: one thread (results depend on the number), and one Ray for all (with
`pytest -n`: for all of a process)."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A folder for temporary files of these tests alone, so that what they leave can be seen.
os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="h-", dir="/tmp")
tempfile.tempdir = os.environ["TMPDIR"]
atexit.register(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)

import torch

from hamdist.config import EngineSettings
from hamdist.runtime.ray_engine.local_ray import RAY_SETTINGS
from hamdist.runtime.ray_engine.session import ray_session

# (Test modules import Ray before a run can set them. With Ray's own niceness of 15 actors starve
# wherever anything else runs.)
for name, value in RAY_SETTINGS.items():
    os.environ.setdefault(name, value)
if any(name.startswith("COVERAGE_") for name in os.environ):
    os.environ["HAMDIST_FORKED_WORKERS"] = ""  # coverage counts in processes that start


def pytest_collection_modifyitems(items):
    """The files that start Ray come first: with what is left, all processes end together."""
    dear = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in dear)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Two processes begin with the files that start Ray, where they wait more than they compute.
    Others begin at the other end, with what needs the processor alone."""
    from xdist.scheduler import LoadFileScheduling

    class FromBothEnds(LoadFileScheduling):
        def _assign_work_unit(self, node):
            if node not in self.nodes[:2]:
                self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
            super()._assign_work_unit(node)

    return FromBothEnds(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _only_new_objects_are_collected():
    """A `Host` begins its run with a collection: it passes over what was imported or made before,
    as in an actor. (Of all that a whole suite imports it would take a tenth of a second and more.)
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """Write code of a user's into a folder of its own, the current one from now on: a function from
    the code to the file's name, another one in each test, as a module is imported once."""
    monkeypatch.chdir(tmp_path)

    def write(code):
        path = tmp_path / f"code_{tmp_path.name}.py"
        path.write_text(code)
        return path.name

    return write


@pytest.fixture
def two_threads():
    """As many threads of torch as a user's program may have; the engine's number counts."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def session():
    """A local Ray with room for four actors, for the whole test session."""
    with ray_session(EngineSettings(kind="ray", actors=4)) as opened:
        yield opened


def socket_folders():
    return {p.name for p in Path(tempfile.gettempdir()).glob("hd-*")}


@pytest.fixture
def leaves_no_socket():
    """Fails the test if socket folders are left that were not there before."""
    before = socket_folders()
    yield
    assert socket_folders() <= before
