"""`hamdist doctor`: facts of this host alone, or of all hosts of a cluster, and their verdicts.

Facts of a host are taken there, without Ray; verdicts are pure functions of what was found.
"""

from __future__ import annotations

import math
import os
import platform
import resource
import secrets
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from pydantic import BaseModel, ValidationError

from hamdist.dynamics.native import rows
from hamdist.errors import ClusterError
from hamdist.launch.events import DoctorReport, Ended, Results, follow
from hamdist.launch.jobs_api import Jobs, missing_extras
from hamdist.launch.submit import submit_checkup
from hamdist.runtime.process.arithmetic import Arithmetic, arithmetic
from hamdist.runtime.process.threads import cores
from hamdist.runtime.results.events import Warned
from hamdist.study.report.files import versions

SHARED = Path("/dev/shm")


class HostFacts(BaseModel, frozen=True):
    """Facts of a host.

    Attributes:
        versions: by package, and of Python.
        processors: that this process may use; promised: CPUs that Ray schedules there.
        threads: torch's default.
        memory, free, shared: bytes of the host, of its free memory, of /dev/shm (None: missing).
        files: that a process may open.
        token: Ray's token is required there.
        storage: the fault of the shared storage; empty: none, None: there is no storage.
    """

    name: str
    address: str = ""
    platform: str
    versions: dict[str, str]
    processors: int
    promised: float = 0.0
    threads: int
    memory: int
    free: int
    shared: int | None
    files: int
    native: bool
    arithmetic: Arithmetic
    gpus: list[str]
    token: bool
    storage: str | None = None


def host_facts(storage: str | None = None, mark: str | None = None) -> HostFacts:
    """Return the facts of this host; `mark` is a file that another host has put into `storage`."""
    memory = psutil.virtual_memory()
    return HostFacts(
        name=socket.gethostname(),
        platform=f"{platform.system()} {platform.machine()}",
        versions=versions(),
        processors=cores(),
        threads=torch.get_num_threads(),
        memory=memory.total,
        free=memory.available,
        shared=shutil.disk_usage(SHARED).free if SHARED.is_dir() else None,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        native=rows.built(),
        arithmetic=arithmetic(1, native=rows.built()),
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        token=os.environ.get("RAY_AUTH_MODE") == "token",
        storage=None if storage is None else storage_fault(Path(storage), mark),
    )


def storage_fault(folder: Path, mark: str | None) -> str:
    """Return why `folder` is no storage for this host; empty if it is one."""
    if mark is not None and not (folder / mark).is_file():
        return f"{folder} is not the same folder as on the head" if folder.is_dir() else "missing"
    probe = folder / f".hamdist-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"here")
        probe.unlink()
    except OSError as error:
        return f"cannot be written: {error.strerror or error}"
    return ""


# -- findings and verdicts -------------------------------------------------------------------------

MIB, GIB = 2**20, 2**30
LEAST_FREE = GIB  # an actor that imports torch takes 170 to 300 MiB
LEAST_SHARED = 128 * MIB
LEAST_FILES = 1024
CLOCK_SECONDS = 1.0
SLOW_SECONDS = 0.2
SAME = ("hamdist", "ray", "python", "torch")  # on all hosts, or nothing is equal to the bit


class LinkFacts(BaseModel, frozen=True):
    """The link between two hosts, given by their index.

    `seconds`: of a small signal one way; `bytes_per_second`: of a large one (None: unknown);
    `error`: the reason of a failure.
    """

    first: int
    second: int
    way: str = "tcp"
    seconds: float | None = None
    bytes_per_second: float | None = None
    error: str | None = None


