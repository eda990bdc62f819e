"""Oracle of the rule eta_omega > 2K/c: the eigenvalues of the smallest tracker, linearised.

One neuron x with a bias w at h = 0: x' = c(w - x), w' = -beta P, p' = phi x - (c + eta_z) p,
P' = r_w w + c p - eta_omega P, by Euler's rule (NILP; equations.md).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dynamics.helpers import F64, layer, linear, samples, settings
from torch import nn

from hamdist.dynamics.blocks.dissipation import dissipation_warnings, least_dissipation
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.schedule.levels import make_locality
from hamdist.dynamics.updates.constants import make_dynamics
from hamdist.errors import DivergedError
from hamdist.models.tracker import tracker
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable

PHI, COST, BETA = 100.0, 1.0, 10.0


def grows(eta_z, eta_omega, c, tau):
    """Whether the linear net swings up."""
    rates = [
        [-c, c, 0, 0],
        [0, 0, 0, -BETA],
        [PHI, 0, -c - eta_z, 0],
        [0, COST, c, -eta_omega],
    ]
    return abs(np.linalg.eigvals(np.eye(4) + tau * np.array(rates))).max() > 1


@pytest.mark.parametrize("c", [300.0, 1000.0, 3000.0])
@pytest.mark.parametrize("both", [True, False])
def test_rule(c, both):
    """Within 7 %, where the network is much faster than its weights; eta_z has no part in it."""
    least = least_dissipation(c, phi=PHI, beta=BETA, weight_cost=COST)
    assert least == pytest.approx(2 * 1010 / c)
    for eta, swings in ((0.0, True), (0.93 * least, True), (1.07 * least, False)):
        assert grows(eta if both else 0.0, eta, c, 1e-6) == swings


@pytest.mark.parametrize("eta_z", [0.0, 10.0, 100.0, 900.0])
def test_dissipation_of_z_alone_does_not_help(eta_z):
    assert grows(eta_z, 0.0, 300.0, 1e-6)


def test_gain():
    once = least_dissipation(300, phi=PHI, beta=BETA, weight_cost=0)
    assert least_dissipation(300, phi=PHI, beta=BETA, weight_cost=0, gain=3) == 9 * once


def warned(graph=None, **dynamics):
    given = {"tau": 1e-3, "c": 300, "phi": PHI, "beta": BETA, "weight_cost": COST, **dynamics}
    own = settings("local", locality={"readout": "state", "target": "current"}, dynamics=given)
    made = make_dynamics(own.dynamics, own.learning, make_locality(own.level, own.locality))
    graph = tracker(5, bias=True, seed=0, dtype=F64) if graph is None else graph
    return dissipation_warnings(graph, made)


def test_a_tracker_is_warned_of_with_rule_and_value():
    (text,) = warned(eta=2)
    assert "block 'x' lies on a cycle with eta_omega = 2 1/s, below 2K/c = 6.73 1/s" in text
    assert "use dynamics.eta above that" in text
    assert len(warned(eta_z=50, eta_omega=0)) == 1


@pytest.mark.parametrize(
    "dynamics",
    [
        {"eta": 10},
        {"eta_z": 0, "eta_omega": 10},
        {},  # eta_omega = 1/tau
        {"eta": 6.8},
        {"eta": 2, "c": 1000, "beta": 9.0},
        {"eta": 0, "beta": 0},
        {"eta": 2, "sign": 1},
    ],
)
def test_nothing_to_say(dynamics):
    assert warned(**dynamics) == []


def test_the_worst_block_is_named():
    graph = tracker(5, bias=True, seed=0, dtype=F64, blocks=5)
    (text,) = warned(graph, eta=10, blocks={"x1": {"c": 100}, "x3": {"c": 30}})
    assert "block 'x3' (and 1 more)" in text
    assert "67.3" in text
    (text,) = warned(graph, eta=10, blocks={"x2": {"beta": {"*bias": 30.0}}})
    assert "block 'x2' lies" in text


def test_a_graph_without_cycles_is_not_spoken_of():
    blocks = [
        BlockSpec("a", layer(3, 4, 0), ("u",)),
        BlockSpec("y", linear(4, 2, 1), ("a",), loss=mse, state=True),
    ]
    assert warned(Graph(blocks), eta=0) == []


def test_a_run_says_so_before_it_starts():
    block = BlockSpec("x", layer(5, 2, 0), ("u", "x"), shape=(2,), loss=mse, state=True)
    constants = {"tau": 0.1, "c": 5, "eta": 0.1, "phi": 1, "beta": 1}
    own = settings("local", locality={"readout": "state", "target": "current"}, dynamics=constants)
    stream = from_iterable(samples(5, 2, 3, 2))
    with pytest.warns(UserWarning, match=r"'x' lies on a cycle.*below 2K/c = 0\.4 1/s"):
        result = train(Graph([block]), stream, own)
    assert any("2K/c = 0.4 1/s" in text for text in result.warnings)


def test_a_failed_run_keeps_the_warning():
    block = BlockSpec("x", nn.Sequential(linear(2, 2, 0)), ("x",), shape=(2,), loss=mse, state=True)
    constants = {"tau": 0.01, "c": 30, "eta": 0, "phi": 100, "beta": 10, "limit": 1e3}
    own = settings("local", locality={"readout": "state", "target": "current"}, dynamics=constants)
    items = [(torch.zeros(1, 1, dtype=F64), torch.full((1, 2), 0.5, dtype=F64))] * 4000
    with (
        pytest.warns(UserWarning, match="below 2K/c"),
        pytest.raises(DivergedError) as caught,
    ):
        train(Graph([block]), from_iterable(items), own)
    told = caught.value.result.warnings
    assert sum(text.startswith("block 'x' lies on a cycle") for text in told) == 1
