"""The gradient clipped by the norm of the whole network's. Oracle: clip_grad_norm_ and torch.optim
on the whole model, in float64; the ticks of the steps, drawn by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from dynamics.graph.test_tied import Deep
from dynamics.helpers import check_drawn, knobs, layer, linear
from dynamics.schedule.test_pipeline import B, Skips, batches, learned, masked, mlp, seeded
from torch import nn, optim
from torch.nn import functional

import hamdist
from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.schedule.events import Phase, Stamp
from hamdist.dynamics.schedule.make import make_schedule
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.errors import DivergedError, LevelError

BOUND = 1e-12
LIMIT = 0.3
NETWORK = {"norm": LIMIT, "of": "network"}

# S: the weights move. The first block moves one tick before the others; a step for two samples.
TABLE = """
tick | b0    | b1    | b2
0    | F0    |       |
1    |       | F0    |
2    | F1    |       | FB0
3    |       | F1 B0 |
4    | B0    |       | FB1
5    |       | B1    |
6    | B1    |       |
7    |       |       |
8    |       |       |
9    | F2    |       |
10   |       | F2    |
11   | F3    |       | FB2
12   |       | F3 B2 |
13   | B2    |       | FB3
14   |       | B3    |
15   | B3    |       |
16   | S3    |       |
17   |       | S3    | S3
18   | F4    |       |
"""


def test_ticks_by_hand():
    specs = [
        BlockSpec("b0", layer(2, 2, 0), ("u",)),
        BlockSpec("b1", layer(2, 2, 1), ("b0",)),
        BlockSpec("b2", linear(2, 2, 2), ("b1",), loss=mse),
    ]
    clipped = replace(knobs("pipeline", microbatches=2, accumulate=2), clip=1.0)
    schedule = make_schedule(Graph(specs), clipped)
    assert isinstance(schedule, PulseSchedule)
    check_drawn(schedule, TABLE)
    step = next(e for e in schedule.events("b2") if e.phase is Phase.STEP)
    assert schedule.square("b1", step) == Stamp(14, 3, 0)
    assert schedule.square("b2", step) == Stamp(13, 3, 0)
    assert schedule.norm(step) == Stamp(16, 3, 0)


def by_torch(model, items, loss, make, group):
    """Move `model`; return how often its gradient was longer than LIMIT."""
    step, longer = make([p for p in model.parameters() if p.requires_grad]), 0
    for n, (u, y) in enumerate(items):
        if y is not None:
            out = model(u)
            outs = list(out.values()) if isinstance(out, dict) else [out]
            (sum(loss(one, y) for one in outs) / group).backward()
        if (n + 1) % group == 0 and any(p.grad is not None for p in model.parameters()):
            longer += int(nn.utils.clip_grad_norm_(model.parameters(), LIMIT) > LIMIT)
            step.step()
            step.zero_grad()
    return longer


def frozen():
    model = mlp()
    model[0].requires_grad_(False)
    return model


MOMENTUM = {"lr": 0.3, "momentum": 0.6, "weight_decay": 0.01}
ADAMW = {"optimizer": {"name": "adamw", "lr": 0.02, "weight_decay": 0.1}}


def sgd(parameters):
    return optim.SGD(parameters, 0.3)


def momentum(parameters):
    return optim.SGD(parameters, 0.3, 0.6, weight_decay=0.01)


def adamw(parameters):
    return optim.AdamW(parameters, 0.02, weight_decay=0.1)


CASES: dict[str, Any] = {
    "one block": (mlp, sgd, {"partition": {"blocks": 1}}),
    "momentum, decay, delays": (
        mlp,
        momentum,
        {"partition": {"blocks": 5, "delay": 2}, "learning": MOMENTUM},
    ),
    "AdamW": (mlp, adamw, {"partition": {"blocks": 3}, "learning": ADAMW}),
    "accumulated": (mlp, momentum, {"locality": {"accumulate": 3}, "learning": MOMENTUM}),
    "slices, autograd": (
        mlp,
        sgd,
        {
            "partition": {"slices": {"block0": 2}},
            "engine": {"kind": "inprocess", "step": "autograd"},
        },
    ),
    "frozen": (frozen, momentum, {"learning": MOMENTUM}),
    "two readouts": (Skips, momentum, {"partition": {"blocks": 4}, "learning": MOMENTUM}),
    "tied": (Deep, sgd, {"partition": {"blocks": 5}}),
}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name, parts):
    build, make, fields = CASES[name]
    words = build is Deep
    items = list(batches([B] * 6 + [4, 1, B], words=words))
    items[2] = (items[2][0], None)
    model = seeded(build)
    plain = copy.deepcopy(model)
    locality = {"microbatches": parts, **fields.get("locality", {})}
    loss = masked if words else functional.cross_entropy
    longer = by_torch(plain, items, loss, make, locality.get("accumulate", 1))
    assert longer > 0, "nothing is clipped"
    learning = fields.get("learning", {"lr": 0.3})
    fields = {**fields, "locality": locality, "learning": {**learning, "clip": NETWORK}}
    result = learned(model, items, level="pipeline" if parts > 1 else "backprop", **fields)
    own = dict(result.model.named_parameters())
    for key, p in plain.named_parameters():
        torch.testing.assert_close(own[key], p, rtol=0, atol=BOUND)


def test_reversible_blocks_clip_alike():
    def coupled():
        inner = [hamdist.Coupling(nn.Linear(3, 3)), hamdist.Coupling(nn.Linear(3, 3))]
        return nn.Sequential(*inner, nn.Linear(6, 3))

    model = seeded(coupled)
    items = list(batches([B] * 8))
    central = copy.deepcopy(model)
    by_torch(central, items, functional.cross_entropy, sgd, 1)
    learning = {"lr": 0.3, "clip": NETWORK}
    result = learned(model, items, level="reversible", locality={}, learning=learning)
    for one, p in zip(result.model.parameters(), central.parameters(), strict=True):
        torch.testing.assert_close(one, p, rtol=0, atol=BOUND)


def test_a_run_goes_on_between_a_gradient_and_its_step(tmp_path):
    """In the last ticks of a sample the gradient, its square and the norm are under way."""
    items = list(batches([B] * 4))

    def run(**more):
        learning = {**MOMENTUM, "clip": NETWORK}
        return learned(
            seeded(mlp), items, learning=learning, partition={"blocks": 3}, parts=2, **more
        )

    whole = run(snapshots={"path": str(tmp_path), "every": 1, "keep": 1000})
    c = 2 * 2 + 1 + 2 + 2
    kept = {int(p.name.split("-")[-1]): p for p in tmp_path.iterdir() if p.is_dir()}
    for tick in range(2 * c - 3, 2 * c):
        again = run(resume=kept[tick])
        for one, p in zip(again.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(one, p), tick


@pytest.mark.parametrize(
    ("level", "learning", "words"),
    [
        ("trace", {}, "presentation 'pulse', speed 1"),
        ("local", {}, "presentation 'hold'"),
        ("heads", {}, "credit 'heads'"),
        ("bptt", {}, "presentation 'sequence'"),
        ("backprop", {"blocks": {"block0": {"clip": 1.0}}}, "learning.blocks.block0.clip"),
        ("backprop", {"inputs": "centred"}, "learning.inputs"),
        ("backprop", {"heads": {}}, "learning.heads"),
        ("backprop", {"momentum": 0.5, "dampening": 0.1}, "learning.dampening"),
        ("backprop", {"rules": {"block1": "oja"}}, "a rule"),
    ],
)
def test_what_has_no_norm_of_all_is_refused(level, learning, words):
    with pytest.raises(LevelError, match=r"learning\.clip 0\.3 of the network with .*" + words):
        hamdist.train(
            seeded(mlp),
            list(batches([B] * 3)),
            level=level,
            learning={**learning, "clip": NETWORK},
            engine={"kind": "inprocess"},
        )


def test_a_gradient_out_of_range_is_said():
    def steep(y, t):
        return functional.cross_entropy(y, t) * math.inf

    items = list(batches([B] * 3))
    with pytest.raises(DivergedError):
        learned(seeded(mlp), items, loss=steep, learning={"lr": 0.1, "clip": NETWORK})
