"""Ray itself: a local one that starts by itself and leaves nothing, or a cluster by its address."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError

from hamdist.config import EngineSettings, describe
from hamdist.errors import ClusterError, HamdistError, SettingsError
from hamdist.runtime.placement.assign_hosts import ActorOptions, HostInfo, described
from hamdist.runtime.process.interrupts import deaf_to_interrupts, handlers_of_ours
from hamdist.runtime.process.leftovers import RAY_PREFIX, claim, release, sweep
from hamdist.runtime.process.threads import cores
from hamdist.runtime.ray_engine.auth_token import (
    REMEDY,
    check_joined,
    check_token,
    is_refusal,
    own_token,
    refused,
)
from hamdist.runtime.ray_engine.processes import of_a_program

OBJECT_STORE_BYTES = 100 * 2**20
GONE_SECONDS = 10.0
KNOCK_SECONDS = 5.0
ANSWER_SECONDS = 1.0  # for a port of Ray's
HEAD_SECONDS = 10.0  # without an answer, of the 60 after which Ray ends its drivers
KNOCKS = 32  # at a time
PROFILE_SECONDS = 60.0
TRIES = 5
CLOSING_SECONDS = 3 * GONE_SECONDS
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Session:
    """A Ray that is up, and its idle actors: a run that follows another takes over its processes,
    which saves it the seconds in which they would import torch."""

    def __init__(self) -> None:
        self.idle: list[tuple[ActorOptions, Any]] = []

    def actors(self, options_of_actors: Sequence[ActorOptions]) -> list[Any]:
        """For each actor options an idle actor that is still there, or a new one. Before a new one
        starts, those that this run does not take over make room."""
        from hamdist.runtime.ray_engine.worker_actor import is_alive, start_actor

        found: dict[int, Any] = {}
        for i, actor_options in enumerate(options_of_actors):
            while i not in found and (k := self._fitting(actor_options)) is not None:
                _, actor = self.idle.pop(k)
                if is_alive(actor):
                    found[i] = actor
                else:  # its processor is wanted at once
                    _end([actor])
        if len(found) < len(options_of_actors):
            self.make_room()
        return [
            found[i] if i in found else start_actor(actor_options)
            for i, actor_options in enumerate(options_of_actors)
        ]

    def make_room(self) -> None:
        """Ends the idle actors: their processors are wanted."""
        _end([actor for _, actor in self.idle])
        self.idle = []

    def _fitting(self, actor_options: ActorOptions) -> int | None:
        return next((k for k, (own, _) in enumerate(self.idle) if own == actor_options), None)


@dataclass(slots=True)
class _Standing:
    """A session that is open, and what closes it.

    cpus: how many Ray was told of. processes: of a local Ray that was started here, else empty.
    """

    session: Session
    closing: ExitStack
    cpus: int
    processes: set[psutil.Process]

    def takes(self, engine: EngineSettings) -> bool:
        """Whether a run of these settings can go on in it: Ray is up, and has room for it."""
        import ray

        running = all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in self.processes)
        return (
            engine.address is None
            and self.cpus >= engine.processes()
            and ray.is_initialized()
            and running
        )


_current: Session | None = None
_owner: int | None = None
_one_at_a_time = threading.Lock()
_standing: _Standing | None = None  # a local Ray that waits for the next run of this process
_idle_over: threading.Timer | None = None
_closing = threading.Event()  # the timer is about to close `_standing`


@contextmanager
def session(**engine: Any) -> Iterator[None]:
    """Keep Ray and its idle actors up for the runs inside, which start at once from the second on.

        with hamdist.session(actors=4):
            for lr in (0.1, 0.3):
                hamdist.train(model, stream, learning={"lr": lr}, engine={"kind": "ray"})

    Without it a local Ray stays up for `engine.idle_seconds` after a run, while a joined cluster
    is left with every run.

    Args:
        engine: fields of the settings' section `engine`, for example `address` of a Ray cluster, or
            `actors`, for which a local Ray is made large enough.

    Raises:
        SettingsError: a field is unknown or its value is wrong.
        ClusterError: no cluster answers at `address`, or Ray does not start.
    """
    try:
        settings = EngineSettings.model_validate({"kind": "ray", **engine})
    except ValidationError as error:
        raise SettingsError(describe(error)) from None
    with ray_session(settings, stays=False):
        yield


@contextmanager
def ray_session(engine: EngineSettings, *, stays: bool = True) -> Iterator[Session]:
    """Keep Ray up inside; a session inside a session is the outer one.

    A Ray that was up before is used and stays up. At `engine.address` a cluster is joined; without
    one a local Ray is started.

    Args:
        stays: a local Ray then waits `engine.idle_seconds` for the next session of this process.

    Raises:
        ClusterError: no cluster answers at `engine.address`, or another thread has a session.
    """
    if _current is not None and _owner == threading.get_ident():
        yield _current
        return
    patience = CLOSING_SECONDS if _closing.is_set() else 0
    if not _one_at_a_time.acquire(timeout=patience):
        raise ClusterError(
            "another thread of this process has a run on Ray; wait for it, or start a process"
        )
    try:
        with _outermost(engine, stays) as opened:
            yield opened
    finally:
        _one_at_a_time.release()


@contextmanager
def _outermost(engine: EngineSettings, stays: bool) -> Iterator[Session]:
    global _current, _owner, _standing
    standing = _opened(engine)
    _current, _owner = standing.session, threading.get_ident()
    healthy = False
    try:
        yield _current
        healthy = True
    except ClusterError:
        raise  # (Ray may be what has failed: the next run starts another one)
    except HamdistError:
        healthy = True
        raise
    finally:
        _current = None
        if stays and healthy and standing.processes and engine.idle_seconds:
            _standing = standing
            _close_after(engine.idle_seconds)
        else:
            standing.closing.close()


def _opened(engine: EngineSettings) -> _Standing:
    """The session that waits, where it takes this run, or else a new one in its place."""
    global _standing, _idle_over
    if _idle_over is not None:
        _idle_over.cancel()
        _idle_over = None
    waiting, _standing = _standing, None
    if waiting is not None:
        if waiting.takes(engine):
            return waiting
        waiting.closing.close()
    opened = Session()
    with ExitStack() as stack, ray_environment(engine):
        processes, cpus = stack.enter_context(_ray(engine))
        stack.callback(_end_idle, opened)
        return _Standing(opened, stack.pop_all(), cpus, processes)


def _close_after(seconds: float) -> None:
    """Close the waiting session when nobody has used it for so long, or when the process ends."""
    global _idle_over
    owner = os.getpid()

    def close() -> None:
        if os.getpid() == owner:  # (a forked child runs its parent's exit handlers)
            close_idle_session()

    atexit.unregister(close_idle_session)
    atexit.register(close_idle_session)
    _idle_over = threading.Timer(seconds, close)
    _idle_over.daemon = True
    _idle_over.start()


def close_idle_session() -> None:
    """End the local Ray that waits for the next run of this process, if there is one."""
    global _standing
    _closing.set()
    try:
        if not _one_at_a_time.acquire(blocking=False):
            return  # a run has begun and uses it
        try:
            waiting, _standing = _standing, None
            if waiting is not None:
                waiting.closing.close()
        finally:
            _one_at_a_time.release()
    finally:
        _closing.clear()


def _end_idle(opened: Session) -> None:
    with deaf_to_interrupts():
        opened.make_room()


def _end(actors: list[Any]) -> None:
    import ray

    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor)


@contextmanager
def _ray(engine: EngineSettings) -> Iterator[tuple[set[psutil.Process], int]]:
    """Ray is up inside. Yields the processes of one that was started here, and its CPUs."""
    import ray

    if ray.is_initialized():
        yield set(), 0
    elif engine.address is not None:
        with _joined(engine, engine.address):
            yield set(), 0
    else:
        cpus = max(cores(), engine.processes())
        with _local(cpus) as processes:
            yield processes, cpus


@contextmanager
def _joined(engine: EngineSettings, address: str) -> Iterator[None]:
    import ray
    from ray.exceptions import RayError

    check_token(address)
    try:
        _knock(address)
        with handlers_of_ours():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        if is_refusal(error):
            raise refused(address) from None
        raise ClusterError(
            f"engine.address {address!r}: no Ray cluster answers there "
            f"({str(error).splitlines()[0]}); start one (ray start --head), correct the address, "
            f"or leave it out for a local Ray. Where the cluster asks for a token, {REMEDY}"
        ) from error
    try:
        check_joined(engine)
        yield
    finally:
        with deaf_to_interrupts():
            ray.shutdown()


def _knock(address: str, seconds: float = KNOCK_SECONDS) -> None:
    """Raises OSError if nobody listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), seconds).close()


