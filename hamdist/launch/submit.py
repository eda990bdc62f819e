"""Submits jobs to a cluster: a run, or an examination of its hosts. `hamdist launch --dry-run`: the
placement, the ports, and missing resources.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hamdist.config import Settings, Spread
from hamdist.errors import ClusterError, SettingsError
from hamdist.launch.cluster_file import ClusterSettings
from hamdist.launch.jobs_api import Jobs
from hamdist.launch.package import JobSpec, named_there, own_code, packed, snapshots_in
from hamdist.runtime.placement.assign_blocks import by_parameters, options_of_groups, place
from hamdist.runtime.placement.assign_hosts import ActorOptions, HostInfo
from hamdist.runtime.plan.plan import Plan
from hamdist.study.run.export import starting_plan
from hamdist.study.run.own_data import OwnFunctions
from hamdist.study.run.run import torch_dtype

MIB = 2**20
LONGEST = 40
NOTHING_KEPT = (
    "no storage in the cluster file, and no snapshots.path: the run keeps no snapshots, so a lost "
    "process, or a lost driver, ends it"
)


def submit_run(
    jobs: Jobs,
    settings: Settings,
    model: str | None,
    resume: str | None = None,
    stream: str | None = None,
    live: tuple[str, int] | None = None,
) -> str:
    """Submit a run, and return its id.

    Args:
        jobs: of the cluster.
        settings: those of one level (`on_ray`).
        model, stream: names that `--model` and `--stream` gave, imported already.
        resume: see `resumed_from`.
        live: see `JobSpec`.
    """
    name = make_id(f"{settings.name}-{settings.level_name}")
    own = {"model": model, "stream": stream}
    more: dict[str, Any] = {k: None if v is None else named_there(v) for k, v in own.items()}
    more |= {
        "snapshots": snapshots_path(settings, jobs.cluster, name),
        "resume": resume,
        "live": live,
    }
    steps = "" if settings.steps is None else str(settings.steps)
    metadata = {"kind": "run", "level": settings.level_name, "steps": steps}
    return _submit(jobs, settings, name, "guardian", metadata, **more)


def snapshots_path(settings: Settings, cluster: ClusterSettings, name: str) -> str | None:
    """Return where a run keeps its snapshots: as the settings say, else in the storage, else None.

    Raises SettingsError for a path that means another folder on every host.
    """
    path = settings.snapshots.path
    if path is None:
        return None if cluster.storage is None else snapshots_in(cluster.storage, name)
    if "://" not in path and not path.startswith("/"):
        raise SettingsError(
            f"snapshots.path {path!r}: a launched run has another current folder; write the whole "
            "path, or a URL"
        )
    return path


def resumed_from(name: str, cluster: ClusterSettings) -> str:
    """Return the snapshots that `--resume` names: a run by its id, or a path or URL on the cluster.

    Raises SettingsError.
    """
    if "/" in name:
        return name
    if cluster.storage is None:
        raise SettingsError(
            f"--resume {name!r}: the cluster file names no storage, where runs keep their "
            "snapshots; give their folder, or a URL"
        )
    return snapshots_in(cluster.storage, name)


def submit_checkup(jobs: Jobs) -> str:
    """Submit an examination of all hosts (doctor_job.py), and return its id."""
    metadata = {"kind": "doctor"}
    return _submit(jobs, Settings(), make_id("doctor"), "doctor_job", metadata, model=None)


def make_id(name: str) -> str:
    """Return a new id: the name, and a few random digits."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:LONGEST] or "run"
    return f"{readable}-{secrets.token_hex(3)}"


def _submit(
    jobs: Jobs, settings: Settings, name: str, module: str, metadata: dict[str, str], **more: Any
) -> str:
    """Submit a job that runs a module of this folder; `more`: further fields of its `JobSpec`."""
    cluster = jobs.cluster
    spec = JobSpec(id=name, storage=cluster.storage, most=cluster.fetch_mib * MIB, **more)
    command = f"exec {cluster.python} -m hamdist.launch.{module}"
    with packed(settings, spec) as folder:
        return jobs.submit(command, folder, name=name, metadata=metadata)


