"""Which actor hosts which block. Oracles: hand-written tables; for the choice by costs every cut
there is, and its time a sample by the formula of placement.py, written down once more."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from torch import nn

from hamdist.config import EngineSettings
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.partition.cuts import balanced
from hamdist.errors import SettingsError
from hamdist.runtime.placement.assign_blocks import FINEST, WORTH, Costs, choose, place, split


def graph(*widths):
    """A chain of blocks b0, b1, ... with width^2 weights each."""
    blocks = []
    for i, width in enumerate(widths):
        parent = "u" if i == 0 else f"b{i - 1}"
        loss = mse if i == len(widths) - 1 else None
        blocks.append(BlockSpec(f"b{i}", nn.Linear(width, width, bias=False), (parent,), loss=loss))
    return Graph(blocks)


def chain(*seconds, exchange=0, in_flight=math.inf):
    """Costs of a chain of blocks whose neighbours exchange signals for `exchange` seconds."""
    edges = tuple((i, i + 1, exchange) for i in range(len(seconds) - 1))
    return Costs(seconds, edges, in_flight)


def time_of(costs, starts):
    """T = max(busiest actor, sum over actors / in flight): an actor is busy with its blocks, and
    with every exchange of which it hosts one end."""
    owner = [sum(start <= i for start in starts) - 1 for i in range(len(costs.seconds))]
    busy = [0] * len(starts)
    for block, seconds in enumerate(costs.seconds):
        busy[owner[block]] += seconds
    for i, j, seconds in costs.crossings:
        if owner[i] != owner[j]:
            busy[owner[i]] += seconds
            busy[owner[j]] += seconds
    return max(max(busy), sum(busy) / costs.in_flight)


def every_cut(blocks, parts):
    return ([0, *cuts] for cuts in itertools.combinations(range(1, blocks), parts - 1))


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_is_better(seed):
    """Random costs in whole numbers, with skips, at schedules from one sample at a time on."""
    draw = random.Random(seed)
    n = draw.randint(2, 7)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    skips = draw.sample(pairs, k=draw.randint(0, len(pairs)))
    costs = Costs(
        tuple(draw.randint(1, 30) for _ in range(n)),
        tuple((i, j, draw.randint(0, 12)) for i, j in skips),
        draw.choice([1.0, 1.5, 2.0, 3.0, math.inf]),
    )
    for parts in range(1, n + 1):
        least = min(time_of(costs, starts) for starts in every_cut(n, parts))
        assert time_of(costs, split(costs, parts)) == pytest.approx(least)
        assert costs.of(split(costs, parts)) == pytest.approx(least)


@pytest.mark.parametrize("parts", [1, 3, 20, 200])
def test_many_blocks_are_cut_as_well_as_their_joined_runs_allow(parts):
    """1,000 blocks: the busiest actor has at most two joined runs more than in the best cut."""
    draw = random.Random(parts)
    costs = chain(*(draw.random() for _ in range(1000)))
    starts, best = split(costs, parts), balanced(costs.seconds, parts)
    assert len(set(starts)) == parts
    room = 2 * (sum(costs.seconds) / FINEST + 1)
    assert time_of(costs, starts) <= time_of(costs, best) + room
    if parts > FINEST // 2:
        assert starts == best


@pytest.mark.parametrize("seed", range(40))
def test_a_further_actor_is_worth_it(seed):
    """The choice is as good as the best of all cuts, but for what a further actor has to bring."""
    draw = random.Random(seed)
    costs = chain(
        *(draw.randint(1, 30) for _ in range(6)),
        exchange=draw.randint(0, 10),
        in_flight=draw.choice([1.0, 3.0, math.inf]),
    )
    least = {
        parts: min(time_of(costs, starts) for starts in every_cut(6, parts))
        for parts in range(1, 5)
    }
    chosen = choose(costs, 4)
    assert len(chosen) <= 4
    assert time_of(costs, chosen) * (1 - WORTH) <= min(least.values()) + 1e-9
    for fewer in range(1, len(chosen)):
        assert time_of(costs, chosen) < (1 - WORTH) * least[fewer]


@pytest.mark.parametrize(
    ("costs", "most", "starts"),
    [
        (chain(9, 1, 1, 1), 2, [0, 1]),  # one slow block has an actor of its own,
        (chain(9, 1, 1, 1), 4, [0, 1]),  # and more actors would be no faster
        (chain(5, 5, 5, 5), 4, [0, 1, 2, 3]),
        (chain(5, 5, 5, 5), 1, [0]),
        (chain(1, 1, 1, 1, exchange=50), 4, [0]),  # many tiny blocks
        (chain(5, 5, 5, 5, exchange=6), 4, [0, 2]),  # 16 with two, 17 with four
        (chain(40, 40, 40, 40, exchange=1, in_flight=1), 4, [0]),  # one sample at a time
        (chain(40, 40, 40, 40, in_flight=2), 4, [0, 2]),  # two at a time: 160 / 2
        (Costs((10, 10, 10, 10), ((0, 3, 1), (1, 2, 20))), 2, [0, 1]),  # not between 1 and 2
    ],
)
def test_hand_made(costs, most, starts):
    assert choose(costs, most) == starts


@pytest.mark.parametrize(
    ("costs", "parts", "starts"),
    [
        (chain(9, 1, 1, 1), 3, [0, 1, 2]),
        (chain(3, 3, 3, 3, in_flight=1), 2, [0, 2]),  # every cut is as slow: the less busy actors
    ],
)
def test_as_many_as_asked_for(costs, parts, starts):
    found = split(costs, parts)
    assert time_of(costs, found) == time_of(costs, starts)
    assert max(costs.busy(a, b) for a, b in zip(found, [*found[1:], 4], strict=True)) == max(
        costs.busy(a, b) for a, b in zip(starts, [*starts[1:], 4], strict=True)
    )


@pytest.mark.parametrize(
    ("actors", "threads", "cpus", "expected"),
    [
        ("auto", 1, 2, [["b0"], ["b1", "b2", "b3"]]),
        ("auto", 1, 1, [["b0", "b1", "b2", "b3"]]),
        ("auto", 2, 3, [["b0", "b1", "b2", "b3"]]),
        (3, 1, 1, [["b0"], ["b1"], ["b2", "b3"]]),
    ],
)
def test_by_costs(actors, threads, cpus, expected):
    engine = EngineSettings(kind="ray", actors=actors, threads=threads)
    assert place(graph(2, 2, 2, 2), engine, cpus, chain(9, 4, 2, 2)) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((50, 50, 50, 51), [["b0", "b1"], ["b2", "b3"]]),  # as the parameters say, and best
        ((51, 51, 50, 1), [["b0", "b1"], ["b2", "b3"]]),  # 102, and 102 for the other cut
        ((52, 50, 49, 1), [["b0", "b1"], ["b2", "b3"]]),  # 102, 2 % more than [b0], [b1, b2, b3]
        ((60, 50, 39, 1), [["b0"], ["b1", "b2", "b3"]]),  # 110, 22 % more
    ],
)
def test_a_little_noise_moves_no_block(seconds, expected):
    assert (
        place(graph(2, 2, 2, 2), EngineSettings(kind="ray", actors=2), 2, chain(*seconds))
        == expected
    )


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
    assert place(graph(30, 10, 10, 10), EngineSettings(kind="ray", actors=actors), cpus) == expected


def test_explicit_placement_keeps_the_graphs_order():
    engine = EngineSettings(kind="ray", placement=(("b2", "b0"), ("b1",)))
    assert place(graph(2, 2, 2), engine, 1, chain(1, 1, 1)) == [["b0", "b2"], ["b1"]]


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
        place(graph(2, 2), EngineSettings(kind="ray", placement=placement), 4)


def test_more_actors_than_blocks():
    with pytest.raises(SettingsError, match="5 actors for 2 blocks"):
        place(graph(2, 2), EngineSettings(kind="ray", actors=5), 8)


def test_many_hosts():
    """64 blocks, at most 64 actors: this took 5 s, with 100 of each 37 s, with 200 minutes. No cut
    is better than an even share of the work, and the choice comes near it."""
    draw = random.Random(0)
    costs = chain(*(1 + draw.random() for _ in range(64)), exchange=0.01, in_flight=127)
    chosen = choose(costs, 64)
    even = sum(costs.seconds) / len(chosen)
    assert time_of(costs, chosen) < even + 2 * max(costs.seconds)
    assert 16 < len(chosen) <= 64
