"""Oracle: the tables of time-and-signals.md (levels) and of equations.md (HL Appendix E)."""

from __future__ import annotations

import pytest
from dynamics.helpers import knobs

from hamdist.config import Compensation, DynamicsSettings, LearningSettings
from hamdist.dynamics.updates.constants import Constant, Dynamics, make_dynamics
from hamdist.errors import LevelError

# level: grouping, speed, presentation, moves, memory, update
LEVELS = {
    "local": ("layer", 1, "hold", "all", "none", "tick"),
    "group": ("group", 1, "hold", "all", "none", "tick"),
    "delay-free": ("layer", "depth", "hold", "layer-by-layer", "none", "tick"),
    "trace": ("layer", 1, "pulse", "all", "trace", "arrival"),
    "heads": ("layer", 1, "pulse", "all", "none", "arrival"),
    "backprop": ("layer", "inf", "pulse", "all", "trace", "arrival"),
}


@pytest.mark.parametrize("level", LEVELS)
def test_presets(level):
    k = knobs(level)
    found = (k.grouping, k.speed, k.presentation, k.moves, k.memory, k.update)
    assert tuple(getattr(v, "value", v) for v in found) == LEVELS[level]
    assert k.order.value == "omega-first"
    assert k.target.value == "sample"
    assert k.readout.value == "output"
    assert k.compensation == ()
    assert k.pulse == (LEVELS[level][2] == "pulse")


SETTABLE = [
    ("trace", {"grouping": "group"}),
    ("trace", {"grouping": "network"}),
    ("trace", {"speed": 3}),
    ("trace", {"memory": "trace+weights"}),
    ("trace", {"compensation": "delay-scaled", "delay_power": 1.0}),
    ("backprop", {"speed": "depth"}),
    ("local", {"speed": "inf", "update": "last-tick"}),
    ("local", {"target": "current"}),
    ("local", {"order": "simultaneous"}),
    ("local", {"order": "sequential", "readout": "state"}),
    ("local", {"order": "simultaneous", "readout": "state"}),
    ("local", {"moves": "layer-by-layer", "speed": "depth"}),
    ("group", {"compensation": "delay-scaled"}),
    ("delay-free", {"moves": "all"}),
]


@pytest.mark.parametrize(("level", "overrides"), SETTABLE)
def test_every_knob_can_be_set(level, overrides):
    k = knobs(level, **overrides)
    for name, value in overrides.items():
        found = getattr(k, name)
        found = found[0] if isinstance(found, tuple) else found
        assert getattr(found, "value", found) == value


def test_a_power_of_the_delay_asks_for_delay_scaled_steps():
    assert knobs("trace", delay_power=0.7).compensation == (Compensation.DELAY_SCALED,)
    assert knobs("trace", delay_power=0.7, compensation="none").compensation == ()


def test_the_other_presentation_brings_its_own_memory_and_update():
    k = knobs("trace", presentation="hold")
    assert (k.memory.value, k.update.value, k.moves.value) == ("none", "tick", "all")
    k = knobs("delay-free", presentation="pulse")
    assert (k.memory.value, k.update.value, k.moves.value) == ("trace", "arrival", "all")
    k = knobs("local", presentation="pulse", memory="trace+weights")
    assert (k.memory.value, k.update.value) == ("trace+weights", "arrival")


# level, knobs, what the message says: the contradiction and the remedy
REFUSED = [
    ("trace", {"memory": "none"}, "memory 'none': .*use memory 'trace'"),
    ("trace", {"update": "tick"}, "update 'tick': .*use update 'arrival'"),
    ("backprop", {"update": "last-tick"}, "update 'last-tick': .*use update 'arrival'"),
    ("trace", {"moves": "layer-by-layer"}, "'layer-by-layer' belongs to presentation 'hold'"),
    ("trace", {"order": "sequential"}, "order 'sequential': .*use order 'omega-first'"),
    ("trace", {"order": "simultaneous"}, "order 'simultaneous': .*use order 'omega-first'"),
    ("trace", {"target": "current"}, "target"),
    ("trace", {"readout": "state"}, "readout"),
    ("local", {"memory": "trace"}, "memory 'trace': .*use memory 'none', or presentation 'pulse'"),
    ("group", {"memory": "trace+weights"}, "memory 'trace\\+weights': .*use memory 'none'"),
    ("local", {"update": "arrival"}, "update 'arrival': messages arrive in every tick"),
    ("local", {"moves": "layer-by-layer"}, "speed 1: .*use speed 'depth'"),
    ("delay-free", {"speed": 3}, "speed 3: .*use speed 'depth'"),
    ("delay-free", {"speed": "inf"}, "speed 'inf': .*use speed 'depth'"),
    ("delay-free", {"update": "last-tick"}, "update 'last-tick': .*use update 'tick'"),
    ("local", {"presentation": "pulse", "memory": "none"}, "use memory 'trace'"),
    ("trace", {"presentation": "hold", "memory": "trace"}, "use memory 'none'"),
]


