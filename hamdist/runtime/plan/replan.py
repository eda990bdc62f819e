"""Plans whose delays follow from links that are measured once the actors are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hamdist.config import Settings
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.partition.apply_settings import delayed
from hamdist.dynamics.updates.constants import TickSchedule
from hamdist.dynamics.updates.optimizers import OptimizerRule
from hamdist.runtime.plan.plan import Plan, make_plan


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
    own = settings.model_copy(update={"engine": engine})

    def replan(delays: Mapping[str, int]) -> Plan:
        made = make_plan(delayed(graph, delays), own, plan.spec, phi=phi, optimizer=optimizer)
        return dataclasses.replace(made, run=plan.run, snapshot_policy=plan.snapshot_policy)

    return dataclasses.replace(plan, replan=replan)
