"""Measurements of a run that goes on: its network, samples of its processes, and a trace of its
ticks, for Perfetto and Chrome (chrome://tracing).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple


class Norms(NamedTuple):
    """Euclidean norms of a block's tensors, and its dead units; None where it has no such tensor.

    Attributes:
        h: of the state; z: of its costate.
        omega: of all weight costates together; theta: of all weights together.
        update: of the latest update of the weights that was watched; None before the first.
        dead: share of the numbers of the state that are 0 in every row of the latest sample.
    """

    h: float | None
    z: float | None
    omega: float
    theta: float
    update: float | None = None
    dead: float | None = None


class Alignment(NamedTuple):
    """By block, the cosine between its update by a sample and the gradient of backpropagation.

    Blocks that did not move have none. feedback: between the matrices through which its rule sends
    messages and its weights, where it has such matrices. The terms: engines/update_probe.py.
    """

    sample: int
    cosines: Mapping[str, float]
    feedback: Mapping[str, float]


class Histogram(NamedTuple):
    """Counts of numbers in each of the equal bins between `low` and `high`."""

    low: float
    high: float
    counts: Sequence[int]

    @property
    def edges(self) -> list[float]:
        """Return the edges of the bins, one more than there are bins."""
        bins = len(self.counts)
        return [self.low + (self.high - self.low) * k / bins for k in range(bins + 1)]


@dataclass(frozen=True, slots=True)
class EdgeCounts:
    """Counts of one edge, in both directions together.

    Attributes:
        bytes: payload bytes that were sent.
        queued: signals that were sent and that their receiver has not taken yet.
        waited: seconds in which a process was blocked by this edge, for signals or for room.
    """

    bytes: int = 0
    queued: int = 0
    waited: float = 0.0

    def __add__(self, other: EdgeCounts) -> EdgeCounts:
        queued = self.queued + other.queued
        return EdgeCounts(self.bytes + other.bytes, queued, self.waited + other.waited)


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """Measurements of one process, between two steps.

    Attributes:
        seconds: as `RunFacts.time_use`.
        memory: resident bytes.
        norms: by block; steps: seconds in its steps, by block.
        edges: by edge. `queued` counts what was sent here minus what was taken here: the sum over
            all processes is the number under way.
        stream: counts of the stream, where it is drawn here.
        histograms: by block and kind of tensor, with `metrics.histograms`.
        staleness: by block (of presentation 'pulse'), how many samples came back after so many
            updates of its weights, since the process began.
        probes: with `metrics.alignment`, those that came since the sample before.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: int = 0
    norms: Mapping[str, Norms] = field(default_factory=dict)
    steps: Mapping[str, float] = field(default_factory=dict)
    edges: Mapping[str, EdgeCounts] = field(default_factory=dict)
    stream: Mapping[str, int] = field(default_factory=dict)
    histograms: Mapping[str, Mapping[str, Histogram]] = field(default_factory=dict)
    staleness: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    probes: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Replaced:
    """An actor that was lost and replaced.

    Attributes:
        tick: of its blocks, if it was known.
        since: the tick of the snapshot from which it resumed; seconds: until it ran again.
        replayed: signals that its neighbours had to send again (of actors that were lost together:
            with the first).
        fault: damage of a later snapshot, for which all went back to this one (empty: none).
        lost: False for those that were there, and only went back with the others.
    """

    actor: str
    blocks: list[str]
    tick: int | None
    since: int
    seconds: float
    replayed: int
    fault: str = ""
    lost: bool = True


def summed(samples: Sequence[ProcessSample]) -> dict[str, EdgeCounts]:
    """Return the counts by edge of all processes of a run together.

    The processes are not sampled at the same instant: a signal that is taken meanwhile counts as
    not under way.
    """
    edges: dict[str, EdgeCounts] = {}
    for sample in samples:
        for name, counts in sample.edges.items():
            edges[name] = edges.get(name, EdgeCounts()) + counts
    return {name: replace(edge, queued=max(0, edge.queued)) for name, edge in edges.items()}


# -- a trace of ticks ------------------------------------------------------------------------------


MICRO = 1e6  # microseconds a second


class TraceSpan(NamedTuple):
    """Something that took time in one process.

    Attributes:
        track: the block, or the stream.
        begin: seconds since 1970, by the clock of the host; seconds: how long.
        tick: of the node.
        flow: of a signal that left ('>ID') or was taken ('<ID'); empty else.
    """

    track: str
    name: str
    begin: float
    seconds: float
    tick: int
    flow: str = ""


def chrome_trace(trace: Mapping[str, Sequence[TraceSpan]]) -> str:
    """Return the spans by process as a trace-event file (JSON), with arrows for signals.

    Its times are from the first span on, whose own (seconds since 1970) is `otherData.begin`: as a
    double a microsecond of today has no digits behind it. Clocks of several hosts are not aligned.
    """
    first = min((s.begin for spans in trace.values() for s in spans), default=0.0)
    events: list[dict[str, Any]] = []
    left = {s.flow[1:] for spans in trace.values() for s in spans if s.flow[:1] == ">"}
    arrived = {s.flow[1:] for spans in trace.values() for s in spans if s.flow[:1] == "<"}
    for pid, (process, spans) in enumerate(trace.items()):
        tracks = list(dict.fromkeys(span.track for span in spans))
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}})
        for tid, track in enumerate(tracks):
            name = {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid}
            events.append({**name, "args": {"name": track}})
        for span in spans:
            place = {"pid": pid, "tid": tracks.index(span.track)}
            events += _events(span._replace(begin=span.begin - first), place, left & arrived)
    other = {"displayTimeUnit": "ms", "otherData": {"begin": first}}
    return json.dumps({"traceEvents": events, **other})


def _events(span: TraceSpan, place: Mapping[str, int], flows: set[str]) -> Iterator[dict[str, Any]]:
    begin, duration = span.begin * MICRO, span.seconds * MICRO
    common = {"name": span.name, "cat": span.name.split()[0], "args": {"tick": span.tick}, **place}
    yield {"ph": "X", "ts": begin, "dur": duration, **common}
    if span.flow[1:] in flows:
        left = {"ph": "s", "ts": begin}  # (it may be taken before the sender's call returns)
        # (within the span that waits: at its end it is closed, and an arrow would have no target)
        flow = {"ph": "f", "bp": "e", "ts": begin + max(0.0, duration - 0.01)}
        arrow = left if span.flow[0] == ">" else flow
        yield {**arrow, "name": "signal", "cat": "signal", "id": span.flow[1:], **place}
