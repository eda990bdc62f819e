"""The Ray actor: a `Worker` in a process of its own. It adds no mathematics.

Every method runs in the actor's process, calls of the worker beside `run` in other threads.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hamdist.runtime.engines.worker import ReceivingEnds, Worker
from hamdist.runtime.placement.assign_hosts import ActorOptions
from hamdist.runtime.placement.links import Probe
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.arithmetic import Arithmetic, arithmetic
from hamdist.runtime.process.leftovers import remove_leftovers
from hamdist.runtime.process.switches import Switches, set_switches
from hamdist.runtime.process.threads import product_seconds
from hamdist.streams.sample import Stream

if TYPE_CHECKING:
    from hamdist.runtime.transport.encryption import Keys

THREADS_OF_AN_ACTOR = 8
ANSWER_SECONDS = 5.0
SLOW_SECONDS = 60.0  # of the start of an actor on a busy host


class WorkerActor:
    """A worker in a process of its own on some host.

    Its host is known before it gets its blocks: only then can the transport of its channels be
    chosen.
    """

    def __init__(self) -> None:
        self._serves: Worker | Probe | None = None
        self._keys: Keys | None = None
        # What the imports have made stays: without it the collection with which every run begins
        # takes milliseconds instead of a tenth of a second and more.
        gc.freeze()
        remove_leftovers()

    def where(self) -> tuple[str, str, int]:
        """Return Ray's id of the host, its address, and the process id."""
        node = ray.get_runtime_context().get_node_id()
        return node, ray.util.get_node_ip_address(), os.getpid()

    def new_key(self) -> str:
        """Make this process's keys for the next run, and return the public one."""
        from hamdist.runtime.transport.encryption import new_keys

        self._keys = new_keys()
        return self._keys.public

    def probe(
        self, run: int, link_delay: float, ports: range | None, binds: Mapping[int, str]
    ) -> dict[int, str]:
        """Open the receiving ends of links to measure, by channel, and return their addresses."""
        self._serves = probe = Probe(run, link_delay, self._keys, ports)
        return probe.open(binds)

    def compute_as(
        self, switches: Switches, threads: int, native: bool, path: Sequence[str]
    ) -> tuple[Arithmetic, list[str]]:
        """Set torch's switches to the driver's, before any block exists; return the fingerprint of
        this process then, and the switches that could not be set.

        path: where the driver finds the modules of users' blocks (an earlier run of this actor may
        have had others).
        """
        sys.path.extend(entry for entry in path if entry not in sys.path)
        importlib.invalidate_caches()  # (a module may have been written since then)
        refused = set_switches(switches)
        return arithmetic(threads, native=native), refused

    def prepare(
        self, plan: Plan, blocks: Sequence[str], stream: Stream | None, binds: Mapping[int, str]
    ) -> ReceivingEnds:
        """Build the blocks, open the receiving ends, and return their addresses."""
        self._serves = worker = Worker(plan, blocks, stream, self._keys)
        return worker.bind(binds)

    def call(self, method: str, *arguments: Any, run: int | None = None) -> Any:
        """Return the result of a method of the worker, or of the probe, that the actor serves.

        Args:
            method: its name.
            run: the call concerns this run alone. The driver does not wait for all its calls: one
                that arrives when the actor serves another run, or none, has no effect.
        """
        serves = self._serves
        if run is not None and (not isinstance(serves, Worker) or serves.number != run):
            return None
        return getattr(serves, method)(*arguments)

    def close(self) -> None:
        """End the run, however far it has come; the actor can take another."""
        if self._serves is not None:
            self._serves.close()
            self._serves = None


def is_alive(actor: Any, *, starting: bool = False) -> bool:
    """Return True if an idle actor still answers, or one that is starting does at last."""
    try:
        ray.get(actor.where.remote(), timeout=SLOW_SECONDS if starting else ANSWER_SECONDS)
    except (RayError, GetTimeoutError):
        return False
    return True


def start_actor(actor_options: ActorOptions) -> Any:
    """Start an actor in Ray, without Ray's restarts, which would lose its state.

    Ray records no events of its calls: with them its head grew by 100 MiB in an hour of status
    queries.
    """
    options = {
        **_reserved(actor_options),
        "num_gpus": actor_options.gpus,
        "max_concurrency": THREADS_OF_AN_ACTOR,
        "max_restarts": 0,
        "enable_task_events": False,
    }
    if actor_options.environment:
        options["runtime_env"] = {"env_vars": dict(actor_options.environment)}
    return ray.remote(WorkerActor).options(**options).remote()


def _reserved(actor_options: ActorOptions) -> dict[str, Any]:
    options: dict[str, Any] = {
        "num_cpus": actor_options.cpus,
        "resources": dict(actor_options.resources),
    }
    if actor_options.node is not None:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
            actor_options.node, soft=False
        )
    return options


def timed_on(node: str) -> Any:
    """Return a reference to the seconds that a host takes for a fixed calculation."""
    return ray.remote(product_seconds).options(**_reserved(ActorOptions(node=node))).remote()
