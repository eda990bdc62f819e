"""A trace of ticks: what each process did when, for Perfetto and Chrome (chrome://tracing)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
