"""Plans whose delays follow from links that are measured once the actors are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hamdist.config import Credit, Settings
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.partition.apply_settings import delayed
from hamdist.dynamics.schedule.make import AnySchedule, make_schedule
from hamdist.dynamics.schedule.sequence import SequenceSchedule
from hamdist.dynamics.updates.constants import TickSchedule
from hamdist.dynamics.updates.optimizers import OptimizerRule
from hamdist.runtime.plan.plan import Plan, make_plan
from hamdist.runtime.signals.signal import Channel, make_channels


def with_delays(plan: Plan, delays: Mapping[str, int]) -> Plan:
    """Return `plan` with other ticks by edge, unchecked: for its time, not to be run."""
    graph, knobs, old = delayed(plan.graph, delays), plan.knobs, plan.channels
    schedule: AnySchedule
    if isinstance(plan.schedule, SequenceSchedule):
        schedule = SequenceSchedule(graph, knobs, carries=plan.schedule.carries)
    else:
        schedule = make_schedule(graph, knobs, plan.silent)
    bundle = plan.engine.bundle
    channels = make_channels(
        graph,
        schedule,
        plan.engine.queue,
        clocked=bool(old.clocks),
        bundle="off" if bundle == "auto" else bundle,
        labels=bool(old.labels),
        messages=knobs.credit is Credit.MESSAGES,
        silent=plan.silent,
    )
    codecs = {(c.kind, c.edge): c.codec for c in old.all()}
    kinds: tuple[dict[Any, Channel], ...] = channels
    for kind in kinds:
        kind |= {key: c._replace(codec=codecs[c.kind, c.edge]) for key, c in kind.items()}
    return dataclasses.replace(plan, graph=graph, schedule=schedule, channels=channels)


def replannable(
    plan: Plan,
    graph: Graph,
    settings: Settings,
    phi: TickSchedule | None,
    optimizer: OptimizerRule | None = None,
) -> Plan:
    """Return `plan`, made of `graph` and `settings`, with a function that makes it with other
    delays.

    Signals then go alone, unless `engine.bundle` is a number (placement/links.py).
    """
    engine = settings.engine
    if engine.bundle == "auto":
        engine = engine.model_copy(update={"bundle": "off"})
    planned = settings.model_copy(update={"engine": engine})

    def replan(delays: Mapping[str, int]) -> Plan:
        changed, level = delayed(graph, delays), plan.knobs.own
        new = make_plan(changed, planned, plan.spec, phi=phi, optimizer=optimizer, level=level)
        return dataclasses.replace(new, run=plan.run, snapshot_policy=plan.snapshot_policy)

    return dataclasses.replace(plan, replan=replan)