class Findings(BaseModel, frozen=True):
    """Facts of all hosts and links.

    Attributes:
        hosts: the head first; unreached: hosts that could not be examined, with the reason.
        clocks: by host its clock less the head's, in seconds, and how far that may be wrong.
        skipped: pairs of hosts whose links were not measured.
    """

    hosts: list[HostFacts]
    unreached: dict[str, str] = {}
    clocks: list[tuple[float, float]] = []
    links: list[LinkFacts] = []
    skipped: int = 0

    def tables(self) -> dict[str, list[list[str]]]:
        """Return tables by title; the first row has the columns' names."""
        head = ["host", "platform", "vectors", "hamdist", "torch", "ray", "python"]
        head += ["CPUs", "threads"]
        head += ["free GiB", "/dev/shm MiB", "C code", "GPUs", "clock, ms"]
        hosts = [head]
        for i, host in enumerate(self.hosts):
            versions = host.versions
            shared = "none" if host.shared is None else f"{host.shared / MIB:.0f}"
            cpus = str(host.processors)
            cpus += f" ({host.promised:g} in Ray)" if host.promised else ""
            offset = f"{1000 * self.clocks[i][0]:.1f} ± {1000 * self.clocks[i][1]:.1f}"
            hosts.append(
                [
                    self.name(i),
                    host.platform,
                    host.arithmetic.capability,
                    *(versions[p] for p in ("hamdist", "torch", "ray", "python")),
                    cpus,
                    str(host.threads),
                    f"{host.free / GIB:.1f}",
                    shared,
                    "yes" if host.native else "no",
                    str(len(host.gpus)),
                    offset if i else "0",
                ]
            )
        links = [["from", "to", "by", "latency, ms", "MiB/s"]]
        links += [
            [self.name(link.first), self.name(link.second), link.way, *_speed(link)]
            for link in self.links
        ]
        return {"Hosts": hosts, **({"Links": links} if self.links else {})}

    def name(self, i: int) -> str:
        """Return a host's name, with its address where that is another text."""
        host = self.hosts[i]
        return host.name if host.address in ("", host.name) else f"{host.name} ({host.address})"


@dataclass(frozen=True)
class DoctorCheck:
    """The verdict of a check: FAIL if a run would not work, or compute other numbers."""

    verdict: Literal["ok", "warning", "FAIL"]
    text: str


def verdicts(findings: Findings, here: Mapping[str, str] | None = None) -> list[DoctorCheck]:
    """Return the verdicts; `here`: versions of the terminal's host, if it is not among them."""
    checks = [DoctorCheck("FAIL", f"{name}: {why}") for name, why in findings.unreached.items()]
    checks += _versions(findings, here)
    checks += _arithmetic(findings)
    for i, host in enumerate(findings.hosts):
        checks += _host(findings.name(i), host)
    checks += _clocks(findings)
    checks += _storage(findings)
    checks += _links(findings)
    return checks


def _versions(findings: Findings, here: Mapping[str, str] | None) -> list[DoctorCheck]:
    checks = []
    for package in SAME:
        by_version: dict[str, list[str]] = {}
        for i, host in enumerate(findings.hosts):
            by_version.setdefault(host.versions[package], []).append(findings.name(i))
        if here is not None and package == "hamdist":
            by_version.setdefault(here[package], []).append("this terminal")
        if len(by_version) > 1:
            who = "; ".join(f"{v}: {', '.join(names)}" for v, names in sorted(by_version.items()))
            checks.append(DoctorCheck("FAIL", f"{package} differs ({who}): install one version"))
    if not checks and findings.hosts:
        versions = findings.hosts[0].versions
        text = ", ".join(f"{package} {versions[package]}" for package in SAME)
        checks.append(DoctorCheck("ok", f"versions: {text}"))
    return checks


def _arithmetic(findings: Findings) -> list[DoctorCheck]:
    """Check which hosts compute the same bits, without C code where one has none (see `_host`)."""
    kinds: list[tuple[Arithmetic, list[str]]] = []
    for i, host in enumerate(findings.hosts):
        arithmetic = host.arithmetic
        alike = next((names for kind, names in kinds if not arithmetic.unlike(kind)), None)
        if alike is None:
            kinds.append((arithmetic, [findings.name(i)]))
        else:
            alike.append(findings.name(i))
    if len(kinds) < 2:
        return [DoctorCheck("ok", f"equal bits: {kind}") for kind, _ in kinds]
    (first, firsts), others = kinds[0], kinds[1:]
    kinds_text = [f"{', '.join(n)} on {k} ({', '.join(k.unlike(first))})" for k, n in others]
    text = f"other bits than {', '.join(firsts)} on {first}: {'; '.join(kinds_text)}"
    return [DoctorCheck("warning", f"{text}: engine.bits 'portable' makes x86 processors agree")]


def _host(name: str, host: HostFacts) -> list[DoctorCheck]:
    shared = math.inf if host.shared is None else host.shared
    faults = {
        f"Ray hands out {host.promised:g} CPUs, but there are {host.processors}: actors will wait "
        "for each other (ray start --num-cpus)": host.promised > host.processors,
        f"{host.free / MIB:.0f} MiB of memory are free; an actor takes 170 to 300": (
            host.free < LEAST_FREE
        ),
        f"/dev/shm has {shared / MIB:.0f} MiB left; signals go through it (docker --shm-size, or "
        "an emptyDir in memory)": shared < LEAST_SHARED,
        f"a process may open {host.files} files; raise it (ulimit -n)": host.files < LEAST_FILES,
        "hamdist's C code was not built (no C compiler?): batch 1 is slower": not host.native,
    }
    checks = [DoctorCheck("warning", f"{name}: {text}") for text, wrong in faults.items() if wrong]
    checks = checks or [DoctorCheck("ok", f"{name}: processors, memory, open files, C code")]
    if host.promised and not host.token:
        text = f"{name}: Ray asks for no token: whoever reaches its ports owns the host"
        checks.append(DoctorCheck("warning", text))
    return checks


