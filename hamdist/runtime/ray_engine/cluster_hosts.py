"""Hosts of the Ray cluster: the list, their reachability and speed, and the head's state."""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hamdist.errors import ClusterError
from hamdist.runtime.placement.assign_hosts import HostInfo, described

ANSWER_SECONDS = 1.0  # for a port of Ray's
HEAD_SECONDS = 10.0  # without an answer, of the 60 after which Ray ends its drivers
CHECKS_AT_ONCE = 32  # at a time
PROFILE_SECONDS = 60.0

LISTENING_SECONDS = 5.0


def check_listening(address: str, seconds: float = LISTENING_SECONDS) -> None:
    """Raise OSError if no process listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()


def answers(address: str) -> bool:
    """Return True if a process listens at host:port."""
    try:
        check_listening(address, ANSWER_SECONDS)
    except OSError:
        return False
    return True


def last_line(error: BaseException) -> str:
    """Return the last line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def answered(calls: Collection[Any], seconds: float) -> list[Any]:
    """Return those of Ray's calls that have ended within `seconds`."""
    import ray

    calls = list(calls)
    done: list[Any] = ray.wait(calls, num_returns=len(calls), timeout=seconds)[0] if calls else []
    return done


class HeadWatch:
    """Detects the loss of a joined cluster's head, before Ray ends this process for it."""

    def __init__(self) -> None:
        self._sent = self._answered = time.monotonic()

    def lost(self, address: str, now: float) -> bool:
        """Test at intervals whether the head's address accepts connections: True if it has not for
        HEAD_SECONDS. now: as of `time.monotonic`."""
        if now - self._sent >= HEAD_SECONDS / 5:
            self._sent = now
            if answers(address):
                self._answered = now
        return now - self._answered >= HEAD_SECONDS


def hosts() -> list[HostInfo]:
    """Return the hosts of the running Ray, this one first, the others by their address."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    alive = [_host(node) for node in ray.nodes() if node["Alive"]]
    return sorted(alive, key=lambda host: (host.id != here, host.address))


def reachable_hosts() -> list[HostInfo]:
    """Return those of `hosts()` whose raylet can be reached from here.

    Ray itself needs seconds to notice that one cannot.
    """
    import ray

    raylets = {
        node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        for node in ray.nodes()
        if node["Alive"]
    }

    def reached(host: HostInfo) -> bool:
        return host.id in raylets and answers(raylets[host.id])

    listed = hosts()
    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        return [host for host, up in zip(listed, pool.map(reached, listed), strict=True) if up]


def _host(node: dict[str, Any]) -> HostInfo:
    address, name = node["NodeManagerAddress"], node.get("NodeManagerHostname", "")
    return described(node["NodeID"], address, name, node["Resources"], node.get("Labels", {}))


def host_seconds(hosts: Sequence[HostInfo]) -> dict[str, float]:
    """Return, by host, the seconds for a fixed calculation in one thread of a process of its own.

    Raises ClusterError for a host on which no processor is free for it.
    """
    import ray
    from ray.exceptions import RayError

    from hamdist.runtime.ray_engine.worker_actor import timed_on

    calls = {host.id: timed_on(host.id) for host in hosts}
    try:
        return dict(zip(calls, ray.get(list(calls.values()), timeout=PROFILE_SECONDS), strict=True))
    except (RayError, TimeoutError) as error:
        raise ClusterError(
            f"engine.spread 'profile': the hosts could not be measured within "
            f"{PROFILE_SECONDS:.0f} s ({type(error).__name__}); is a processor free on each? use "
            "'packed' or 'spread'"
        ) from error
