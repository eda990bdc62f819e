"""Weights that a sample does not use. Oracle: torch, whose optimisers leave weights without a
gradient as they are, with their momentum and moments."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import hamdist
from hamdist.dynamics.modules.pairs import MeanHalf, ToPair
from hamdist.dynamics.modules.reversible import Coupling


class Sometimes(nn.Module):
    """Uses one of two layers, by what comes, and never a third one."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.never = nn.Linear(4, 3), nn.Linear(4, 4)
        self.ways = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return self.head(torch.tanh(self.ways[int(x.sum() > 0)](x)))


def samples(n=13):
    make = torch.Generator().manual_seed(0)
    for _ in range(n):
        u = torch.randn(5, 4, generator=make, dtype=torch.float64)
        yield u, torch.randint(3, (5,), generator=make)


def network():
    torch.manual_seed(0)
    return Sometimes().double()


def by_torch(optimizer, group=1):
    model = network()
    steps = optimizer(model.parameters())
    for n, (u, y) in enumerate(samples()):
        (functional.cross_entropy(model(u), y) / group).backward()
        if n % group == group - 1:
            steps.step()
            steps.zero_grad()
    return model.state_dict()


def sgd(params):
    return torch.optim.SGD(params, 0.1, momentum=0.9, weight_decay=0.1)


def adamw(params):
    return torch.optim.AdamW(params, 0.01, weight_decay=0.1)


OWN = {"learning": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}}
ADAPTIVE = {"learning": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "adaptive": {}}}


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    ("fields", "optimizer"), [(OWN, sgd), ({"optimizer": sgd}, sgd), ({"optimizer": adamw}, adamw)]
)
def test_they_stay_as_with_torch(fields, optimizer, group):
    run = {"level": "backprop", "locality": {"accumulate": group}, **fields}
    weights = hamdist.train(network(), samples(), **run).model.state_dict()
    expected = by_torch(optimizer, group)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-12)


def test_what_is_never_used_stays_with_adaptive_steps():
    model = hamdist.train(network(), samples(), level="backprop", **ADAPTIVE).model
    assert torch.equal(model.never.weight, network().never.weight)


def test_snapshots_know_them(tmp_path):
    run = {"level": "backprop", "locality": {"accumulate": 4}, **OWN}
    items = list(samples())
    whole = hamdist.train(network(), items, **run).model.state_dict()
    kept = {"path": str(tmp_path), "every": 1}
    hamdist.train(network(), items, steps=6, snapshots=kept, **run)
    resumed = hamdist.train(network(), items, resume=tmp_path, **run).model.state_dict()
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


class Half(nn.Module):
    """F of a coupling: one of two layers, by what comes."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return torch.tanh(self.ways[int(x.sum() > 0)](x))


@pytest.mark.parametrize(
    ("fields", "optimizer"), [(OWN, sgd), ({"optimizer": sgd}, sgd), ({"optimizer": adamw}, adamw)]
)
def test_those_of_reversible_blocks_stay_too(fields, optimizer):
    def build():
        torch.manual_seed(0)
        layers = [ToPair(), Coupling(Half()), Coupling(Half()), MeanHalf(), nn.Linear(4, 3)]
        return nn.Sequential(*layers).double()

    model = build()
    steps = optimizer(model.parameters())
    for u, y in samples():
        steps.zero_grad()
        functional.cross_entropy(model(u), y).backward()
        steps.step()
    found = hamdist.train(build(), samples(), level="reversible", **fields).model.state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-12)
