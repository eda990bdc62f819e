"""Oracle: the in-process engine. Networks as people write them, cut into blocks, learn the same to
the last bit on Ray."""

from __future__ import annotations

import pytest
import torch
from dynamics.architectures import GPT, Config
from dynamics.tracing.test_any_network import NETWORKS, made
from runtime.engines.test_engines_equal import assert_equal
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import is_parametrized

import hamdist
from hamdist.streams import from_iterable

STEPS = 12


def run(name, engine, build=None, **fields):
    own, item, classes = NETWORKS[name]
    loss = {"kind": "cross-entropy", "angle": "mse"} if name == "two by two" else None
    items = [item(n) for n in range(STEPS)]
    return hamdist.train(
        made(build or own),
        from_iterable(items, classes=classes),
        loss=loss,
        engine=engine,
        dtype="float64",
        learning={"lr": 0.05},
        seed=4,
        **fields,
    )


def both(name, build=None, placement=None, **fields):
    """Two actors, which all tests here share."""
    where = {"actors": 2} if placement is None else {"placement": placement}
    alone = run(name, {"kind": "inprocess"}, build, **fields)
    spread = run(name, {"kind": "ray", **where}, build, **fields)
    assert alone.samples == STEPS
    assert_equal(alone, spread)
    return alone


@pytest.mark.ray
@pytest.mark.parametrize("level", [pytest.param("backprop", marks=pytest.mark.slow), "trace"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(session, leaves_no_socket, name, level):
    blocks = {"resnet": 5, "unet": 3, "gpt": 2}.get(name, 3)
    both(name, level=level, partition={"blocks": blocks})


@pytest.mark.ray
def test_cuts_inside_residual_branches_and_delays(session):
    cuts = ["layer1.0.conv2", "layer2.0.downsample", "layer3.0.bn2"]
    apart = [["block0", "block2"], ["block1", "block3"]]  # so that every edge crosses
    alone = both("resnet", placement=apart, level="trace", partition={"cuts": cuts, "delay": 2})
    assert alone.staleness == 12


@pytest.mark.ray
def test_parametrized_modules_travel(session):
    """torch itself refuses to pickle them."""

    def run(engine):
        torch.manual_seed(0)
        layers = (spectral_norm(nn.Linear(6, 8)), nn.Tanh(), weight_norm(nn.Linear(8, 3)))
        items = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(5)]
        model = nn.Sequential(*layers)
        return hamdist.train(model, items, level="trace", engine=engine, learning={"lr": 0.1})

    ray = run({"kind": "ray", "actors": 2})
    assert_equal(run({"kind": "inprocess"}), ray)
    assert is_parametrized(ray.model[0], "weight")


@pytest.mark.ray
def test_dropout_draws_the_same_masks(session):
    config = Config(attention_probs_dropout_prob=0.3)
    blocks = {"partition": {"blocks": 4}, "level": "trace"}
    dropped = both("gpt", lambda: GPT(config), **blocks)
    plain = run("gpt", {"kind": "inprocess"}, **blocks)
    assert dropped.windows != plain.windows