# -- dry run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run.

    Attributes:
        hosts: of the cluster.
        actors: by process its blocks, its actor options (None: the cluster lacks the resources),
            and the MiB of its weights and weight costates.
        missing: reasons why the run cannot start; notes: further information.
    """

    hosts: Sequence[HostInfo]
    actors: Sequence[tuple[Sequence[str], ActorOptions | None, float]]
    missing: Sequence[str]
    notes: Sequence[str] = field(default_factory=tuple)

    def tables(self) -> dict[str, list[list[str]]]:
        """Return tables by title; the first row has the columns' names."""
        names = {host.id: str(host) for host in self.hosts}
        hosts = [["host", "CPUs", "GPUs", "other resources"]]
        hosts += [
            [str(host), f"{host.cpus:g}", f"{host.gpus:g}", _shown(host.resources)]
            for host in self.hosts
        ]
        actors = [["actor", "blocks", "host", "CPUs", "GPUs", "other resources", "weights, MiB"]]
        for i, (blocks, actor_options, size) in enumerate(self.actors):
            where = ["no room", "", "", ""]
            if actor_options is not None:
                free = "Ray decides" if len(self.hosts) > 1 else str(self.hosts[0])
                host = free if actor_options.node is None else names[actor_options.node]
                where = [
                    host,
                    f"{actor_options.cpus:g}",
                    f"{actor_options.gpus:g}",
                    _shown(dict(actor_options.resources)),
                ]
            actors.append([f"actor {i}", ", ".join(blocks), *where, f"{size:.1f}"])
        return {"Hosts": hosts, "Actors": actors}


def dry_run(
    settings: Settings,
    named: Mapping[str, str | None],
    own: OwnFunctions,
    cluster: ClusterSettings,
    hosts: Sequence[HostInfo],
) -> DryRun:
    """Plan a run on a cluster without starting it.

    Args:
        settings: those of one level, on Ray.
        named: the function by option ('--model', '--stream'), if one was given.
        own: these functions.
        cluster: the cluster's settings.
        hosts: of the cluster.

    Raises:
        SettingsError, GraphError, LevelError: no cluster could run the settings.
    """
    plan, _ = starting_plan(settings, own)
    cpus = int(sum(host.cpus for host in hosts))
    groups = place(plan.graph, plan.engine, max(1, cpus))
    missing = [] if hosts else ["the cluster has no host that is alive"]
    options: Sequence[ActorOptions | None] = [None] * len(groups)
    try:
        spread = plan.engine.spread if len(hosts) > 1 else Spread.AUTO
        if spread is Spread.PROFILE:  # no host is measured here
            spread = Spread.PACKED
        options = options_of_groups(plan.graph, plan.engine, groups, hosts, spread)
    except ClusterError as error:
        missing.append(str(error))
    work = dict(zip(plan.graph.blocks, by_parameters(plan.graph), strict=True))
    size = torch_dtype(settings.dtype).itemsize
    actors = [
        (group, actor_options, sum(2 * (work[name] - 1) * size for name in group) / MIB)
        for group, actor_options in zip(groups, options, strict=True)
    ]
    return DryRun(hosts, actors, missing, _notes(settings, named, cluster, plan, groups, hosts))


def _notes(
    settings: Settings,
    named: Mapping[str, str | None],
    cluster: ClusterSettings,
    plan: Plan,
    groups: Sequence[Sequence[str]],
    hosts: Sequence[HostInfo],
) -> list[str]:
    actor = {name: i for i, group in enumerate(groups) for name in group}
    crossing = [
        e for e in plan.graph.edges if not e.from_input and actor[e.parent] != actor[e.child]
    ]
    notes = [
        "the driver runs on the head and asks for no CPU; placed by parameters: the run itself "
        "measures the blocks first, and may place them otherwise",
        f"{len(crossing)} edge(s) cross actors; between hosts each takes one TCP port of the "
        "system's choosing on either side (Linux: net.ipv4.ip_local_port_range), besides Ray's own",
    ]
    if settings.engine.spread is Spread.PROFILE and len(hosts) > 1:
        notes.append("engine.spread 'profile': shown as if all hosts were equally fast")
    if cluster.storage is None:
        notes.append("no storage in the cluster file: results come back here, and nowhere else")
    if snapshots_path(settings, cluster, "") is None:
        notes.append(NOTHING_KEPT)
    if settings.stream.path is not None and named.get("--stream") is None:
        notes.append(f"stream.path {str(settings.stream.path)!r} must be there on the head")
    for option, name in named.items():
        if name is not None:
            code = own_code(name)
            notes.append(
                f"{option}: {'installed, so it must be on all hosts' if code is None else code}"
                + ("" if code is None else " travels along")
            )
    return notes


def _shown(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in sorted(resources.items()))
