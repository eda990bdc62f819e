"""Oracle: the in-process engine. Every recipe of learning is the same on Ray, to the last bit."""

from __future__ import annotations

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal, both
from runtime.networks import PortableStream, chain, skip_graph

from hamdist.config.sections.optimizer import known_optimizers

AVERAGE = {"decay": 0.9, "every": 2}
OPTIMISERS = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adam": {"amsgrad": True},
    "adagrad": {"lr_decay": 0.1},
    "adafactor": {"weight_decay": 0.1},
    "lion": {},
}
RECIPES = {
    "heads": {"level": "heads", "learning": {"average": AVERAGE, "clip": 0.5}},
    "heads, c = 2": {
        "level": "heads",
        "locality": {"speed": 2},
        "learning": {"momentum": 0.5, "blocks": {"block1": {"heads": 0.5}}},
    },
    "trace, heads": {
        "level": "trace",
        "locality": {"compensation": ["delay-scaled", "look-ahead"]},
        "learning": {
            "heads": {"weight": 0.3},
            "momentum": 0.5,
            "average": 0.9,
            "decay": "cosine",
            "warmup": 20,
            "clip": 1.0,
            "inputs": {"rule": "whitened", "refresh": 10},
        },
    },
    "trace, inputs by autograd": {
        "level": "trace",
        "locality": {"memory": "trace+weights"},
        "learning": {
            "inputs": {"rule": "whitened", "refresh": 10},
            "adaptive": {},
            "lr": 0.01,
            "blocks": {"block1": {"inputs": {"rule": "rotated", "refresh": 10}}},
        },
    },
    "trace, rotated": {
        "level": "trace",
        "learning": {
            "inputs": {"rule": "rotated", "refresh": 10},
            "adaptive": {},
            "momentum": 0.5,
            "lr": 0.01,
            "blocks": {"block1": {"inputs": {"rule": "rotated", "sides": "inputs"}}},
        },
    },
    "trace, predicted": {
        "level": "trace",
        "locality": {"compensation": ["weight-prediction"]},
        "learning": {"momentum": 0.5, "course": {"values": [1, 0.5], "every": 30}},
    },
    **(
        {"trace, muon": {"level": "trace", "learning": {"optimizer": "muon", "lr": 0.01}}}
        if hasattr(torch.optim, "Muon")
        else {}
    ),
    "trace, adamw": {
        "level": "trace",
        "locality": {"delay_power": 0.5},
        "learning": {
            "optimizer": {
                "name": "adamw",
                "weight_decay": 0.1,
                "groups": {"vectors": {"weight_decay": 0, "lr": 3e-3}},
            },
            "lr": 0.01,
            "average": 0.9,
            "decay": "cosine",
            "clip": 1.0,
        },
    },
    "heads, rmsprop": {
        "level": "heads",
        "learning": {"optimizer": {"name": "rmsprop", "momentum": 0.5}, "lr": 0.01},
    },
    **{
        f"pipeline, {name}": {
            "level": "pipeline",
            "locality": {"microbatches": 3},
            "learning": {"optimizer": {"name": name, **options}, "lr": 0.01, "warmup": 5},
        }
        for name, options in OPTIMISERS.items()
        if name in known_optimizers()
    },
    "local": {
        "level": "local",
        "locality": {"speed": 9, "gate": 0.2, "compensation": ["prospective", "retrospective"]},
        "dynamics": {"c": 0.8},
        "learning": {"average": 0.9, "heads": None},
    },
}


@pytest.mark.ray
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_chain(session, leaves_no_socket, recipe):
    items = 25 if RECIPES[recipe]["level"] in ("local", "pipeline") else 80
    alone, spread = both(
        chain,
        lambda: PortableStream(items, missing={3, 7}),
        {"actors": 3},
        items,
        **RECIPES[recipe],
    )
    assert_equal(alone, spread)
    for name, a in alone.blocks.items():
        b = spread.blocks[name]
        assert a.average.keys() == b.average.keys()
        assert all(torch.equal(a.average[key], b.average[key]) for key in a.average)


@pytest.mark.ray
@pytest.mark.parametrize("engine", [{}, {"bundle": "off"}])
def test_labels_of_a_graph_with_skips_and_delays(session, leaves_no_socket, engine):
    """Labels wait with the states of their sample, in bundles too."""
    engine = {"placement": [["a", "d", "y"], ["b", "w"], ["c"]], **engine}
    fields = {"level": "heads", "partition": {}, "learning": {"heads": {"readout": "w"}}}
    alone, spread = both(skip_graph, lambda: PortableStream(60), engine, 60, **fields)
    assert_equal(alone, spread)
    assert any("=>" in edge for edge in alone.bytes_per_edge)
    delayed = {**fields, "partition": {"delays": {"a->c": 5, "c->d": 4}}}
    alone, spread = both(skip_graph, lambda: PortableStream(60), engine, 60, **delayed)
    assert_equal(alone, spread)
