"""Applies settings by name of blocks and edges, slices and delays, to a graph that was cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from hamdist.config import Memory, PartitionSettings
from hamdist.dynamics.graph.graph import Edge, Graph, ShapeMap
from hamdist.dynamics.graph.patterns import check_patterns, fitting
from hamdist.dynamics.schedule.levels import Locality
from hamdist.dynamics.slicing.slice_graph import sliced
from hamdist.errors import GraphError, LevelError


def arranged(
    graph: Graph,
    partition: PartitionSettings,
    knobs: Locality,
    u_shape: Sequence[int],
    u_dtype: torch.dtype,
    inputs: ShapeMap | None = None,
) -> Graph:
    """Return `graph` with its slices and its delays (those of `auto` are 1 until links are known).

    u_shape: of the stream's input, batch in front; inputs: of each, where there are several.
    Raises GraphError for a name or a pattern that fits nothing, and for a block that cannot be
    sliced; LevelError for slices with memory 'reversible'.
    """
    if partition.slices:
        names = list(graph.blocks)
        check_patterns("partition.slices", partition.slices, names, "block", GraphError)
        blocks = []
        for block in graph.blocks.values():
            pattern = fitting(block.name, partition.slices)
            slices = block.slices if pattern is None else partition.slices[pattern]
            blocks.append(replace(block, slices=slices))
        graph = graph.over(blocks)
    graph_in_slices = sliced(graph, u_shape, u_dtype, inputs)
    if graph_in_slices is not graph and knobs.memory is Memory.REVERSIBLE:
        raise LevelError(
            "slices with memory 'reversible': a slice knows its own neurons alone and cannot "
            "recompute what all of them read; use level 'backprop', or leave the slices out"
        )
    delays = partition.delays
    if isinstance(delays, str):
        delays = {e.name: 1 for e in graph_in_slices.edges if not e.from_input}
    return delayed(graph_in_slices, delays)


def delayed(graph: Graph, delays: Mapping[str, int]) -> Graph:
    """Return `graph` with the ticks that `delays` gives to edges by name or pattern.

    A name goes before the patterns, and those go in their order; a sliced block's name means each
    of its slices. Raises GraphError for a name or a pattern that fits no edge.
    """
    if not delays:
        return graph
    others = {e.name: _between_unsliced(graph, e) for e in graph.edges}
    check_patterns("partition.delays", delays, others, "edge", GraphError, others)
    patterns = {name: fitting(name, delays, *more) for name, more in others.items()}
    by_edge = {name: delays[pattern] for name, pattern in patterns.items() if pattern is not None}
    blocks = []
    for block in graph.blocks.values():
        by_parent = {e.parent: by_edge[e.name] for e in graph.into[block.name] if e.name in by_edge}
        blocks.append(replace(block, delays={**block.delays, **by_parent}))
    return graph.over(blocks)


def _between_unsliced(graph: Graph, edge: Edge) -> list[str]:
    """Return the name of an edge between the unsliced blocks, if they were sliced."""
    if graph.sliced is None:
        return []
    origin = graph.sliced.origin
    return [f"{origin.get(edge.parent, edge.parent)}->{origin[edge.child]}"]  # (from an input, too)
