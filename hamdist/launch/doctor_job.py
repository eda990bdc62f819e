"""Examines every host of the Ray that this process joins: `python -m hamdist.launch.doctor_job`,
as a job of `hamdist doctor --cluster`. A probe (an actor that requests no CPU) on each host
collects the host's facts, and measures links with hamdist's own transport.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hamdist.errors import FAILED, HamdistError
from hamdist.launch.doctor import Findings, HostFacts, LinkFacts, host_facts
from hamdist.launch.events import DoctorReport, Ended, tell
from hamdist.launch.package import read_spec
from hamdist.runtime.placement.assign_hosts import HostInfo
from hamdist.runtime.placement.links import Probe
from hamdist.runtime.ray_engine.cluster_hosts import hosts, last_line
from hamdist.runtime.results.events import Warned
from hamdist.runtime.transport.encryption import new_keys
from hamdist.runtime.transport.transport import TCP, local_way

PROBE_SECONDS = 60.0
LINK_SECONDS = 20.0
CLOCK_ROUNDS = 9
ALL_PAIRS = 6  # hosts; of more, each is measured with the next and with the head
THREADS = 64


class HostProbe:
    """An actor on the host that is examined."""

    _probe: Probe | None = None  # of the link that is measured

    def facts(self, storage: str | None, mark: str | None) -> HostFacts:
        """Return the facts of this host."""
        return host_facts(storage, mark)

    def clock(self) -> float:
        """Return this host's time, in seconds since 1970."""
        return time.time()

    def new_key(self, run: int) -> str:
        """Make an end of the next link with keys of its own, and return the public one."""
        keys = new_keys()
        self._probe = Probe(run, 0.0, keys)
        return keys.public

    def call(self, method: str, *arguments: Any) -> Any:
        """Return the result of a method of this end of the link (`Probe`)."""
        return getattr(self._probe, method)(*arguments)


