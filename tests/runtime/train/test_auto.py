"""Oracle: the rules of staleness.md as a table, and runs with the level named."""

from __future__ import annotations

import warnings

import pytest
import torch
from runtime.networks import PortableStream, chain, cycle_graph, stream
from torch import nn

import hamdist
from hamdist.config import Level, Settings, read_settings
from hamdist.dynamics.schedule.levels import make_locality
from hamdist.errors import ChoiceWarning, LevelError
from hamdist.runtime.train.choose_level import LevelFacts, inspect_stream, settings_at_level
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable
from hamdist.streams.replay import replays, samples_from

pytestmark = pytest.mark.filterwarnings("ignore::hamdist.errors.ChoiceWarning")


def pick(seen, **fields):
    made, why = settings_at_level(Settings.model_validate({"level": "auto", **fields}), seen)
    assert len(why) >= 1
    return made


@pytest.mark.parametrize(
    ("depth", "frames", "locality", "level"),
    [
        # S c >= 2.5 * 2D: local
        (4, 20.0, {}, "local"),
        (4, 19.9, {}, "trace"),
        (4, 10.0, {"speed": 2}, "local"),
        (4, 1.0, {}, "trace"),
        (9, 64.0, {}, "local"),
        (19, 64.0, {}, "trace"),
        (4, None, {}, "trace"),
        (0, 1.0, {}, "backprop"),
        (4, 1.0, {"speed": "inf"}, "backprop"),
        (4, 1.0, {"memory": "none"}, "heads"),
        (4, 20.0, {"memory": "none"}, "local"),
        (4, 20.0, {"memory": "trace"}, "trace"),
        (4, 20.0, {"memory": "trace+weights"}, "trace"),
        (4, 20.0, {"presentation": "pulse"}, "trace"),
        (4, 1.0, {"presentation": "hold"}, "local"),
        (4, 1.0, {"memory": "reversible"}, "reversible"),
        (4, 1.0, {"credit": "heads"}, "heads"),
    ],
)
def test_levels(depth, frames, locality, level):
    made = pick(LevelFacts(depth, 32, frames), locality=locality)
    assert made.level.value == level
    make_locality(made.level, made.locality)  # the knobs go together


def test_cycles_and_sequences():
    assert pick(LevelFacts(3, 4, 64.0, acyclic=False)).level is Level.LOCAL
    assert pick(LevelFacts(3, 4, 1.0, acyclic=False, ends=True)).level is Level.BPTT


@pytest.mark.parametrize(("depth", "power"), [(4, 0.25), (9, 0.38), (19, 0.5), (60, 0.5)])
def test_steps(depth, power):
    made = pick(LevelFacts(depth, 32, 1.0))
    assert make_locality(made.level, made.locality).delay_power == power
    kept = pick(LevelFacts(depth, 32, 1.0), locality={"delay_power": 0.7})
    assert kept.locality.delay_power == 0.7
    none = pick(LevelFacts(depth, 32, 1.0), locality={"compensation": "none"})
    assert make_locality(none.level, none.locality).compensation == ()


SQUARE = ((64, 64),) * 16  # of B rows: 1 + 2 * 128 / (3 B), so 3.7 times at B = 32, 6.3 at 16


@pytest.mark.parametrize(
    ("depth", "batch", "layers", "fields", "rotates"),
    [
        (16, 32, SQUARE, {}, True),
        (16, 16, SQUARE, {}, True),
        (16, 8, SQUARE, {}, False),  # 11.7 times
        (15, 32, SQUARE, {}, False),  # 30 samples late
        (16, 32, (), {}, False),
        (31, 32, SQUARE, {"locality": {"speed": 2}}, False),  # 31
        (32, 32, SQUARE, {"locality": {"speed": 2}}, True),
        (16, 32, SQUARE, {"learning": {"decay": "linear", "warmup": 9}, "steps": 99}, True),
        (16, 32, SQUARE, {"learning": {"lr": 0.1}}, False),
        (16, 32, SQUARE, {"learning": {"momentum": 0.9}}, False),
        (16, 32, SQUARE, {"learning": {"inputs": "off"}}, False),
        (16, 32, SQUARE, {"learning": {"optimizer": "adamw"}}, False),
        (16, 32, SQUARE, {"learning": {"heads": {}}}, False),
        (16, 32, SQUARE, {"locality": {"compensation": "look-ahead"}}, False),
        (16, 32, SQUARE, {"locality": {"accumulate": 40, "double_buffered": True}}, False),
        (16, 32, SQUARE, {"level": "auto", "locality": {"memory": "none"}}, False),
    ],
)
def test_adams_axes_are_turned_under_much_delay_where_nothing_is_said_of_steps(
    depth, batch, layers, fields, rotates
):
    made = pick(LevelFacts(depth, batch, 1.0, layers=layers), **fields)
    learning = made.learning
    own = Settings.model_validate(fields).learning
    if rotates:
        assert (learning.lr, learning.momentum) == (0.003, 0.0)
        assert learning.adaptive is not None
        assert learning.inputs.rule.value == "rotated"
    else:
        for name in ("lr", "momentum", "adaptive", "inputs", "optimizer"):
            assert getattr(learning, name) == getattr(own, name), name
    code = pick(LevelFacts(depth, batch, 1.0, layers=layers, own_steps=True), **fields)
    assert code.learning.inputs == own.inputs


