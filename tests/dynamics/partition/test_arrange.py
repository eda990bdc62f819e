"""Delays by the name of an edge: hand-written graphs."""

from __future__ import annotations

import pytest
from dynamics.helpers import bare, bare_chain, mlp, noise, relative, samples, settings, sgd

from hamdist.config import read_settings
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.partition.apply_settings import delayed
from hamdist.errors import GraphError, SettingsError
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable


def delays(graph):
    return {e.name: e.delay for e in graph.edges}


def test_names_go_before_patterns():
    graph = delayed(bare_chain(4), {"b*->*": 2, "b0->b1": 3})
    assert delays(graph) == {"u->b0": 1, "b0->b1": 3, "b1->b2": 2, "b2->b3": 2}
    graph = delayed(bare_chain(4), {"b1->*": 4, "*->b[23]": 5, "u->*": 6})
    assert delays(graph) == {"u->b0": 6, "b0->b1": 1, "b1->b2": 4, "b2->b3": 5}


def test_what_is_not_named_stays():
    graph = delayed(bare("a: u", "b: a+4", "c: b a+2"), {"b->c": 3})
    assert delays(graph) == {"u->a": 1, "a->b": 4, "b->c": 3, "a->c": 2}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"b0->b9": 2}, r"partition\.delays\.b0->b9: no such edge; known: u->b0, b0->b1, b1->b2"),
        ({"b1->b0": 2}, "b1->b0: no such edge"),
        ({"x*": 2}, r"x\*: no such edge"),
        ({"b*": 2, "b0*": 3}, r"delays\.b0\*: every edge that it fits \(b0->b1\) is taken"),
    ],
)
def test_an_edge_that_does_not_exist(given, match):
    with pytest.raises(GraphError, match=match):
        delayed(bare_chain(3), given)


def test_in_a_run():
    """Still SGD at level `backprop`; the result names the delays."""
    items = samples(20, 4, 5, 3)
    partition = {"delay": 2, "delays": {"block1->block2": 5}}
    config = settings("backprop", loss="mse", partition=partition, learning={"lr": 0.05})
    result = train(mlp([5, 7, 6, 3]), from_iterable(items), config)
    assert result.delays == {"block0->block1": 2, "block1->block2": 5}
    assert result.ticks == 20 * (2 * 7 + 1) + 7 + 1  # D = 7: the end passes the readout last
    expected = sgd(mlp([5, 7, 6, 3]), items, mse, lr=0.05)
    assert relative(result.model.parameters(), expected.parameters()) <= 1e-12
    config = settings("backprop", loss="mse", partition={"delays": {"block1->block9": 5}})
    with pytest.raises(GraphError, match="block1->block9: no such edge"):
        train(mlp([5, 7, 6, 3]), from_iterable(items), config)


def test_a_sliced_block_stands_for_its_slices():
    given = {"block0->block1": 3, "block0_1->block1": 4}
    partition = {"slices": {"block0": 2}, "delays": given}
    config = settings("trace", loss="mse", partition=partition)
    result = train(mlp([5, 7, 3]), from_iterable([(noise(0, 4, 5), noise(1, 4, 3))]), config)
    assert result.delays == {"block0_0->block1": 3, "block0_1->block1": 4}


@pytest.mark.parametrize("text", ["{a->b: 0}", "{a->b: -1}", "{a->b: 1.5}", "3", "some"])
def test_settings_that_are_wrong(text):
    with pytest.raises(SettingsError, match=r"partition\.delays"):
        read_settings(f"partition: {{delays: {text}}}", "here")


def test_auto_in_one_process_is_one():
    items = samples(5, 4, 5, 3)
    partition = {"delay": 3, "delays": "auto"}
    config = settings("trace", loss="mse", partition=partition, engine={"link_delay": 0.01})
    with pytest.warns(UserWarning, match=r"(partition\.delays|engine\.link_delay)") as said:
        result = train(mlp([5, 7, 3]), from_iterable(items), config)
    assert result.delays == {"block0->block1": 1}
    assert len(said) == 2
