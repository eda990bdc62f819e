"""Hands work to a cluster: a run, or a look at its hosts."""

from __future__ import annotations

import re
import secrets

from hamdist.config import Settings
from hamdist.launch.jobs import Jobs
from hamdist.launch.parcel import Order, packed

MIB = 2**20
LONGEST = 40


def submit_run(jobs: Jobs, settings: Settings, model: str | None) -> str:
    """Starts a run of `settings` (those of one level, `on_ray`). Returns its id."""
    name = make_id(f"{settings.name}-{settings.level.value}")
    known = {
        "kind": "run",
        "level": settings.level.value,
        "steps": "" if settings.steps is None else str(settings.steps),
    }
    return _submit(jobs, settings, _order(jobs, name, model), "hamdist.launch.job", known)


def submit_checkup(jobs: Jobs) -> str:
    """Starts a look at all hosts (examine.py). Returns its id."""
    name = make_id("doctor")
    order = _order(jobs, name, None)
    return _submit(jobs, Settings(), order, "hamdist.launch.examine", {"kind": "doctor"})


def make_id(name: str) -> str:
    """A new id: what it is, and a few random digits."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:LONGEST] or "run"
    return f"{readable}-{secrets.token_hex(3)}"


def _order(jobs: Jobs, name: str, model: str | None) -> Order:
    cluster = jobs.cluster
    return Order(id=name, model=model, storage=cluster.storage, most=cluster.fetch_mib * MIB)


def _submit(
    jobs: Jobs, settings: Settings, order: Order, module: str, known: dict[str, str]
) -> str:
    command = f"exec {jobs.cluster.python} -m {module}"
    with packed(settings, order) as folder:
        return jobs.submit(command, folder, name=order.id, metadata=known)
