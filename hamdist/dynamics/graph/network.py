"""A graph as plain data, for pictures and events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hamdist.display.network import NetworkActor, NetworkBlock, NetworkEdge, PlacedNetwork
from hamdist.dynamics.graph.spec import BlockSpec, Edge, ShapeMap


def as_network(
    blocks: Mapping[str, BlockSpec],
    edges: Sequence[Edge],
    depths: Mapping[str, int],
    shapes: ShapeMap,
    lags: Mapping[str, int],
    actors: Sequence[NetworkActor] = (),
) -> PlacedNetwork:
    """Return a network, with the shapes and the lags of messages of those blocks that have some."""
    described = []
    for name, spec in blocks.items():
        shape, dtype = shapes.get(name, ((), ""))
        modules = [m for m in (spec.module, spec.output) if m is not None]
        numbers = sum(p.numel() for m in modules for p in m.parameters())
        kind, loss = str(dtype).removeprefix("torch."), spec.loss is not None
        place = depths[name], lags.get(name)
        described.append(NetworkBlock(name, tuple(shape), kind, numbers, *place, loss))
    ends = [NetworkEdge(e.name, e.parent, e.child, e.delay) for e in edges]
    return PlacedNetwork(described, ends, list(actors))
