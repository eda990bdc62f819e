"""Oracle: the in-process engine. A distributed run equals it to the last bit, at every level, for
every graph, however the blocks are spread over actors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from runtime.networks import (
    CLASSES,
    PortableStream,
    batches,
    chain,
    cycle_graph,
    skip_graph,
    stream,
)

from hamdist.config import Settings
from hamdist.runtime.process.threads import torch_threads
from hamdist.runtime.train.train import train
from hamdist.streams import Sample, from_iterable
from hamdist.study.report.digests_diff import partings

TICKS = 80
LEVELS = {
    "local": {"level": "local"},
    "local, c = 3": {"level": "local", "locality": {"speed": 3}},
    "local, last tick": {"level": "local", "locality": {"speed": "inf", "update": "last-tick"}},
    "local, simultaneous, lagging": {
        "level": "local",
        "locality": {"order": "simultaneous"},
        "dynamics": {"tau": 0.5, "c": 0.8, "eta": 0.3},
    },
    "local, sequential": {
        "level": "local",
        "locality": {"order": "sequential", "readout": "state"},
    },
    "local, sequential output net": {"level": "local", "locality": {"order": "sequential"}},
    "local, uneven, resets, energies": {
        "level": "local",
        "locality": {"speed": 8},
        "dynamics": {
            "tau": {"values": [0.5, 0.2, 0.4], "cycle": True},
            "c": 2.0,
            "phi": {"values": [1.0, 0.5], "cycle": True},
            "reset": {"h": "sample", "z": "sample", "omega": "sequence"},
            "blocks": {"*": {"eta": 0.1, "beta": {"*weight": 0.1, "*": 0.2}}},
            "weight_cost": 0.01,
        },
        "metrics": {"record": "trajectory", "record_every": 3},
    },
    "group": {"level": "group"},
    "delay-free": {"level": "delay-free"},
    "trace": {"level": "trace"},
    "trace, c = 2": {"level": "trace", "locality": {"speed": 2, "delay_power": 0.5}},
    "trace+weights": {"level": "trace", "locality": {"memory": "trace+weights"}},
    "trace, momentum": {"level": "trace", "learning": {"lr": 0.05, "momentum": 0.5}},
    "backprop": {"level": "backprop"},
    "pipeline": {"level": "pipeline", "locality": {"microbatches": 3}},
    "pipeline, clipped": {
        "level": "pipeline",
        "locality": {"microbatches": 3, "accumulate": 2},
        "learning": {"lr": 0.05, "momentum": 0.5, "clip": {"norm": 0.5, "of": "network"}},
    },
    "double-buffered": {
        "level": "trace",
        "locality": {"accumulate": 10, "double_buffered": True},
        "learning": {"lr": 0.05, "momentum": 0.5},
    },
}
PLACEMENTS = {
    "2 actors": {"actors": 2},
    "4 actors": {"actors": 4},
}
CYCLIC = {
    "local",
    "local, c = 3",
    "local, simultaneous, lagging",
    "local, sequential output net",
    "local, uneven, resets, energies",
    "group",
}
NO_STATE_READOUT = {"local, sequential"}


def settings(engine, items, **fields):
    if engine.get("kind") == "ray":  # (nothing is measured: test_measure.py has that)
        engine = {"balance": "parameters", **engine}
    engine = {"digests": True, **engine}
    return Settings.model_validate({"steps": items, "seed": 5, "engine": engine, **fields})


def both(model, source, engine, items, **fields):
    """The same run in one process and on Ray."""
    alone = train(model(), source(), settings({"kind": "inprocess"}, items, **fields))
    spread = train(model(), source(), settings({"kind": "ray", **engine}, items, **fields))
    return alone, spread


def assert_equal(alone, spread):
    if alone.digests and spread.digests:  # (they say where)
        assert partings(alone.digests, spread.digests) == []
    assert alone.blocks.keys() == spread.blocks.keys()
    for name, a in alone.blocks.items():
        b = spread.blocks[name]
        assert a.updates == b.updates, name
        for part in ("theta", "omega", "buffers"):
            left, right = getattr(a, part), getattr(b, part)
            assert left.keys() == right.keys()
            for key in left:
                assert torch.equal(left[key], right[key]), (name, part, key)
        for part in ("h", "z"):
            left, right = getattr(a, part), getattr(b, part)
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left, right), (name, part)
    assert alone.windows == spread.windows
    assert alone.records.keys() == spread.records.keys()
    for name, a in alone.records.items():
        for field in dataclasses.fields(a):
            left, right = getattr(a, field.name), getattr(spread.records[name], field.name)
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left.nan_to_num(), right.nan_to_num()), name
    assert alone.ticks == spread.ticks
    assert (alone.samples, alone.rows) == (spread.samples, spread.rows)
    assert alone.bytes_per_edge == spread.bytes_per_edge
    old, new = alone.model.state_dict(), spread.model.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


def learned(result, model):
    before = model().state_dict()
    after = result.model.state_dict()
    return any(not torch.equal(before[key], after[key]) for key in before)


def samples_for(level, graph_depth):
    """Samples that make about TICKS ticks."""
    c = {
        "local, c = 3": 3,
        "trace, c = 2": 2,
        "delay-free": graph_depth + 1,
        "local, uneven, resets, energies": 8,
    }.get(level, 1)
    if level in {"backprop", "local, last tick", "pipeline", "pipeline, clipped"}:
        c = 2 * graph_depth + 1
    return max(4, TICKS // c)


SPREAD = ("local", "trace", "pipeline")  # levels whose four actors are not slow tests


@pytest.mark.ray
@pytest.mark.parametrize(
    ("level", "placement"),
    [
        pytest.param(
            level,
            p,
            marks=[pytest.mark.slow] if p == "4 actors" and level not in SPREAD else [],
        )
        for level in LEVELS
        for p in PLACEMENTS
    ],
)
def test_chain(session, leaves_no_socket, level, placement):
    fields = LEVELS[level]
    if level == "group" and placement == "4 actors":
        fields = {**fields, "partition": {"blocks": 4}}
    items = samples_for(level, 4)
    alone, spread = both(
        chain, lambda: PortableStream(items), PLACEMENTS[placement], items, **fields
    )
    assert learned(alone, chain)
    assert_equal(alone, spread)


@pytest.mark.ray
@pytest.mark.parametrize("level", [x for x in LEVELS if x not in NO_STATE_READOUT])
def test_skip_graph_with_blocks_sharing_actors(session, leaves_no_socket, level):
    items = samples_for(level, 5)
    engine = {"placement": [["a", "d", "y"], ["b", "w"], ["c"]]}
    alone, spread = both(skip_graph, lambda: PortableStream(items), engine, items, **LEVELS[level])
    assert_equal(alone, spread)


@pytest.mark.ray
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param({"actors": 2}, marks=pytest.mark.slow),
        {"actors": 4},
        {"placement": [["a", "c"], ["b", "d"]]},
    ],
)
@pytest.mark.parametrize("level", sorted(CYCLIC))
def test_cycle_graph(session, leaves_no_socket, level, engine):
    items = samples_for(level, 3)
    alone, spread = both(cycle_graph, lambda: PortableStream(items), engine, items, **LEVELS[level])
    assert_equal(alone, spread)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("level", "engine"),
    [("trace", {"actors": 3}), ("pipeline", {"actors": 2, "interleave": 2})],
)
def test_uneven_last_batch_missing_targets_and_a_stream_of_the_driver(session, level, engine):
    """(the last batch has one row, for three micro-batches; blocks of one actor lie apart)"""

    def source():
        return stream(60, missing={0, 7, 8, 31}, last=1)

    with torch_threads(2):
        alone, spread = both(chain, source, engine, 60, **LEVELS[level])
        assert torch.get_num_threads() == 2  # (the driver's are its own)
    assert alone.samples == 60
    assert len(spread.placement) == engine["actors"]
    assert ("interleave" in engine) == (
        ["block0", "block1"] not in [p[:2] for p in spread.placement]
    )
    assert sum(w.samples for w in alone.windows["block4"]) == 56
    assert_equal(alone, spread)


@pytest.mark.ray
def test_missing_targets_at_a_held_level(session):
    alone, spread = both(
        chain, lambda: PortableStream(60, missing={0, 7, 8, 31}), {"actors": 2}, 60, level="local"
    )
    assert_equal(alone, spread)


@pytest.mark.ray
@pytest.mark.parametrize("level", ["local", "trace"])
def test_dropout_draws_the_same_masks(session, level):
    def model():
        return chain(dropout=0.3)

    alone, spread = both(model, lambda: PortableStream(80), {"actors": 3}, 80, level=level)
    assert_equal(alone, spread)


@pytest.mark.ray
@pytest.mark.parametrize("transport", ["ipc", "tcp"])  # (all others: shm)
@pytest.mark.parametrize("level", ["local", "backprop"])
def test_transports(session, leaves_no_socket, level, transport):
    engine = {"actors": 3, "transport": transport}
    alone, spread = both(chain, lambda: PortableStream(50), engine, 50, level=level)
    assert_equal(alone, spread)


@pytest.mark.ray
def test_edge_delays(session):
    fields = {"level": "trace", "partition": {"delay": 3}}
    alone, spread = both(chain, lambda: PortableStream(100), {"actors": 4}, 100, **fields)
    assert alone.staleness == 2 * 4 * 3
    assert_equal(alone, spread)


@pytest.mark.ray
@pytest.mark.parametrize(
    "engine",
    [
        {},
        pytest.param({"bundle": "off"}, marks=pytest.mark.slow),
        {"bundle": 2, "transport": "tcp"},
    ],
)
@pytest.mark.parametrize(
    "fields",
    [
        {"level": "trace", "locality": {"speed": 2}},
        {"level": "local"},
        {"level": "local", "locality": {"speed": 3}},
        {"level": "local", "locality": {"order": "sequential"}},
        {"level": "pipeline", "locality": {"microbatches": 4}},
    ],
    ids=["pulse, c = 2", "hold", "hold, c = 3", "hold, sequential", "micro-batches"],
)
def test_bundles(session, leaves_no_socket, fields, engine):
    """Delays of 5: up to five signals in one message, and ends that no bundle waits for."""
    fields = {**fields, "partition": {"delay": 5}}
    engine = {"placement": [["block0", "block3"], ["block1", "block4"], ["block2"]], **engine}
    alone, spread = both(chain, lambda: PortableStream(43), engine, 43, **fields)
    assert learned(alone, chain)
    assert_equal(alone, spread)


@pytest.mark.ray
def test_a_stream_that_ends_before_its_steps(session):
    alone, spread = both(chain, lambda: PortableStream(30), {"actors": 2}, 1000, level="trace")
    assert alone.samples == 30
    assert all(block.updates == 30 for block in alone.blocks.values())
    assert_equal(alone, spread)


def test_the_same_run_twice_is_the_same():
    first = train(chain(), PortableStream(50), settings({}, 50, level="trace"))
    again = train(chain(), PortableStream(50), settings({}, 50, level="trace"))
    assert_equal(first, again)


@pytest.mark.ray
def test_the_clock_of_the_stream(session):
    """Steps of integration, and the ends of sequences, come from the stream to every block."""

    def source():
        gaps = [0.5, 0.2, 0.4]
        times = [sum(gaps[i % 3] for i in range(n)) for n in range(60)]
        items = [
            Sample(u, y, end=n % 7 == 6, time=times[n]) for n, (u, y) in enumerate(batches(60))
        ]
        return from_iterable(items, classes=CLASSES)

    fields = {
        "level": "local",
        "dynamics": {
            "tau": "stamps",
            "c": 2.0,
            "beta": 0.1,
            "phi": 1.0,
            "eta": 0.3,
            "reset": {"h": "sequence", "z": "sequence", "omega": "sequence"},
        },
    }
    for model in (chain, cycle_graph):
        alone, spread = both(model, source, {"actors": 3}, 60, **fields)
        assert learned(alone, chain) if model is chain else True
        assert_equal(alone, spread)


def by_tick(k):
    """A scale of the loss that falls with time."""
    return 1.0 / (1 + 0.01 * k)


@pytest.mark.ray
@pytest.mark.parametrize("level", ["local", "backprop"])
def test_a_scale_of_the_loss_by_function(session, level):
    def run(engine):
        asked = settings(engine, 40, level=level)
        return train(chain(), PortableStream(40), asked, phi=by_tick)

    alone, spread = run({"kind": "inprocess"}), run({"kind": "ray", "actors": 2})
    assert_equal(alone, spread)
    listed = {"values": [by_tick(k) for k in range(60)]}
    named = settings({"kind": "inprocess"}, 40, level=level, dynamics={"phi": listed})
    assert_equal(alone, train(chain(), PortableStream(40), named))
