"""Oracles: the in-process engine, and the run that was never stopped. Weights that several blocks
use are the same to the last bit in both engines, on from every snapshot, and past lost actors."""

from __future__ import annotations

import pytest
import torch
from dynamics.graph.test_tied import CUTS, NETWORKS
from dynamics.tracing.test_any_network import made
from runtime.engines.test_engines_equal import assert_equal
from runtime.networks import FEATURES, PortableStream, seeded
from runtime.ray_engine.test_recovery import Once, driver  # noqa: F401
from runtime.ray_engine.test_recovery import both as through_a_loss
from runtime.snapshots.test_snapshots import ALONE, folders, goes_on
from torch import nn

import hamdist
from hamdist.runtime.storage.snapshot_files import latest
from hamdist.runtime.train.train import snapshot_model
from hamdist.streams import Withhold, from_iterable

ITEMS = 14


def run(name, engine=ALONE, resume=None, items=ITEMS, missing=0.0, **fields):
    build, item, classes = NETWORKS[name]
    source = from_iterable([item(n) for n in range(items)], classes=classes)
    given = {"learning": {"lr": 0.05}, "partition": {"cuts": CUTS[name]}, **fields}
    return hamdist.train(
        made(build),
        Withhold(source, missing, 1) if missing else source,
        engine=engine,
        dtype="float64",
        seed=4,
        resume=resume,
        **given,
    )


KNOBS = {
    "backprop": ("deep", {"level": "backprop"}),
    "trace": ("deep", {"level": "trace"}),
    "micro-batches": ("deep", {"level": "pipeline", "locality": {"microbatches": 2}}),
    "two samples a trip": ("gpt", {"level": "trace", "locality": {"speed": 2}}),
    "weights kept": ("chain", {"level": "trace", "locality": {"memory": "trace+weights"}}),
    "adam, averages": (
        "deep",
        {
            "level": "trace",
            "learning": {"lr": 0.01, "momentum": 0.8, "adaptive": {}, "average": 0.9},
        },
    ),
    "delays": ("deep", {"level": "trace", "partition": {"cuts": CUTS["deep"], "delay": 3}}),
    "side by side": ("siamese", {"level": "trace"}),
    "two outputs": ("two heads", {"level": "trace"}),
    "without targets": ("chain", {"level": "trace", "missing": 0.4}),
}


@pytest.mark.parametrize("name", KNOBS)
def test_snapshots(name, tmp_path):
    net, fields = KNOBS[name]

    def of(engine, resume, **kept):
        return run(net, engine, resume, **fields, **kept)

    whole = goes_on(of, tmp_path, 6)
    assert whole.weight_lags


def test_a_snapshot_is_a_model(tmp_path):
    """With the owner's weights, and averages, not the copies that lag behind."""
    learning = {"lr": 0.05, "average": 0.9}
    kept = {"path": str(tmp_path), "every": 5, "keep": 1000}
    fields = {"level": "trace", "learning": learning}
    run("deep", snapshots=kept, **fields)
    folder = folders(tmp_path)[-1]
    snapshot = latest(folder, print)
    build, item, classes = NETWORKS["deep"]
    spec = from_iterable([item(0)], classes=classes).spec
    chosen = hamdist.Settings.model_validate(snapshot.manifest.settings)
    model = snapshot_model(snapshot, made(build), spec, chosen)
    state = snapshot.state("block0")["node"]["block"]
    average = state["weights"]["average"]["_sum"][0]
    assert torch.equal(model.embed.weight, average)
    assert model.head.weight is model.embed.weight
    # Another cut of the same network takes them over.
    on = run("deep", resume=folder, **{**fields, "partition": {"cuts": ["layer"]}})
    assert on.model.head.weight is on.model.embed.weight


SPREAD = [
    ("backprop", {"actors": 2}),
    ("trace", {"actors": 2}),
    ("micro-batches", {"actors": 2}),
    ("adam, averages", {"actors": 3, "transport": "tcp"}),
    ("delays", {"actors": 2, "queue": 1}),
    ("side by side", {"placement": [["block1"], ["block0", "block2"]]}),
    ("side by side", {"placement": [["block0"], ["block1"], ["block2"]]}),
    ("two outputs", {"actors": 2}),
    ("without targets", {"actors": 2}),
]


@pytest.mark.ray
@pytest.mark.parametrize(("name", "engine"), SPREAD)
def test_two_engines(session, leaves_no_socket, name, engine):
    net, fields = KNOBS[name]
    alone, spread = run(net, **fields), run(net, {"kind": "ray", **engine}, **fields)
    assert_equal(alone, spread)
    assert alone.weight_lags == spread.weight_lags != {}


@pytest.mark.ray
@pytest.mark.parametrize(
    ("level", "where"),
    [*(pytest.param("trace", k, marks=pytest.mark.slow) for k in (0, 4)), ("backprop", 2)],
)
def test_a_killed_actor(session, driver, leaves_no_socket, tmp_path, level, where):  # noqa: F811
    """The owner's, a user's, and that of one between them."""

    def build():
        layers = []
        for i in range(5):
            layer = nn.Linear(FEATURES if i == 0 else 6, 3 if i == 4 else 6)
            odd = [Once(31, tmp_path / "mark", "kill")] if i == where else []
            layers.append(nn.Sequential(layer, *odd, nn.Tanh() if i < 4 else nn.Identity()))
        layers[2][0] = layers[0][0]
        layers[3][0].weight = layers[0][0].weight
        return nn.Sequential(*layers)

    result = through_a_loss(tmp_path, seeded(build), PortableStream, level=level)
    assert len(result.replaced) == 1
    assert len(result.weight_lags) == 2
