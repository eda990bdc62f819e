"""The network of a plan as plain data, for events and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hamdist.display.network import NetworkActor, PlacedNetwork
from hamdist.dynamics.graph.spec import as_network
from hamdist.runtime.plan.plan import Plan


def network_of(plan: Plan, actors: Sequence[NetworkActor]) -> PlacedNetwork:
    """Return the network of `plan`, whose blocks live in `actors`."""
    graph = plan.graph
    lags = {name: plan.delay(name) for name in graph.blocks}
    network = as_network(graph.blocks, graph.edges, graph.depths, plan.shapes, lags, actors)
    return replace(network, staleness=plan.staleness)