@pytest.mark.parametrize(("level", "overrides", "message"), REFUSED)
def test_what_cannot_go_together_is_refused_with_the_remedy(level, overrides, message):
    with pytest.raises(
        LevelError, match=f"level '{level}' cannot run with these knobs: .*{message}"
    ):
        knobs(level, **overrides)


# -- the constants -----------------------------------------------------------------------------


def dynamics(level="local", learning=None, **given):
    return make_dynamics(
        DynamicsSettings.model_validate(given),
        LearningSettings.model_validate(learning or {}),
        knobs(level),
    )


# HL Appendix E: beta = gamma / tau, eta = (1 - mu) / tau, phi = (1 - rho) / tau
APPENDIX_E = {
    "GD-a": (1.0, 0.01, 0.0, 0.0, {"beta": 0.01, "eta": 1.0, "phi": 1.0}),
    "GD-b": (0.5, 0.001, 0.0, 0.0, {"beta": 0.002, "eta": 2.0, "phi": 2.0}),
    "Mom-a": (1.0, 0.01, 0.05, 0.6, {"beta": 0.01, "eta": 0.95, "phi": 0.4}),
    "Mom-b": (0.5, 0.01, 0.1, 0.5, {"beta": 0.02, "eta": 1.8, "phi": 1.0}),
}


@pytest.mark.parametrize("level", ["local", "trace"])
@pytest.mark.parametrize("scenario", APPENDIX_E)
def test_constants_of_gradient_descent(scenario, level):
    tau, lr, momentum, dampening, expected = APPENDIX_E[scenario]
    d = dynamics(level, {"lr": lr, "momentum": momentum, "dampening": dampening}, tau=tau)
    assert d.beta == pytest.approx(expected["beta"], rel=1e-15)
    assert d.eta_omega == pytest.approx(expected["eta"], rel=1e-15)
    assert d.phi(7) == pytest.approx(expected["phi"], rel=1e-15)
    # PyTorch does not dampen its first momentum step.
    assert d.first_phi == (1 / tau if dampening else None)
    assert d.eta_z == 0
    assert d.sign == -1
    assert d.c * d.tau(7) == 1


def test_eta_is_for_both_costates_unless_one_is_given():
    d = dynamics(eta=0.3)
    assert (d.eta_z, d.eta_omega) == (0.3, 0.3)
    d = dynamics(eta=0.3, eta_z=0.1)
    assert (d.eta_z, d.eta_omega) == (0.1, 0.3)
    d = dynamics(eta=0.3, eta_omega=0.0)
    assert (d.eta_z, d.eta_omega) == (0.3, 0.0)
    d = dynamics(learning={"momentum": 0.9}, eta_z=0.1)
    assert (d.eta_z, d.eta_omega) == (0.1, pytest.approx(0.1))


def test_what_is_given_is_taken():
    d = dynamics(tau=0.1, c=3, eta=0, beta=7, phi=5, sign=1)
    assert d == Dynamics(
        Constant(0.1), c=3, eta_z=0, eta_omega=0, beta=7, phi=Constant(5), sign=1, limit=1e12
    )


def test_overshoot_is_refused():
    with pytest.raises(LevelError, match=r"c tau = 1.5 is above 1.*use c <= 2 or a smaller tau"):
        dynamics(tau=0.5, c=3)
    for tau in (0.1, 0.3, 1 / 3, 49.0, 1e-3):
        assert dynamics(tau=tau).c * tau == pytest.approx(1)  # round-off is no overshoot


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"c": 0.5}, "c tau"),
        ({"eta_z": 0.1}, "eta_z"),
        ({"eta": 0.1}, "eta_z"),
        ({"sign": 1}, "sign"),
    ],
)
def test_a_pulse_is_one_hop_a_tick(given, name):
    with pytest.raises(LevelError, match=rf"{name} = .* 'pulse'.*use presentation 'hold'"):
        dynamics("trace", **given)
    dynamics("local", **given)
    for tau in (0.1, 0.3, 1 / 3, 49.0, 1e-3):
        dynamics("trace", tau=tau)


@pytest.mark.parametrize("knob", ["blend", "lead"])
def test_a_knob_that_stands_for_a_compensation_is_named(knob):
    with pytest.raises(LevelError, match=rf"locality\.{knob} stands for compensation"):
        knobs("trace", **{knob: 0.5})
