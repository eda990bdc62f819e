"""Optimisers of users' own classes. Oracles: the undisturbed run, the other engine, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dynamics.helpers import relative
from dynamics.updates.test_optimizers import kept, train
from torch import optim

from hamdist.errors import HamdistWarning, SettingsError


class Own(optim.Optimizer):
    """Steps of -lr `scale(p)` times the gradient."""

    def __init__(self, params, lr=0.05, **more):
        super().__init__(params, {"lr": lr, **more})
        self.k = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.k += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * self.scale(group, p) * p.grad)

    def scale(self, group, p):
        return 1 / self.k


class Listed(Own):
    """Momentum in a list of the object."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, lr)
        self.parameters = [p for group in self.param_groups for p in group["params"]]
        self.velocity = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, closure=None):
        for p, v in zip(self.parameters, self.velocity, strict=True):
            p.sub_(v.mul_(0.9).add_(p.grad), alpha=self.param_groups[0]["lr"])


class Noisy(Own):
    def scale(self, group, p):
        return 1 + 0.1 * torch.randn_like(p)


class Numpy(Own):
    def scale(self, group, p):
        state = self.state[p]
        state["k"] = state.get("k", np.int64(0)) + 1
        state["seen"] = np.add(state.get("seen", np.zeros(2)), [1, np.float32(0.3)])
        return float(1 / state["k"] + 1 / state["seen"][1])


class Tensors(Own):
    """A tensor among the arguments of a group."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, lr, scales=torch.tensor([0.5, 1.0]))

    def scale(self, group, p):
        return group["scales"][p.ndim - 1]


class Around(Own):
    """An optimiser inside, with groups of both."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, lr, slow=0)
        self.inside = optim.SGD(self.param_groups, lr, momentum=0.9)

    @torch.no_grad()
    def step(self, closure=None):
        self.inside.step()
        for group in self.param_groups:
            group["slow"] += 1
            for p in group["params"]:
                p.mul_(1 - 0.1 / group["slow"])


class Course(optim.lr_scheduler.LRScheduler):
    """A scheduler that keeps a function."""

    def __init__(self, optimiser, factor):
        self.factor = factor
        super().__init__(optimiser)

    def get_lr(self):
        return [lr * self.factor(self.last_epoch) for lr in self.base_lrs]


class Lookahead(optim.Optimizer):
    def __init__(self, inside):
        self.inside, self.param_groups, self.state = inside, inside.param_groups, {}

    def state_dict(self):
        return {"fast_state": {}, "slow_state": {}, "param_groups": []}


FUNCTIONS = {
    **{kind.__name__: {"optimizer": kind} for kind in (Own, Listed, Noisy, Numpy, Tensors, Around)},
    "Course": {"optimizer": Around, "scheduler": lambda o: Course(o, lambda k: 0.97**k)},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_goes_on_to_the_same_bits(name, tmp_path):
    given = FUNCTIONS[name]
    whole = kept(tmp_path / "a", **given)
    assert not [text for text in whole.warnings if "snapshot" in text]
    assert relative(whole.model.parameters(), train(**given).model.parameters()) == 0
    place = sorted(tmp_path.glob("a/tick-*"))[1]
    with pytest.warns(HamdistWarning, match="going on from"):
        again = kept(tmp_path / "b", resume=place, **given)
    assert relative(again.model.parameters(), whole.model.parameters()) == 0


@pytest.mark.ray
@pytest.mark.parametrize("name", ["Noisy", "Around"])
def test_two_engines(name, session):
    spread = train(engine={"kind": "ray", "actors": 2}, **FUNCTIONS[name])
    assert relative(spread.model.parameters(), train(**FUNCTIONS[name]).model.parameters()) == 0


def test_random_numbers_of_a_step_leave_the_programs_alone():
    before = torch.get_rng_state()
    train(optimizer=Noisy)
    assert torch.equal(before, torch.get_rng_state())


class Damped(Own):
    def __init__(self, params, damping):
        super().__init__(params)
        self.damping = damping

    def scale(self, group, p):
        return self.damping / self.k


def test_arguments_that_are_attributes_are_those_of_the_new_run(tmp_path):
    kept(tmp_path / "a", optimizer=lambda p: Damped(p, 1.0))
    ends = []
    for place in sorted(tmp_path.glob("a/tick-*"))[1:3]:
        with pytest.warns(HamdistWarning, match="going on from"):
            ends.append(kept(tmp_path / "b", resume=place, optimizer=lambda p: Damped(p, 0.0)))
    first, second = (list(end.model.parameters()) for end in ends)
    assert relative(first, second) > 1e-3  # (each stands where it began)


def test_a_state_that_no_snapshot_can_hold():
    with pytest.raises(
        SettingsError, match=r"state_dict\(\) of Lookahead has no 'state' and 'param_groups'"
    ):
        train(optimizer=lambda p: Lookahead(optim.SGD(p, 0.1)))


class Objects(Own):
    def scale(self, group, p):
        self.state[p]["thing"] = object()
        return 1.0


def test_a_snapshot_that_cannot_be_made_ends_no_run(tmp_path):
    with pytest.warns(HamdistWarning, match="a snapshot was not written: .*a object cannot be"):
        result = kept(tmp_path, optimizer=Objects)
    assert relative(result.model.parameters(), train(optimizer=Objects).model.parameters()) == 0
    assert not list(tmp_path.glob("*/manifest.json"))