def test_a_deep_run_says_that_its_axes_are_turned_and_goes_like_one_that_names_them():
    layers = [nn.Linear(6, 8), *(nn.Linear(8, 8) for _ in range(15)), nn.Linear(8, 3)]
    model = nn.Sequential(*layers)
    found = train(model, PortableStream(40), Settings(level="auto", steps=40))
    assert any("learning.inputs 'rotated'" in reason for reason in found.why)
    assert same(found, train(model, PortableStream(40), found.chosen))
    own = train(
        model, PortableStream(40), Settings(level="auto", steps=40), optimizer=torch.optim.SGD
    )
    assert own.chosen.learning.inputs == "off"


@pytest.mark.parametrize(
    ("batch", "fields", "decay"),
    [
        (32, {}, 0.99),
        (1, {}, 0.9995),
        (256, {}, 0.99),
        (1, {"steps": 1000}, 0.99),
        (1, {"steps": 60_000}, 0.9995),
        (32, {"learning": {"decay": "linear"}, "steps": 100}, None),
        (32, {"learning": {"average": "off"}}, None),
        (32, {"learning": {"average": 0.5}}, 0.5),
    ],
)
def test_averaging(batch, fields, decay):
    average = pick(LevelFacts(4, batch, 1.0), **fields).learning.average
    assert decay is None if average == "off" else average.decay == pytest.approx(decay)


def test_what_the_settings_say_of_the_chosen_level_holds():
    text = """
level: auto
levels:
  trace: {locality: {delay_power: 0.7}, learning: {lr: 0.3}}
  auto: {learning: {momentum: 0.5}}
"""
    own = read_settings(text, "here").for_level(Level.AUTO)
    made, _ = settings_at_level(own, LevelFacts(4, 32, 1.0))
    assert (made.level, made.learning.lr, made.learning.momentum) == (Level.TRACE, 0.3, 0.5)
    assert made.locality.delay_power == 0.7


def same(a, b):
    left, right = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(left[key], right[key]) for key in right)


@pytest.mark.parametrize("source", [PortableStream, stream], ids=["portable", "asked once"])
def test_a_run_is_that_of_the_settings_it_chose(source):
    """And the samples that were looked at come again."""
    own = Settings.model_validate({"level": "auto", "steps": 80, "learning": {"lr": 0.1}})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = train(chain(), source(90), own)
    said = [str(w.message) for w in told if isinstance(w.message, ChoiceWarning)]
    assert [f"auto: {reason}" for reason in found.why] == said
    assert found.chosen.level is Level.TRACE
    assert found.samples == 80
    assert same(found, train(chain(), PortableStream(90), found.chosen))


def test_a_smooth_stream_and_one_block():
    u, y = torch.randn(8, 4, 6), torch.randint(3, (8, 4))
    slow = [((1 - t / 16) * u[n] + t / 16 * u[n + 1], y[n]) for n in range(7) for t in range(16)]
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.warns(ChoiceWarning, match="level 'local'"):
        result = hamdist.train(model, slow, level="auto", classes=3)
    assert result.chosen.level is Level.LOCAL
    with pytest.warns(ChoiceWarning, match="level 'backprop'"):
        result = hamdist.train(nn.Sequential(nn.Linear(6, 3)), slow, level="auto", classes=3)
    assert result.chosen.level is Level.BACKPROP


def test_a_graph_with_cycles():
    with pytest.warns(ChoiceWarning, match="cycles"):
        result = train(cycle_graph(), PortableStream(30), Settings(level="auto"))
    assert result.chosen.level is Level.LOCAL


def test_looking_takes_nothing_away():
    items = [(torch.full((2, 3), float(n)), torch.zeros(2, 3)) for n in range(100)]
    once = from_iterable(iter(items), outputs=3)
    again, _, ends = inspect_stream(once, None)
    assert [float(s.u[0, 0]) for s in again.samples()] == list(range(100))
    assert again.spec == once.spec
    assert not ends
    assert not replays(again)
    samples = iter(items)
    hamdist.train(nn.Linear(3, 3), samples, level="auto", loss="mse", steps=7)
    assert len(list(samples)) == 93


def test_what_replays_still_does():
    items = [(torch.full((2, 3), float(n)), torch.zeros(2, 3)) for n in range(100)]
    again, _, _ = inspect_stream(from_iterable(items, outputs=3), None)
    assert replays(again)
    for begin in (0, 40, 0, 99):
        numbers = [float(s.u[0, 0]) for s in samples_from(again, begin)]
        assert numbers == list(range(begin, 100))


def test_auto_is_no_level_of_its_own():
    with pytest.raises(LevelError, match="chosen by `train`"):
        make_locality(Level.AUTO, Settings().locality)