def answers(address: str) -> bool:
    """Return whether somebody listens at host:port."""
    try:
        _knock(address, ANSWER_SECONDS)
    except OSError:
        return False
    return True


class HeadWatch:
    """Finds out that the head of a joined cluster is gone, before Ray ends this process for it."""

    def __init__(self) -> None:
        self._asked = self._answered = time.monotonic()

    def lost(self, address: str, now: float) -> bool:
        """Ask now and then whether anybody listens at the head's address.

        Args:
            address: host:port of the head.
            now: as of `time.monotonic`.

        Returns:
            Whether nobody has for HEAD_SECONDS.
        """
        if now - self._asked >= HEAD_SECONDS / 5:
            self._asked = now
            if answers(address):
                self._answered = now
        return now - self._answered >= HEAD_SECONDS


@contextmanager
def _local(cpus: int) -> Iterator[set[psutil.Process]]:
    import ray

    sweep()
    folder = tempfile.mkdtemp(prefix=RAY_PREFIX, dir=short_folder())
    claim(Path(folder))
    before = set(psutil.Process().children(recursive=True))
    up = False
    try:
        with own_token(folder), handlers_of_ours(), of_a_program(), _start_named():
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
        yield _of_session(folder, before)
    finally:
        with deaf_to_interrupts():
            mine = _of_session(folder, before)
            ray.shutdown()
            _outlast(mine, GONE_SECONDS if up else 0)
            shutil.rmtree(folder, ignore_errors=True)
            release(Path(folder))


