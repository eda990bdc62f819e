"""Hand-written tables: which actor hosts which block."""

from __future__ import annotations

import pytest
from torch import nn

from hamdist.config import EngineSettings
from hamdist.dynamics.graph import BlockSpec, Graph
from hamdist.dynamics.losses import mse
from hamdist.errors import SettingsError
from hamdist.runtime.placement import place


def graph(*widths):
    """A chain of blocks b0, b1, ... with width^2 weights each."""
    blocks = []
    for i, width in enumerate(widths):
        parent = "u" if i == 0 else f"b{i - 1}"
        loss = mse if i == len(widths) - 1 else None
        blocks.append(BlockSpec(f"b{i}", nn.Linear(width, width, bias=False), (parent,), loss=loss))
    return Graph(blocks)


@pytest.mark.parametrize(
    ("actors", "cpus", "expected"),
    [
        ("auto", 2, [["b0"], ["b1", "b2", "b3"]]),
        ("auto", 1, [["b0", "b1", "b2", "b3"]]),
        ("auto", 64, [["b0"], ["b1"], ["b2"], ["b3"]]),
        (3, 1, [["b0"], ["b1"], ["b2", "b3"]]),
    ],
)
def test_neighbours_with_equal_weight(actors, cpus, expected):
    assert place(graph(30, 10, 10, 10), EngineSettings(actors=actors), cpus) == expected


def test_explicit_placement_keeps_the_graphs_order():
    engine = EngineSettings(placement=(("b2", "b0"), ("b1",)))
    assert place(graph(2, 2, 2), engine, 1) == [["b0", "b2"], ["b1"]]


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ((("b0",),), "no actor for b1"),
        ((("b0", "b1", "x"),), "unknown block 'x'"),
        ((("b0", "b1"), ("b0",)), "'b0' stands there twice"),
        ((("b0", "b1"), ()), "without blocks"),
    ],
)
def test_errors(placement, words):
    with pytest.raises(SettingsError, match=words):
        place(graph(2, 2), EngineSettings(placement=placement), 4)


def test_more_actors_than_blocks():
    with pytest.raises(SettingsError, match="5 actors for 2 blocks"):
        place(graph(2, 2), EngineSettings(actors=5), 8)
