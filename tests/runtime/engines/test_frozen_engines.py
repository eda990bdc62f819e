"""Oracles: the in-process engine, and the run that was never stopped. Blocks that are frozen, with
nothing before them that learns, get no messages in either engine."""

from __future__ import annotations

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal, both
from runtime.engines.test_sequence_engines import PortableText, network
from runtime.engines.test_sequence_engines import settings as of_sequences
from runtime.networks import PortableStream
from runtime.ray_engine.test_recovery import Once, cut, driver, net  # noqa: F401
from runtime.ray_engine.test_recovery import both as through_a_loss
from runtime.snapshots.test_snapshots import goes_on, run_of

from hamdist.dynamics.graph.graph import Graph
from hamdist.runtime.train.train import train

ITEMS = 24
LEVELS = ["backprop", "trace", "local", "heads"]


def fine_tuned():
    """Five layers, the first, second and fourth of which are frozen."""
    model = net()
    for i in (0, 1, 3):
        model[i].requires_grad_(False)
    return model


def one_way(result):
    """The edges whose messages did not come, by what they carried."""
    return [result.bytes_per_edge[f"block{i}->block{i + 1}"] for i in range(4)]


@pytest.mark.parametrize("level", LEVELS)
def test_snapshots(level, tmp_path):
    run = run_of(fine_tuned, PortableStream, level=level, partition=cut())
    whole = goes_on(run, tmp_path, 7)
    n = ITEMS * 4 * 8 * 4  # 4 rows of 8 numbers of 4 bytes
    if level in ("backprop", "trace"):
        assert one_way(whole) == [n, n, 2 * n, 2 * n]


@pytest.mark.parametrize("truncation", [None, 3])
def test_sequences(truncation, tmp_path, monkeypatch):
    """A frozen cell before one that learns keeps no token, and what is learned does not change."""

    def run(engine, resume, **fields):
        graph = network("lstm")
        graph.blocks[next(iter(graph.blocks))].module.requires_grad_(False)
        chosen = of_sequences(engine, truncation=truncation, **fields)
        return train(graph, PortableText(words=False), chosen, resume=resume)

    found = goes_on(run, tmp_path, 8)
    monkeypatch.setattr(Graph, "silent", lambda graph: frozenset())
    expected = run({}, None)
    assert found.model.state_dict().keys() == expected.model.state_dict().keys()
    for key, value in found.model.state_dict().items():
        assert torch.equal(value, expected.model.state_dict()[key]), key
    first = next(iter(found.blocks))
    assert found.stored[first] == 0 < expected.stored[first]


@pytest.mark.ray
@pytest.mark.parametrize("level", LEVELS)
def test_two_engines(session, leaves_no_socket, level):
    spread = {"placement": [["block0", "block2", "block4"], ["block1", "block3"]]}
    alone, other = both(
        fine_tuned, lambda: PortableStream(ITEMS), spread, ITEMS, level=level, partition=cut()
    )
    assert_equal(alone, other)


@pytest.mark.ray
@pytest.mark.parametrize("where", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_killed_actor(session, driver, leaves_no_socket, tmp_path, where):  # noqa: F811
    odd = net((where, Once(31, tmp_path / "mark", "kill")))
    for i in (0, 1, 3):
        odd[i].requires_grad_(False)
    assert len(through_a_loss(tmp_path, odd).replaced) == 1
