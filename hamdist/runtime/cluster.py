"""Ray itself: a local one that starts by itself and leaves nothing, or a cluster by its address."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil

from hamdist.config import EngineSettings
from hamdist.errors import ClusterError
from hamdist.runtime.hosts import HostInfo, Seat, described
from hamdist.runtime.outcome import deaf_to_interrupts
from hamdist.runtime.threads import cores
from hamdist.runtime.token import REMEDY, check_joined, check_token, is_refusal, own_token, refused

OBJECT_STORE_BYTES = 100 * 2**20
GONE_SECONDS = 10.0
KNOCK_SECONDS = 5.0
ANSWER_SECONDS = 1.0  # for a raylet's port
KNOCKS = 32  # at a time
PROFILE_SECONDS = 60.0
TRIES = 5


class Session:
    """A Ray that is up, and its idle actors: a run that follows another takes over its processes,
    which saves it the seconds in which they would import torch."""

    def __init__(self) -> None:
        self.idle: list[tuple[Seat, Any]] = []

    def actors(self, seats: Sequence[Seat]) -> list[Any]:
        """For each seat an idle actor that is still there, or a new one. Before a new one starts,
        those that this run does not take over make room."""
        from hamdist.runtime.actors import is_alive, start_actor

        found: dict[int, Any] = {}
        for i, seat in enumerate(seats):
            while i not in found and (k := self._fitting(seat)) is not None:
                _, actor = self.idle.pop(k)
                if is_alive(actor):
                    found[i] = actor
        if len(found) < len(seats):
            self.make_room()
        return [found[i] if i in found else start_actor(seat) for i, seat in enumerate(seats)]

    def make_room(self) -> None:
        """Ends the idle actors: their processors are wanted."""
        _end([actor for _, actor in self.idle])
        self.idle = []

    def _fitting(self, seat: Seat) -> int | None:
        return next((k for k, (own, _) in enumerate(self.idle) if own == seat), None)


_current: Session | None = None
_owner: int | None = None
_one_at_a_time = threading.Lock()


@contextmanager
def ray_session(engine: EngineSettings) -> Iterator[Session]:
    """Ray is up inside; a session inside a session is the outer one.

    A Ray that was up before is used and stays up. At `engine.address` a cluster is joined; without
    one a local Ray is started, which ends with all its processes and files.
    Raises ClusterError if no cluster answers at `engine.address`.
    """
    global _current, _owner
    if _current is not None and _owner == threading.get_ident():
        yield _current
        return
    if not _one_at_a_time.acquire(blocking=False):
        raise ClusterError(
            "another thread of this process has a run on Ray; wait for it, or start a process"
        )
    try:
        with _outermost(engine) as session:
            yield session
    finally:
        _one_at_a_time.release()


@contextmanager
def _outermost(engine: EngineSettings) -> Iterator[Session]:
    global _current, _owner
    prepare_environment(engine)
    with _ray(engine):
        _current, _owner = Session(), threading.get_ident()
        try:
            yield _current
        finally:
            idle, _current = _current.idle, None
            with deaf_to_interrupts():
                _end([actor for _, actor in idle])


def _end(actors: list[Any]) -> None:
    import ray

    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor)


@contextmanager
def _ray(engine: EngineSettings) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
    elif engine.address is not None:
        with _joined(engine, engine.address):
            yield
    else:
        with _local(max(cores(), _wanted(engine))):
            yield


@contextmanager
def _joined(engine: EngineSettings, address: str) -> Iterator[None]:
    import ray
    from ray.exceptions import RayError

    check_token(address)
    # (Ray tries so often; a head that answers and refuses the token will go on to)
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(TRIES))
    try:
        _knock(address)
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


@contextmanager
def _local(cpus: int) -> Iterator[None]:
    import ray

    folder = tempfile.mkdtemp(prefix="hdray-", dir=short_folder())
    before = set(psutil.Process().children(recursive=True))
    up = False
    try:
        with own_token(folder):
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
            yield
    finally:
        with deaf_to_interrupts():
            mine = _of_session(folder, before)
            ray.shutdown()
            _outlast(mine, GONE_SECONDS if up else 0)
            shutil.rmtree(folder, ignore_errors=True)


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

    def answers(host: HostInfo) -> bool:
        try:
            _knock(raylets[host.id], ANSWER_SECONDS)
        except (OSError, KeyError):
            return False
        return True

    known = hosts()
    with ThreadPoolExecutor(KNOCKS) as pool:
        return [host for host, up in zip(known, pool.map(answers, known), strict=True) if up]


def _host(node: dict[str, Any]) -> HostInfo:
    address, name = node["NodeManagerAddress"], node.get("NodeManagerHostname", "")
    return described(node["NodeID"], address, name, node["Resources"], node.get("Labels", {}))


def host_seconds(known: Sequence[HostInfo]) -> dict[str, float]:
    """By host, seconds for the same arithmetic, in one thread of a process of its own there.

    Raises ClusterError for a host on which no processor is free for it."""
    import ray
    from ray.exceptions import RayError

    from hamdist.runtime.actors import timed_on

    calls = {host.id: timed_on(host.id) for host in known}
    try:
        return dict(zip(calls, ray.get(list(calls.values()), timeout=PROFILE_SECONDS), strict=True))
    except (RayError, TimeoutError) as error:
        raise ClusterError(
            f"engine.spread 'profile': the hosts could not be measured within "
            f"{PROFILE_SECONDS:.0f} s ({type(error).__name__}); is a processor free on each? use "
            "'packed' or 'spread'"
        ) from error


def _wanted(engine: EngineSettings) -> int:
    if engine.placement is not None:
        return len(engine.placement)
    return engine.actors if isinstance(engine.actors, int) else 1


def prepare_environment(engine: EngineSettings) -> None:
    """What Ray reads from the environment when it is imported, where the user has not set it."""
    if "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if engine.address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


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
