"""Ray's session: a local Ray that starts when needed and leaves nothing, or a joined cluster."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psutil
from pydantic import ValidationError

from hamdist.config import EngineSettings, describe
from hamdist.errors import ClusterError, HamdistError, SettingsError
from hamdist.runtime.placement.assign_hosts import ActorOptions
from hamdist.runtime.process.interrupts import interrupts_ignored, signal_handlers_kept
from hamdist.runtime.process.threads import cores
from hamdist.runtime.ray_engine.auth_token import (
    REMEDY,
    check_joined,
    check_token,
    is_refusal,
    token_error,
)
from hamdist.runtime.ray_engine.cluster_hosts import check_listening
from hamdist.runtime.ray_engine.forked_workers import GONE_SECONDS
from hamdist.runtime.ray_engine.local_ray import local_ray, ray_environment, ray_messages

CLOSING_SECONDS = 3 * GONE_SECONDS
T = TypeVar("T")

_inherited = False  # Ray is up here, but it is that of the process that has forked this one


def _leave_to_parent() -> None:
    """Leave the Ray of the process that has forked this one alone (for a stream that loads its data
    in processes, say).

    What the parent has left as garbage is not collected: a handle of Ray's would say its end on the
    parent's connections, whose next question to Ray's head then has no answer, ever.
    """
    global _inherited
    gc.freeze()
    _inherited = getattr(sys.modules.get("ray"), "is_initialized", bool)()


os.register_at_fork(after_in_child=_leave_to_parent)


class Session:
    """A running Ray with its idle actors.

    A later run takes over the processes of an earlier one, which saves the seconds of importing
    torch. needed: processes without which a local Ray cannot go on, with their names.
    """

    def __init__(self) -> None:
        self.idle: list[tuple[ActorOptions, Any]] = []
        self.needed: dict[psutil.Process, str] = {}
        self._spares: list[Any] = []  # among the idle ones, those that may be starting still

    @property
    def lost(self) -> str:
        """Return the error about a local Ray that has ended; empty as long as it runs."""
        ended = [name for process, name in self.needed.items() if not _runs(process)]
        if not ended:
            return ""
        return (
            f"the local Ray has ended: its {' and '.join(ended)} is gone (was it killed, or out of "
            "memory?); start the run again, outside of this hamdist.session() if there is one"
        )

    def actors(self, options_of_actors: Sequence[ActorOptions]) -> list[Any]:
        """Return an actor for each element of `options_of_actors`: an idle one, or a new one.

        Before a new one starts, idle actors that this run does not take over are ended.
        """
        from hamdist.runtime.ray_engine.worker_actor import is_alive, start_actor

        handles: dict[int, Any] = {}
        for i, actor_options in enumerate(options_of_actors):
            while i not in handles and (k := self._fitting(actor_options)) is not None:
                _, actor = self.idle.pop(k)
                if is_alive(actor, starting=any(actor is spare for spare in self._spares)):
                    handles[i] = actor
                else:  # its processor is wanted at once
                    _end([actor])
        if len(handles) < len(options_of_actors):
            self.make_room()
        return [
            handles[i] if i in handles else start_actor(actor_options)
            for i, actor_options in enumerate(options_of_actors)
        ]

    def keep_spares(self, options_of_actors: Sequence[ActorOptions], number: int) -> None:
        """Start idle actors, unless so many wait already that one of these options fits.

        They import torch while the run goes on; nobody waits for them.
        """
        from hamdist.runtime.ray_engine.worker_actor import start_actor

        there = sum(options in options_of_actors for options, _ in self.idle)
        for i in range(there, number):
            actor_options = options_of_actors[i % len(options_of_actors)]
            self._spares.append(start_actor(actor_options))
            self.idle.append((actor_options, self._spares[-1]))

    def make_room(self) -> None:
        """End the idle actors, to free their processors."""
        _end([actor for _, actor in self.idle])
        self.idle, self._spares = [], []

    def _fitting(self, actor_options: ActorOptions) -> int | None:
        return next(
            (k for k, (options, _) in enumerate(self.idle) if options == actor_options), None
        )


@dataclass(slots=True)
class _Standing:
    """An open session, and what closes it.

    Attributes:
        cpus: processors that Ray was started with.
        processes: that a local Ray started here does not go on without; of another Ray none.
        thread: that started them. Linux ends them with it (Ray asks for PR_SET_PDEATHSIG).
    """

    session: Session
    closing: ExitStack
    cpus: int
    processes: set[psutil.Process]
    thread: threading.Thread = field(default_factory=threading.current_thread)

    def takes(self, engine: EngineSettings) -> bool:
        """Return True if Ray runs, and has room for a run of these settings."""
        import ray

        return (
            engine.address is None
            and self.cpus >= engine.processes() + engine.spares
            and ray.is_initialized()
            and all(map(_runs, self.processes))
        )


_inside: ContextVar[Session | None] = ContextVar("hamdist_session", default=None)


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _needed(processes: set[psutil.Process]) -> dict[psutil.Process, str]:
    """Return the head's server and its raylet among the processes of a local Ray."""
    needed = {}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            needed[process] = process.name()
    return {process: name for process, name in needed.items() if name in ("gcs_server", "raylet")}


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
        ClusterError: no cluster answers at `engine.address`, the local Ray of the session around
            this one has ended, or another thread has a session.
    """
    if _inherited:
        raise ClusterError(
            "this process is a fork of one that uses Ray, and cannot share its connections: start "
            "it by the method 'spawn' (multiprocessing), or use --engine inprocess"
        )
    current = _inside.get()
    if current is not None:
        if current.lost:
            raise ClusterError(current.lost)
        yield current
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
    global _standing
    standing = _opened(engine)
    before = _inside.set(standing.session)  # (of this thread, and of a live run that it starts)
    healthy = False
    try:
        yield standing.session
        healthy = True
    except ClusterError:
        raise  # (Ray may be what has failed: the next run starts another one)
    except HamdistError:
        healthy = True
        raise
    finally:
        _inside.reset(before)
        lasts = standing.thread is threading.main_thread()
        if stays and lasts and healthy and standing.processes and engine.idle_seconds:
            _standing = standing
            _close_after(engine.idle_seconds)
        else:
            standing.closing.close()


def _opened(engine: EngineSettings) -> _Standing:
    """Return the waiting session if it suits this run, or else a new one in its place."""
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
        opened.needed = _needed(processes)
        stack.callback(_end_idle, opened)
        return _Standing(opened, stack.pop_all(), cpus, processes)


def _close_after(seconds: float) -> None:
    """Close the waiting session if it was not used for `seconds`, or when the process ends."""
    global _idle_over
    atexit.unregister(close_idle_session)
    atexit.register(close_idle_session)
    _idle_over = threading.Timer(seconds, close_idle_session)
    _idle_over.daemon = True
    _idle_over.start()


def close_idle_session() -> None:
    """End the local Ray that waits for the next run of this process, if there is one."""
    global _standing
    if _inherited:  # (a forked child runs its parent's exit handlers)
        return
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
    with interrupts_ignored():
        opened.make_room()


def _end(actors: list[Any]) -> None:
    import ray

    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor)


@contextmanager
def _ray(engine: EngineSettings) -> Iterator[tuple[set[psutil.Process], int]]:
    """Keep Ray running inside; yields what a Ray started here consists of, and its CPUs."""
    import ray

    if ray.is_initialized():
        yield set(), 0
    elif engine.address is not None:
        with ray_messages(), _joined(engine, engine.address):
            yield set(), 0
    else:
        cpus = max(cores(), engine.processes() + engine.spares)
        with ray_messages(), local_ray(cpus) as processes:
            yield processes, cpus


@contextmanager
def _joined(engine: EngineSettings, address: str) -> Iterator[None]:
    import ray
    from ray.exceptions import RayError

    check_token(address)
    try:
        check_listening(address)
        with signal_handlers_kept():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        if is_refusal(error):
            raise token_error(address) from None
        raise ClusterError(
            f"engine.address {address!r}: no Ray cluster answers there "
            f"({str(error).splitlines()[0]}); start one (ray start --head), correct the address, "
            f"or leave it out for a local Ray. Where the cluster asks for a token, {REMEDY}"
        ) from error
    try:
        check_joined(engine)
        yield
    finally:
        with interrupts_ignored():
            ray.shutdown()


def ray_tasks(
    engine: EngineSettings, function: Callable[[Any], T], arguments: Sequence[Any]
) -> Iterator[T]:
    """Yield function(argument) for each of `arguments`, in the order in which they finish.

    The tasks run on the Ray at `engine.address` (or a local one). Those left when the caller stops
    reading are cancelled. Raises the errors of `function`, and ClusterError for a lost task.
    """
    with ray_session(engine) as session:
        session.make_room()  # actors that wait for another run hold processors
        import ray
        from ray.exceptions import RayTaskError

        task = ray.remote(num_cpus=1)(function)
        waiting = [task.remote(argument) for argument in arguments]
        try:
            while waiting:
                (done,), waiting = ray.wait(waiting)
                try:
                    result: T = ray.get(done)
                except RayTaskError as error:
                    raise error.as_instanceof_cause() from None
                except ray.exceptions.RayError as error:
                    raise ClusterError(
                        f"a task of Ray was lost ({type(error).__name__}); what is finished is "
                        "kept: start the study again to go on with it"
                    ) from error
                yield result
        finally:
            for left in waiting:
                ray.cancel(left, force=True)