@contextmanager
def _start_named() -> Iterator[None]:
    """Turn what Ray raises where it does not come up into a ClusterError.

    Raises:
        ClusterError: Ray did not start.
    """
    try:
        yield
    except Exception as error:  # (of no common root)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClusterError(
            f"a local Ray did not start: {first} (is this machine overloaded, or short of memory, "
            "or of room for temporary files?); start again, or use --engine inprocess"
        ) from error


def _of_session(folder: str, before: set[psutil.Process]) -> set[psutil.Process]:
    """This process's children that belong to the Ray in `folder`; others are the user's own."""
    heads = set()
    for process in set(psutil.Process().children(recursive=True)) - before:
        with contextlib.suppress(psutil.Error):
            if folder in " ".join(process.cmdline()):
                heads.add(process)
    found = set(heads)
    for head in heads:
        with contextlib.suppress(psutil.Error):
            found |= set(head.children(recursive=True))
    return found


def hosts() -> list[HostInfo]:
    """The hosts of the Ray that is up, this one first, the others by their address."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    found = [_host(node) for node in ray.nodes() if node["Alive"]]
    return sorted(found, key=lambda host: (host.id != here, host.address))


def reachable_hosts() -> list[HostInfo]:
    """Of `hosts()`, those whose raylet can be reached from here: Ray itself needs seconds to notice
    that one cannot."""
    import ray

    raylets = {
        node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        for node in ray.nodes()
        if node["Alive"]
    }

    def reached(host: HostInfo) -> bool:
        return host.id in raylets and answers(raylets[host.id])

    known = hosts()
    with ThreadPoolExecutor(KNOCKS) as pool:
        return [host for host, up in zip(known, pool.map(reached, known), strict=True) if up]


def _host(node: dict[str, Any]) -> HostInfo:
    address, name = node["NodeManagerAddress"], node.get("NodeManagerHostname", "")
    return described(node["NodeID"], address, name, node["Resources"], node.get("Labels", {}))


def host_seconds(known: Sequence[HostInfo]) -> dict[str, float]:
    """By host, seconds for the same arithmetic, in one thread of a process of its own there.

    Raises ClusterError for a host on which no processor is free for it."""
    import ray
    from ray.exceptions import RayError

    from hamdist.runtime.ray_engine.worker_actor import timed_on

    calls = {host.id: timed_on(host.id) for host in known}
    try:
        return dict(zip(calls, ray.get(list(calls.values()), timeout=PROFILE_SECONDS), strict=True))
    except (RayError, TimeoutError) as error:
        raise ClusterError(
            f"engine.spread 'profile': the hosts could not be measured within "
            f"{PROFILE_SECONDS:.0f} s ({type(error).__name__}); is a processor free on each? use "
            "'packed' or 'spread'"
        ) from error


_environment: dict[str, str] | None = None  # what hamdist sets for Ray, once it has imported it


@contextmanager
def ray_environment(engine: EngineSettings) -> Iterator[None]:
    """Set what Ray reads from the environment while it is imported or started, inside only.

    What the user has set stays, and so does everything where the user has imported Ray before:
    Ray has read it by then.
    """
    global _environment
    if _environment is None:
        _environment = {} if "ray" in sys.modules else dict(RAY_SETTINGS)
    wanted = dict(_environment)
    if wanted and engine.address is None:
        wanted["RAY_AUTH_MODE"] = "token"
    if engine.address is not None:
        # (Ray tries so often; a head that answers and refuses the token will go on to)
        wanted["RAY_gcs_server_port_wait_time_s"] = str(TRIES)
    before = dict(os.environ)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:  # (Ray sets some itself, PYTHONBREAKPOINT among them)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def short_folder() -> str | None:
    """Ray's socket paths must fit 107 bytes: not every TMPDIR is short enough."""
    return None if len(tempfile.gettempdir()) < 16 else "/tmp"


def _outlast(processes: set[psutil.Process], seconds: float) -> None:
    """Waits until the processes that this session started are gone; ends what stays."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=GONE_SECONDS)
