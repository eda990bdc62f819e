"""Consequences of a plan: the bytes of signals and messages, its network as data, the same plan
with other delays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hamdist.config import Credit, Settings
from hamdist.display.network import NetworkActor, PlacedNetwork
from hamdist.dynamics.graph.graph import INPUT, Graph
from hamdist.dynamics.graph.spec import as_network
from hamdist.dynamics.partition.apply_settings import delayed
from hamdist.dynamics.schedule.events import Kind
from hamdist.dynamics.schedule.make import make_schedule
from hamdist.dynamics.updates.constants import TickSchedule
from hamdist.dynamics.updates.optimizers import OptimizerRule
from hamdist.runtime.plan.plan import Plan, make_plan
from hamdist.runtime.signals.packing import MAX_HEADER, TIMES
from hamdist.runtime.signals.signal import Channel, make_channels

DOUBLE = 8  # bytes of a float64


def exact_bytes(plan: Plan, channel: Channel) -> int:
    """Return the most bytes of a signal on `channel` before it is compressed."""
    if channel.kind is Kind.CLOCK:
        return 0
    if channel.kind is Kind.NORM:
        return DOUBLE
    if channel.kind in (Kind.GRADIENT, Kind.WEIGHT):
        return DOUBLE * max(tie.numel for tie in plan.graph.ties if tie.name == channel.edge)
    if channel.kind is Kind.TARGET:
        target = plan.spec.target(channel.receiver)
        return 0 if target is None else math.prod(target.shape) * target.dtype.itemsize
    if channel.sender == INPUT:
        parts = list(plan.spec.parents.values())
    else:
        parts = [plan.shapes[_parent(channel)]]
    return max(math.prod(shape) * dtype.itemsize for shape, dtype in parts)


def sent_bytes(plan: Plan, channel: Channel) -> int:
    """Return the bytes of a signal's payload on its way; a micro-batch has its part of them."""
    if channel.codec is None:
        whole = exact_bytes(plan, channel)
    else:
        shape = next(iter(plan.spec.parents.values()))[0]
        if channel.sender != INPUT:
            shape = plan.shapes[_parent(channel)][0]
        whole = channel.codec.nbytes(shape[0])
    parts = plan.knobs.microbatches
    if channel.kind in (Kind.STATE, Kind.MESSAGE) and isinstance(parts, int):
        return -(-whole // parts)
    return whole


def _parent(channel: Channel) -> str:
    return channel.sender if channel.kind is Kind.STATE else channel.receiver


RAGGED = 2**28
REST = 4096  # what else a packet may hold; encryption adds 33 bytes


def message_bytes(plan: Plan, channel: Channel) -> int:
    """Return the most bytes of one message on `channel`.

    That is B signals in a bundle, each a header and TIMES the bytes that the plan states; or
    RAGGED, where samples have lengths of their own.
    """
    payload = TIMES * exact_bytes(plan, channel)
    if plan.one_length is None:
        payload = max(payload, RAGGED)
    return channel.bundle * (MAX_HEADER + payload) + REST


def slot_bytes(plan: Plan, channel: Channel) -> int:
    """Return the bytes of a signal between two blocks, by the plan.

    A message has the wider type of the two blocks, and includes the state that it brings along
    (memory 'reversible').
    """
    shape, dtype = plan.shapes[channel.sender]
    if channel.kind is Kind.STATE:
        return math.prod(shape) * dtype.itemsize
    shape, state_dtype = plan.shapes[channel.receiver]
    brings = 2 if channel.receiver in plan.reversible else 1
    return math.prod(shape) * max(state_dtype.itemsize, dtype.itemsize) * brings


# -- the network as plain data, for events and pictures --------------------------------------------


def network_of(plan: Plan, actors: Sequence[NetworkActor]) -> PlacedNetwork:
    """Return the network of `plan`, whose blocks live in `actors`."""
    graph = plan.graph
    lags = {name: plan.delay(name) for name in graph.blocks}
    learned = graph.parameters()
    network = as_network(
        graph.blocks, learned, graph.edges, graph.depths, plan.shapes, lags, actors
    )
    return replace(network, staleness=plan.staleness)


# -- delays that follow from links, which are measured once the actors are there -------------------


def with_delays(plan: Plan, delays: Mapping[str, int]) -> Plan:
    """Return `plan` with other ticks by edge, unchecked: for its time, not to be run."""
    graph, knobs, old = delayed(plan.graph, delays), plan.knobs, plan.channels
    carries = getattr(plan.schedule, "carries", False)
    schedule = make_schedule(graph, knobs, plan.silent, carries=carries)
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
    alone = {"bundle": "off"} if settings.engine.bundle == "auto" else {}
    planned = settings.changed(engine=alone)

    def replan(delays: Mapping[str, int]) -> Plan:
        changed, level = delayed(graph, delays), plan.knobs.own
        new = make_plan(changed, planned, plan.spec, phi=phi, optimizer=optimizer, level=level)
        return dataclasses.replace(new, run=plan.run, snapshot_policy=plan.snapshot_policy)

    return dataclasses.replace(plan, replan=replan)