def _clocks(findings: Findings) -> list[DoctorCheck]:
    if len(findings.clocks) < 2:
        return []
    wrong = [
        DoctorCheck(
            "warning", f"{findings.name(i)}: its clock is {offset:+.1f} s from the head's (ntp?)"
        )
        for i, (offset, doubt) in enumerate(findings.clocks)
        if abs(offset) - doubt > CLOCK_SECONDS
    ]
    return wrong or [DoctorCheck("ok", f"clocks agree within {CLOCK_SECONDS:g} s")]


def _storage(findings: Findings) -> list[DoctorCheck]:
    named = [(i, host.storage) for i, host in enumerate(findings.hosts) if host.storage is not None]
    wrong = [DoctorCheck("FAIL", f"{findings.name(i)}: storage: {why}") for i, why in named if why]
    if named and not wrong:
        return [DoctorCheck("ok", "storage: every host reads and writes it")]
    return wrong


def _links(findings: Findings) -> list[DoctorCheck]:
    checks = []
    for link in findings.links:
        ends = f"{findings.name(link.first)} - {findings.name(link.second)}"
        if link.error is not None:
            text = (
                f"{ends}: no signal came through ({link.error}); hamdist needs the TCP ports that "
                "the system hands out (net.ipv4.ip_local_port_range) open between hosts"
            )
            checks.append(DoctorCheck("FAIL", text))
        elif link.seconds is not None and link.seconds > SLOW_SECONDS:
            text = f"{ends}: {1000 * link.seconds:.0f} ms a signal; partition.delays: auto hides it"
            checks.append(DoctorCheck("warning", text))
    if findings.links and not checks:
        checks.append(DoctorCheck("ok", f"links: {len(findings.links)} measured"))
    if findings.skipped:
        text = f"{findings.skipped} pairs of hosts were not measured"
        checks.append(DoctorCheck("warning", text))
    return checks


def _speed(link: LinkFacts) -> list[str]:
    if link.seconds is None:
        return ["failed", ""]
    rate = link.bytes_per_second
    fast = "" if rate is None or math.isinf(rate) else f"{rate / MIB:,.0f}"
    return [f"{1000 * link.seconds:.2f}", fast]


# -- what is asked for -----------------------------------------------------------------------------


def checkup(jobs: Jobs | None, say: Callable[[str], None]) -> tuple[Findings, list[DoctorCheck]]:
    """Collect the findings of a cluster, or of this host alone (`jobs` None), and judge them.

    `say` is called with progress. Raises ClusterError if the cluster cannot be examined at all.
    """
    if jobs is None:
        return this_host()
    findings = _cluster(jobs, say)
    return findings, verdicts(findings, host_facts().versions)


def this_host() -> tuple[Findings, list[DoctorCheck]]:
    """Collect and judge the facts of this host alone."""
    findings = Findings(hosts=[host_facts()], clocks=[(0.0, 0.0)])
    missing = missing_extras()
    extras = DoctorCheck("ok", "Ray's Jobs API: its packages are here")
    if missing:
        text = f"no {', '.join(missing)}: hamdist launch needs pip install 'hamdist[cluster]'"
        extras = DoctorCheck("warning", text)
    return findings, [*verdicts(findings), extras]


def _cluster(jobs: Jobs, say: Callable[[str], None]) -> Findings:
    name = submit_checkup(jobs)
    lines: list[str] = []
    say(f"Looking at all hosts ({name})")
    for event in follow(jobs.lines(name), Results(None), lines.append):
        if isinstance(event, Warned):
            say(f"Warning: {event.text}")
        elif isinstance(event, DoctorReport):
            try:
                return Findings.model_validate_json(event.report)
            except ValidationError as error:
                raise ClusterError(
                    f"the cluster's hamdist reports in another way ({error.error_count()} fields "
                    "differ): install the same version there as here"
                ) from None
        elif isinstance(event, Ended) and event.error is not None:
            raise ClusterError(event.error)
    raise ClusterError("\n".join([*lines, jobs.find(name).unfinished()]))
