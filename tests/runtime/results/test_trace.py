"""A trace of ticks: every step and signal of the schedule, and no other bits."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import hamdist
from hamdist.runtime.results.measured import TraceSpan, chrome_trace


def run(trace, **engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(4, 6, generator=generator) for _ in range(20)]
    return hamdist.train(
        model,
        [(u, u[:, :3].argmax(1)) for u in rows],
        level="trace",
        partition={"blocks": 3},
        learning={"lr": 0.1},
        metrics={} if trace is None else {"trace": trace},
        engine=engine,
    )


NUMBER, TEXT, PLACE = {"type": "number", "minimum": 0}, {"type": "string"}, {"type": "integer"}
PLACED = {"name": TEXT, "cat": TEXT, "ts": NUMBER, "pid": PLACE, "tid": PLACE}


def of_phase(phase, required=(), **more):
    fields = {"ph": {"const": phase}, **PLACED, **more}
    names = ["ph", *PLACED, *required]
    return {"properties": fields, "required": names, "additionalProperties": False}


# Of "Trace Event Format" (Nduca and Sinclair, Google 2016): the object format, and of its phases
# complete events, metadata, and both ends of flows; `bp: e` binds an end to the enclosing slice.
SCHEMA = {
    "properties": {
        "traceEvents": {"type": "array", "items": {"oneOf": [
            of_phase("X", ["dur"], dur=NUMBER, args={"type": "object"}),
            of_phase("s", ["id"], id=TEXT),
            of_phase("f", ["id", "bp"], id=TEXT, bp={"const": "e"}),
            {"properties": {"ph": {"const": "M"}, "name": {"enum": ["process_name", "thread_name"]},
                            "pid": PLACE, "tid": PLACE,
                            "args": {"properties": {"name": TEXT}, "required": ["name"]}},
             "required": ["ph", "name", "pid", "args"], "additionalProperties": False},
        ]}},
        "displayTimeUnit": {"enum": ["ms", "ns"]},
        "otherData": {"type": "object"},
    },
    "required": ["traceEvents"], "additionalProperties": False,
}  # fmt: skip


def check_file(trace):
    """The schema of the format, both ends of every arrow, and slices that they can be bound to."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    written = json.loads(chrome_trace(trace))
    jsonschema.Draft202012Validator(SCHEMA).validate(written)
    events = written["traceEvents"]
    slices = {}
    for e in events:
        if e["ph"] == "X":
            slices.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    for e in events:
        if e["ph"] in "sf":
            around = [a <= e["ts"] < b for a, b in slices[e["pid"], e["tid"]]]
            assert any(around), e
    starts, ends = ({e["id"]: e for e in events if e["ph"] == kind} for kind in "sf")
    assert starts.keys() == ends.keys()
    assert all(starts[one]["ts"] <= ends[one]["ts"] for one in starts)
    return events, starts


def test_a_trace_in_one_process():
    """Level trace, 3 blocks, 20 samples: by the schedule's table 20 forwards of block0 and block1,
    20 reads of the readout, 20 backwards; 4 signals a sample and edge pair, 20 targets."""
    plain, traced = run(None, kind="inprocess"), run(1000, kind="inprocess")
    for a, b in zip(plain.model.parameters(), traced.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert plain.trace == {"driver": []}
    [spans] = traced.trace.values()
    count = lambda track, name: sum((s.track, s.name) == (track, name) for s in spans)  # noqa: E731
    for block in ("block0", "block1"):
        assert count(block, "forward") == count(block, "backward") == count(block, "update") == 20
    assert count("block2", "forward, loss and backward") == 20
    assert count("u", "draw") == 21  # and the end
    events, flows = check_file(traced.trace)
    states = [e for e in events if e["ph"] == "X" and e["name"].startswith("send state on edge b")]
    assert len(states) == 2 * 21  # two edges, and the end of the stream
    assert len(flows) >= 20 * 6


def test_only_the_last_ticks_are_kept():
    [spans] = run(5, kind="inprocess").trace.values()
    newest = max(span.tick for span in spans)
    assert len(spans) > 0
    assert min(span.tick for span in spans) >= newest - 5 - 4  # (nodes differ by up to 4 ticks)


@pytest.mark.ray
def test_a_trace_of_two_actors(session):
    result = run(1000, kind="ray", actors=2)
    assert [name for name, spans in result.trace.items() if spans] == ["actor 0", "actor 1"]
    events, flows = check_file(result.trace)
    pids = {e["pid"] for e in events if e["ph"] == "f" and e["id"] in flows}
    assert pids == {0, 1}  # arrows arrive at both


def test_names_of_tracks():
    spans = [TraceSpan("a", "forward", 1.0, 0.5, 3), TraceSpan("b", "send x", 2.0, 0.0, 3, ">1")]
    events = json.loads(chrome_trace({"driver": spans}))["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["driver", "a", "b"]
    assert [(e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [(0.0, 5e5), (1e6, 0.0)]
