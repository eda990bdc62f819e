"""A local Ray on this machine: its environment, its processes, its end."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import psutil

from hamdist.config import EngineSettings
from hamdist.errors import ClusterError
from hamdist.runtime.process.interrupts import interrupts_ignored, signal_handlers_kept
from hamdist.runtime.process.leftovers import RAY_PREFIX, claim, release, remove_leftovers
from hamdist.runtime.ray_engine.auth_token import own_token
from hamdist.runtime.ray_engine.forked_workers import GONE_SECONDS, forked_workers

OBJECT_STORE_BYTES = 100 * 2**20
TRIES = 5
# No calls home; Ray's workers at the priority of other processes; a driver without a share of a GPU
# may still see them.
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Of Ray's internals (for it has no settings for it): fewer processes than its own default, and
# workers at once. Where they differ from those expected here, it starts as usual.
PARAMETERS = {
    "no_monitor": True,  # of the autoscaler: there is one host
    "include_log_monitor": False,  # what the workers print is not shown
    "setup_worker_path": str(Path(__file__).with_name("worker_process.py")),
}
WORKER_DIED = "A worker died or was killed"  # the begin of what Ray prints
_environment: dict[str, str] | None = None  # what hamdist sets for Ray, once it has imported it


@contextmanager
def local_ray(cpus: int) -> Iterator[set[psutil.Process]]:
    """Start a Ray of this machine alone, which ends with the context; yields the processes without
    which it does not go on."""
    import ray

    remove_leftovers()
    folder = tempfile.mkdtemp(prefix=RAY_PREFIX, dir=short_folder())
    claim(Path(folder))
    before = set(psutil.Process().children())
    up = False
    forks = ExitStack()
    try:
        processes = _in_a_session_of_its_own(), _few_processes()
        with own_token(folder), signal_handlers_kept(), processes[0], processes[1], _start_named():
            forks.enter_context(forked_workers(folder))
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
                log_to_driver=False,
                # Ray opens its folder to all users: one that only the owner can enter lies around.
                _temp_dir=os.path.join(folder, "r"),
            )
        up = True
        yield _heads(folder, before)
    finally:
        with interrupts_ignored():
            mine = _of_session(folder, before)
            ray.shutdown()
            forks.close()
            end_processes(mine, GONE_SECONDS if up else 0)
            shutil.rmtree(folder, ignore_errors=True)
            release(Path(folder))


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Give `owner` other attributes inside."""
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _in_a_session_of_its_own() -> AbstractContextManager[None]:
    """Start Ray's processes in a POSIX session of their own inside. A signal to the group of this
    process, as batch systems send it, then reaches this process alone, which ends the run in order.
    (Ray has no setting for it; Popen has.)"""
    from ray._private import services

    popen = getattr(services, "ConsolePopen", None)
    if popen is None or os.name != "posix":
        return nullcontext()
    return _replaced(services, ConsolePopen=partial(popen, start_new_session=True))


@contextmanager
def _few_processes() -> Iterator[None]:
    """Start a Ray inside without the processes that a single program does not use. Left out are the
    autoscaler's monitor, the monitor of the logs and the server of the dashboard: each is a process
    that imports Ray. worker_process.py starts the workers."""
    from ray._private import node, parameter

    parameters: Any = parameter.RayParams
    head: Any = node.Node
    start, server = parameters.__init__, getattr(head, "start_api_server", None)
    if server is None or not inspect.signature(start).parameters.keys() >= PARAMETERS.keys():
        yield
        return
    with (
        _replaced(parameters, __init__=partialmethod(start, **PARAMETERS)),
        _replaced(head, start_api_server=lambda *_, **__: None),
    ):
        yield


def ray_messages() -> AbstractContextManager[None]:
    """Show the errors that Ray prints inside on standard error, as standard output may be a JSON
    document; without those of workers that died: a run tells of its own."""
    from ray._private import worker

    shown = getattr(worker, "print_to_stdstream", None)
    if shown is None:
        return nullcontext()

    def show(data: dict[str, Any], *more: Any, **named: Any) -> None:
        lines = [line for line in data["lines"] if not line.startswith(WORKER_DIED)]
        if lines:
            shown({**data, "lines": lines, "is_err": True}, *more, **named)

    return _replaced(worker, print_to_stdstream=show)


@contextmanager
def _start_named() -> Iterator[None]:
    """Turn errors of Ray's start into a ClusterError."""
    try:
        yield
    except Exception as error:  # (of no common root)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClusterError(
            f"a local Ray did not start: {first} (is this machine overloaded, or short of memory, "
            "or of room for temporary files?); start again, or use --engine inprocess"
        ) from error


def _heads(folder: str, before: set[psutil.Process]) -> set[psutil.Process]:
    """Return what this process has started for the Ray in `folder`: its head's server, its raylet,
    and the process that forks workers. Others are the user's."""
    heads = set()
    for process in set(psutil.Process().children()) - before:
        with contextlib.suppress(psutil.Error):
            if folder in " ".join(process.cmdline()):
                heads.add(process)
    return heads


def _of_session(folder: str, before: set[psutil.Process]) -> set[psutil.Process]:
    """Return all processes of the Ray in `folder`."""
    pids = set()
    for head in _heads(folder, before):
        with contextlib.suppress(psutil.Error):
            pids |= {head, *head.children(recursive=True)}
    return pids


@contextmanager
def ray_environment(engine: EngineSettings) -> Iterator[None]:
    """Set the environment variables that Ray reads when it is imported or started, inside only.

    Variables that the user has set stay, and so do all if the user has imported Ray before, which
    has read them by then.
    """
    global _environment
    if _environment is None:
        _environment = {} if "ray" in sys.modules else dict(RAY_SETTINGS)
    variables = dict(_environment)
    if variables and engine.address is None:
        variables["RAY_AUTH_MODE"] = "token"
    if engine.address is not None:
        # (Ray tries so often; a head that answers and refuses the token will go on to)
        variables["RAY_gcs_server_port_wait_time_s"] = str(TRIES)
    before = dict(os.environ)
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:  # (Ray sets some itself, PYTHONBREAKPOINT among them)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def short_folder() -> str | None:
    """Return a folder short enough for Ray's socket paths (107 bytes); None if TMPDIR is."""
    return None if len(tempfile.gettempdir()) < 16 else "/tmp"


def end_processes(processes: Collection[psutil.Process], seconds: float) -> None:
    """Wait until processes are gone, and end those that stay."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=GONE_SECONDS)
