"""The network of a plan as plain data, for events and pictures."""

from __future__ import annotations

from collections.abc import Sequence

from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.results.measured import NetworkActor, NetworkBlock, NetworkEdge, PlacedNetwork


def network_of(plan: Plan, actors: Sequence[NetworkActor]) -> PlacedNetwork:
    """Return the network of `plan`, whose blocks live in `actors`."""
    graph = plan.graph
    blocks = []
    for name, spec in graph.blocks.items():
        shape, dtype = plan.shapes[name]
        modules = [m for m in (spec.module, spec.output) if m is not None]
        numbers = sum(p.numel() for m in modules for p in m.parameters())
        place = graph.depths[name], plan.delay(name)
        kind = str(dtype).removeprefix("torch.")
        loss = spec.loss is not None
        blocks.append(NetworkBlock(name, tuple(shape), kind, numbers, *place, loss))
    edges = [NetworkEdge(e.name, e.parent, e.child, e.delay) for e in graph.edges]
    return PlacedNetwork(blocks, edges, list(actors), plan.staleness)
