"""Codecs of the edges, as `engine.compress` and `engine.feedback` name them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from hamdist.config import Compress, EngineSettings, Feedback
from hamdist.dynamics.graph.graph import Edge, Graph, ShapeMap
from hamdist.dynamics.graph.patterns import check_patterns, fitting
from hamdist.dynamics.schedule.events import Kind
from hamdist.errors import SettingsError
from hamdist.runtime.signals.codec import Codec, Compressed, subspace_of
from hamdist.runtime.signals.signal import Channel, Channels

# By edge, then by direction: 'h' forward, 'm' backward.
CompressionMap = dict[str, dict[str, Compressed]]
FED_BACK = (Compress.INT8, Compress.INT4, Compress.TOPK)
DIRECTIONS = {Kind.STATE: "h", Kind.MESSAGE: "m"}


def compressed(
    channels: Channels,
    graph: Graph,
    signals: ShapeMap,
    engine: EngineSettings,
    reversible: Collection[str] = (),
    received: Mapping[int, torch.dtype] | None = None,
    seed: int = 0,
) -> Channels:
    """Return `channels` with the codecs that the settings give to the edges.

    One word for all edges means every edge between blocks. Signals of the stream are compressed
    only where a pattern fits their edge. Integers and targets are never compressed.

    Args:
        channels: of the whole graph.
        signals: shape and type of each block's state; the stream's input is `u`.
        engine: the settings.
        reversible: blocks whose child hands their state back, which has to be exact.
        received: by edge, the type in which its child takes it and answers, where another one.
        seed: of the run.

    Raises:
        SettingsError: an edge does not exist, carries integers and is named, lies behind a
            reversible block, or is to be in a subspace and is not.
    """
    words = _words(graph, engine)
    if not words:
        return channels

    def coded(channel: Channel, edge: Edge) -> Channel:
        word = words.get(edge.name, Compress.NONE)
        if word is Compress.NONE:
            return channel
        if word is Compress.CODEBOOK and channel.kind is Kind.MESSAGE:
            word = Compress.INT4  # (messages are no function of their tokens)
        shape, dtype = signals[edge.parent]
        if channel.kind is Kind.MESSAGE and received is not None:
            dtype = received.get(edge.index, dtype)
        fed_back = _feeds_back(engine.feedback, word, channel.kind)
        codec = Codec(word, dtype, shape[1:], fed_back, seed, engine.topk_share)
        subspace = None if edge.from_input else subspace_of(graph.blocks[edge.parent].module)
        if subspace is not None:
            codec = replace(codec, rank=subspace.rank, basis=subspace.seed)
        elif word is Compress.SUBSPACE:
            raise SettingsError(
                f"engine.compress: 'subspace' on {edge.name}, but block {edge.parent!r} does not "
                "end in a hamdist.Subspace; set model.subspace, put one behind its last layer, or "
                "set this edge to 'none'"
            )
        return channel._replace(codec=codec) if codec.pays else channel

    for edge in graph.edges:
        dtype, word = signals[edge.parent][1], words.get(edge.name, Compress.NONE)
        named = isinstance(engine.compress, dict) and edge.name in engine.compress
        if named and word is not Compress.NONE and not dtype.is_floating_point:
            raise SettingsError(
                f"engine.compress.{edge.name}: {word.value!r}, but this edge carries integers "
                f"({str(dtype).removeprefix('torch.')}), which have to be exact; leave it out, or "
                "set it to 'none'"
            )
        if edge.parent in reversible and word is not Compress.NONE:
            raise SettingsError(
                f"engine.compress: the child of {edge.name} hands the state of block "
                f"{edge.parent!r} back, which recomputes its input from it and needs it exact "
                "(memory 'reversible'); set this edge to 'none', or use level 'backprop'"
            )
    edges = {edge.index: edge for edge in graph.edges}
    return channels._replace(
        states={i: coded(c, edges[i]) for i, c in channels.states.items()},
        messages={i: coded(c, edges[i]) for i, c in channels.messages.items()},
    )


def _words(graph: Graph, engine: EngineSettings) -> Mapping[str, Compress]:
    """Return the code of each edge that has one, by the edge's name."""
    compress = engine.compress
    if isinstance(compress, Compress):
        if compress is Compress.NONE:
            return {}
        return {edge.name: compress for edge in graph.edges if not edge.from_input}
    names = [edge.name for edge in graph.edges]
    check_patterns("engine.compress", compress, names, "edge")
    words = {name: fitting(name, compress) for name in names}
    return {name: compress[pattern] for name, pattern in words.items() if pattern is not None}


def _feeds_back(feedback: Feedback, word: Compress, kind: Kind) -> bool:
    if word not in FED_BACK:
        return False
    kinds = {
        Feedback.OFF: (),
        Feedback.ON: (Kind.STATE, Kind.MESSAGE),
        Feedback.STATES: (Kind.STATE,),
        Feedback.MESSAGES: (Kind.MESSAGE,),
    }
    return kind in kinds[feedback]


def compression_warnings(channels: Channels, graph: Graph, engine: EngineSettings) -> list[str]:
    """Return a warning if the settings ask for compression and no edge is compressed."""
    words = set(_words(graph, engine).values()) if engine.compress is not Compress.NONE else set()
    compresses = engine.compress is not Compress.NONE and words != {Compress.NONE}
    if not compresses or any(channel.codec is not None for channel in channels.all()):
        return []
    only = "" if not all(e.from_input for e in graph.edges) else ": no edge joins two blocks"
    return [
        f"engine.compress compresses nothing{only}; integers, and rows too short for a scale, stay "
        "as they are, and edges from the stream do unless a pattern names them (u->*)"
    ]


def in_edge_order(done: CompressionMap, graph: Graph) -> CompressionMap:
    """Return `done` in the order of the graph's edges, forward before backward."""
    return {
        edge.name: {way: done[edge.name][way] for way in "hm" if way in done[edge.name]}
        for edge in graph.edges
        if edge.name in done
    }