def main() -> int:
    """Examine all hosts, report the findings, and return the exit code."""
    try:
        spec = read_spec(Path.cwd())
    except HamdistError as error:
        tell(Ended(code=FAILED, error=str(error)))
        return FAILED
    ray.init(
        address=os.environ.get("RAY_ADDRESS", "auto"),
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    findings = examine(hosts(), spec.storage)
    tell(DoctorReport(report=findings.model_dump_json()))
    tell(Ended(code=0))
    return 0


def examine(hosts: Sequence[HostInfo], storage: str | None = None) -> Findings:
    """Examine the `hosts` of the running Ray, the one of this process first.

    `storage` is a folder that all hosts should see.
    """
    mark = None
    if storage is not None:
        mark = f".hamdist-mark-{secrets.token_hex(4)}"
        try:
            Path(storage).mkdir(parents=True, exist_ok=True)
            (Path(storage) / mark).write_bytes(b"head")
        except OSError as error:
            tell(Warned(text=f"storage {storage!r} on the head: {error.strerror or error}"))
    started = [(host, _start(host)) for host in hosts]
    try:
        return _findings(started, storage, mark)
    finally:
        for _, probe in started:
            ray.kill(probe)
        if storage is not None and mark is not None:
            (Path(storage) / mark).unlink(missing_ok=True)


def _start(host: HostInfo) -> Any:
    where = NodeAffinitySchedulingStrategy(host.id, soft=False)
    options = {"num_cpus": 0, "max_concurrency": THREADS, "scheduling_strategy": where}
    return ray.remote(HostProbe).options(**options).remote()


def _findings(
    started: Sequence[tuple[HostInfo, Any]], storage: str | None, mark: str | None
) -> Findings:
    facts: list[HostFacts] = []
    there: list[tuple[HostInfo, Any]] = []
    unreached: dict[str, str] = {}
    calls = [probe.facts.remote(storage, mark) for _, probe in started]
    end = time.monotonic() + PROBE_SECONDS
    for (host, probe), call in zip(started, calls, strict=True):
        try:
            of_host = ray.get(call, timeout=max(1.0, end - time.monotonic()))
            more = {"address": host.address, "promised": host.cpus}
            facts.append(of_host.model_copy(update=more))
            there.append((host, probe))
        except GetTimeoutError:
            unreached[str(host)] = f"no answer within {PROBE_SECONDS:.0f} s"
        except RayError as error:
            unreached[str(host)] = f"hamdist does not run there: {last_line(error)}"
    measured, skipped = pairs(len(there))
    run = secrets.randbits(31)
    links = [_link(run, n, i, j, there) for n, (i, j) in enumerate(measured)]
    if len(there) == 1:
        links = [_inside(run, there[0])]
    return Findings(
        hosts=facts,
        unreached=unreached,
        clocks=[_clock(probe) for _, probe in there],
        links=links,
        skipped=skipped,
    )


def pairs(hosts: int) -> tuple[list[tuple[int, int]], int]:
    """Return the pairs of hosts to measure, and the number of those that are not measured."""
    every = list(itertools.combinations(range(hosts), 2))
    if hosts <= ALL_PAIRS:
        return every, 0
    chosen = [(i, j) for i, j in every if i == 0 or j == i + 1]
    return chosen, len(every) - len(chosen)


def _clock(probe: Any) -> tuple[float, float]:
    """Return its clock less ours, by the quickest of a few queries, and the uncertainty."""
    offsets = []
    for _ in range(CLOCK_ROUNDS):
        begin = time.time()
        there = ray.get(probe.clock.remote(), timeout=LINK_SECONDS)
        end = time.time()
        offsets.append((end - begin, there - (begin + end) / 2))
    took, offset = min(offsets)
    return offset, took / 2


def _inside(run: int, only: tuple[HostInfo, Any]) -> LinkFacts:
    """Measure the link between two processes of a single host."""
    other = (only[0], _start(only[0]))
    try:
        link = _link(run, 0, 0, 1, [only, other])
    finally:
        ray.kill(other[1])
    return link.model_copy(update={"second": 0})


def _link(
    run: int, number: int, i: int, j: int, there: Sequence[tuple[HostInfo, Any]]
) -> LinkFacts:
    (first, mine), (second, other) = there[i], there[j]
    out, back = Probe.channels(number)
    same = first.id == second.id
    ways = [local_way(c) for c in (out, back)]
    try:
        keys = [probe.new_key.remote(run) for probe in (mine, other)]
        my_key, others_key = ray.get(keys, timeout=PROBE_SECONDS)
        if not same:  # encrypted, as in a run
            ways = [f"{TCP}{second.address} {my_key}", f"{TCP}{first.address} {others_key}"]
        opened = ray.get(
            [
                other.call.remote("open", {out.number: ways[0]}),
                mine.call.remote("open", {back.number: ways[1]}),
            ],
            timeout=PROBE_SECONDS,
        )
        addresses = {**opened[0], **opened[1]}
        joined = [w.call.remote("join", addresses) for w in (mine, other)]
        ray.get(joined, timeout=LINK_SECONDS)
        answered = other.call.remote("answer", number)
        link, _ = ray.get([mine.call.remote("measure", number), answered], timeout=LINK_SECONDS)
        ray.get([w.call.remote("close") for w in (mine, other)], timeout=LINK_SECONDS)
    except GetTimeoutError:
        why = f"nothing within {LINK_SECONDS:.0f} s"
        return LinkFacts(first=i, second=j, error=why)
    except RayError as error:
        return LinkFacts(first=i, second=j, error=last_line(error))
    rate = None if link.bytes_per_second == float("inf") else link.bytes_per_second
    way = ways[0].partition(":")[0]
    return LinkFacts(first=i, second=j, way=way, seconds=link.seconds, bytes_per_second=rate)


if __name__ == "__main__":
    sys.exit(main())
