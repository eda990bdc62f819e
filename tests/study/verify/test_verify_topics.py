"""The topics of `hamdist verify`: they pass, and a defect in what they check turns them red."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from itertools import islice

import pytest
import torch

from hamdist.config import EngineKind, EngineSettings, Settings
from hamdist.dynamics.blocks.hold import HoldBlock
from hamdist.dynamics.blocks.pulse import PulseBlock
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.updates.weights import Weights
from hamdist.runtime.train.train import train
from hamdist.study.verify.oracles import golden
from hamdist.study.verify.oracles import tick_golden as hamilton
from hamdist.study.verify.oracles.check import Difference
from hamdist.study.verify.oracles.networks import Draws, chain
from hamdist.study.verify.topics import backpropagation, delay_free, digraphs, engines

TOPICS = {
    "hamilton": hamilton,
    "backpropagation": backpropagation,
    "delay-free": delay_free,
    "digraphs": digraphs,
}


def failed(topic, most=None, word=""):
    """The names of the checks that fail, of the first `most` that have the word in their name."""
    names = []
    named = (check for check in TOPICS[topic].checks(False) if word in check.name)
    for check in islice(named, most):
        found = check.measure()
        difference = found.difference if isinstance(found, Difference) else found
        if not difference <= check.bound:
            names.append(check.name)
    return names


SLOW = {"backpropagation"}  # (tests/dynamics have its cases)


@pytest.mark.parametrize(
    "topic", [pytest.param(t, marks=[pytest.mark.slow] * (t in SLOW)) for t in TOPICS]
)
def test_it_passes(topic):
    assert failed(topic) == []


def test_a_wrong_step_of_the_weights_is_found(monkeypatch):
    """However the weights move: by `move`, or as soon as a gradient is made."""
    right, right_rates = Weights._move_theta, Weights.at_once

    def at_once(self, scale, tau):
        found = right_rates(self, scale, tau)
        return found and replace(found, rates=tuple(rate * (1 + 1e-7) for rate in found.rates))

    monkeypatch.setattr(Weights, "_move_theta", lambda self, step: right(self, step * (1 + 1e-7)))
    monkeypatch.setattr(Weights, "at_once", at_once)
    assert len(failed("hamilton", 4)) == 4
    assert len(failed("backpropagation", 2)) == 2


def test_a_wrong_message_is_found(monkeypatch):
    right = PulseBlock.backward

    def backward(self, sample, messages):
        first, *others = right(self, sample, messages)
        return [first, *(m if m is None else m * (1 + 1e-7) for m in others)]

    monkeypatch.setattr(PulseBlock, "backward", backward)
    assert failed("backpropagation", word="one layer a block") == []  # (no second message)
    assert failed("backpropagation", word="two skips") == [
        f"two skips, two readouts, {how}: losses and weights of 60 steps"
        for how in ("plain", "momentum, tau = 0.25")
    ] + ["3 micro-batches of 4 rows, two skips, two readouts: losses and weights of 60 steps"]


def test_a_costate_that_leaks_is_found(monkeypatch):
    right = HoldBlock.complete

    def complete(self, messages):
        right(self, messages)
        self.z = self.z * (1 - 1e-7)

    monkeypatch.setattr(HoldBlock, "complete", complete)
    assert len(failed("hamilton", 4)) == 4
    assert len(failed("digraphs", 1)) == 1


def test_a_layer_that_moves_at_the_wrong_time_is_found(monkeypatch):
    monkeypatch.setattr(HoldSchedule, "moves", lambda self, block, tick: True)
    assert len(failed("delay-free", 2)) == 2


# -- engines ---------------------------------------------------------------------------------------


def result():
    settings = Settings.model_validate({"level": "trace", "dtype": "float64"})
    return train(chain(depth=2), Draws(4), settings)


def test_equal_runs_differ_by_nothing():
    assert engines.difference(result(), result()) == Difference(0.0, "")


def test_the_largest_difference_between_two_runs():
    a, b = result(), result()
    b.blocks["block0"].theta["0.bias"][0] += 1e-15
    b.blocks["block1"].omega["2.bias"][1] += 1e-9
    found = engines.difference(a, b)
    assert found.where == "omega block1.2.bias"
    assert found.difference == pytest.approx(1e-9)


def test_runs_of_which_one_has_more():
    a, b = result(), result()
    b.blocks["more"] = b.blocks["block0"]
    assert engines.difference(a, b).difference == float("inf")
    b = result()
    b.blocks["block0"] = dataclasses.replace(b.blocks["block0"], updates=3)
    assert engines.difference(a, b) == Difference(1.0, "updates of block0")
    b = result()
    b.blocks["block0"].theta["0.bias"].resize_(3)
    assert engines.difference(a, b).difference == float("inf")
    b = result()
    b.blocks["block0"].theta["0.bias"][0] = torch.nan
    assert not engines.difference(a, b).difference <= 0


@pytest.mark.slow
@pytest.mark.ray
def test_every_level_on_ray(session):
    found = {check.name: check.measure() for check in engines.checks(False)}
    assert len(found) == len(engines.RUNS)
    assert {name: f for name, f in found.items() if f.difference} == {}


@pytest.mark.slow
@pytest.mark.ray
def test_golden_files_on_ray(session):
    """A few that begin at rest, as a run does."""
    left = 3
    engine = EngineSettings(kind=EngineKind.RAY, actors=2)
    for path in golden.files(golden.shipped()):
        data = golden.read(path)
        ticks = hamilton.read_ticks(data) if golden.kind_of(data) == "tick" else None
        if ticks is None or not at_rest(ticks) or not left:
            continue
        graph, _, stream, settings = hamilton._planned(ticks)
        records = train(graph, stream, settings.model_copy(update={"engine": engine})).records
        found = hamilton.compared(hamilton.recorded(ticks, records), hamilton.expected(ticks))
        assert found.difference <= golden.RTOL, path.name
        left -= 1
    assert not left


def at_rest(ticks):
    """Whether h, z and omega begin at zero, and settings can say how the blocks move."""
    starts = [key for key in ticks.data if key.partition(".")[0] in ("h", "z", "om")]
    return "mask_node" not in ticks.data and not any(ticks.data[key][0].any() for key in starts)
