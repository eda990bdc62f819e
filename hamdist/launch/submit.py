"""Submits jobs to a cluster: a run, or an examination of its hosts."""

from __future__ import annotations

import re
import secrets

from hamdist.config import Settings
from hamdist.errors import SettingsError
from hamdist.launch.cluster_file import ClusterSettings
from hamdist.launch.jobs_api import Jobs
from hamdist.launch.package import JobSpec, named_there, packed, snapshots_in

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
    name = make_id(f"{settings.name}-{settings.level.value}")
    order = _order(jobs, name, model).model_copy(
        update={
            "snapshots": kept_at(settings, jobs.cluster, name),
            "resume": resume,
            "live": live,
            "stream": None if stream is None else named_there(stream),
        }
    )
    metadata = {
        "kind": "run",
        "level": settings.level.value,
        "steps": "" if settings.steps is None else str(settings.steps),
    }
    return _submit(jobs, settings, order, "hamdist.launch.guardian", metadata)


def kept_at(settings: Settings, cluster: ClusterSettings, name: str) -> str | None:
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
    name = make_id("doctor")
    order = _order(jobs, name, None)
    return _submit(jobs, Settings(), order, "hamdist.launch.doctor_job", {"kind": "doctor"})


def make_id(name: str) -> str:
    """Return a new id: the name, and a few random digits."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:LONGEST] or "run"
    return f"{readable}-{secrets.token_hex(3)}"


def _order(jobs: Jobs, name: str, model: str | None) -> JobSpec:
    cluster = jobs.cluster
    model = None if model is None else named_there(model)
    return JobSpec(id=name, model=model, storage=cluster.storage, most=cluster.fetch_mib * MIB)


def _submit(
    jobs: Jobs, settings: Settings, order: JobSpec, module: str, metadata: dict[str, str]
) -> str:
    command = f"exec {jobs.cluster.python} -m {module}"
    with packed(settings, order) as folder:
        return jobs.submit(command, folder, name=order.id, metadata=metadata)
