"""Weight decay. Oracles: torch.optim.SGD and AdamW in float64, and for levels that they do not know
the step written out from a run without it."""

from __future__ import annotations

import pytest
import torch
from dynamics.helpers import F64, mlp, relative, samples, settings
from runtime.engines.test_engines_equal import assert_equal
from torch import nn

from hamdist.config import Settings
from hamdist.dynamics.objective.losses import mse
from hamdist.errors import LevelError
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable
from hamdist.study.run.baseline import train_centralised

SIZES, ITEMS, DECAY = [4, 5, 6, 2], 25, 0.03
ADAM = {"memory": 0.99, "epsilon": 1e-6}
RECIPES = {
    "plain": {},
    "momentum": {"momentum": 0.8},
    "dampened": {"momentum": 0.8, "dampening": 0.4},
    "adam": {"momentum": 0.7, "adaptive": ADAM},
    "rms": {"adaptive": ADAM},
    "clipped": {"momentum": 0.8, "clip": 0.05},
    "falling": {"adaptive": ADAM, "decay": "linear"},
}


def items():
    return samples(ITEMS, 3, 4, 2)


def learning(recipe):
    return {"lr": 0.1, "weight_decay": DECAY, **RECIPES[recipe]}


def run(level, recipe="plain", own=None, **fields):
    config = settings(level, learning=own or learning(recipe), steps=ITEMS, **fields)
    return train(mlp(SIZES), from_iterable(items(), outputs=2), config, loss=mse)


def by_torch(recipe):
    given, net = RECIPES[recipe], mlp(SIZES)
    momentum = given.get("momentum", 0.0)  # type: ignore[attr-defined]
    if "adaptive" in given:
        betas = momentum, ADAM["memory"]
        step = torch.optim.AdamW(net.parameters(), 0.1, betas, ADAM["epsilon"], DECAY)
    else:
        dampening = given.get("dampening", 0.0)  # type: ignore[attr-defined]
        step = torch.optim.SGD(net.parameters(), 0.1, momentum, dampening, DECAY)
    blocks = [m for m in net.modules() if isinstance(m, nn.Linear)]
    for n, (u, y) in enumerate(items()):
        if given.get("decay") == "linear":  # type: ignore[attr-defined]
            step.param_groups[0]["lr"] = 0.1 * (1 - n / ITEMS)
        step.zero_grad()
        mse(net(u), y).backward()
        if "clip" in given:
            for block in blocks:
                norm = torch.cat([p.grad.flatten() for p in block.parameters()]).norm()
                for p in block.parameters():  # (torch's clip_grad_norm_ adds 1e-6 to the norm)
                    p.grad *= min(1.0, given["clip"] / norm)
        step.step()
    return net


@pytest.mark.parametrize("recipe", RECIPES)
def test_backprop_is_torch_optim(recipe):
    wanted = by_torch(recipe)
    result = run("backprop", recipe)
    assert relative(result.model.parameters(), wanted.parameters()) <= 1e-12
    without = run("backprop", own={"lr": 0.1, **RECIPES[recipe]})
    assert relative(without.model.parameters(), wanted.parameters()) > 1e-4


@pytest.mark.parametrize("recipe", ["plain", "dampened", "adam", "falling"])
def test_centralised_is_torch_optim(recipe):
    config = Settings.model_validate(
        {"learning": learning(recipe), "steps": ITEMS, "dtype": "float64"}
    )
    stream = from_iterable(items(), outputs=2)
    result = train_centralised(mlp(SIZES), stream, config, loss=mse)
    assert relative(result.model.parameters(), by_torch(recipe).parameters()) <= 1e-12


@pytest.mark.parametrize("level", ["trace", "local", "group", "heads", "delay-free"])
@pytest.mark.parametrize("recipe", ["plain", "adam"])
def test_at_every_level_it_shrinks_what_has_no_gradient(level, recipe):
    """Oracle: with a loss of zero each update is theta *= 1 - lr decay."""
    config = settings(level, learning=learning(recipe), steps=ITEMS)
    net = mlp(SIZES)
    result = train(net, from_iterable(items(), outputs=2), config, loss=lambda p, _: p.sum() * 0)
    before = dict(net.named_parameters())
    for name, block in result.blocks.items():
        for key, theta in block.theta.items():
            own = before[key]
            shares = theta / own
            updates = torch.log(shares.mean()) / torch.log(torch.tensor(1 - 0.1 * DECAY, dtype=F64))
            assert updates.item() == pytest.approx(block.updates, abs=1e-6), name
            assert relative([theta], [own * (1 - 0.1 * DECAY) ** block.updates]) <= 1e-12


def test_heads_beside_messages_decay_once():
    beside = {**learning("plain"), "heads": {"weight": 0.3}}
    config = settings("trace", learning=beside, steps=ITEMS)
    net = mlp(SIZES)
    stream = from_iterable(items(), outputs=2)
    result = train(net, stream, config, loss=lambda p, _: p.sum() * 0)
    before = dict(net.named_parameters())
    for block in result.blocks.values():
        for key, theta in block.theta.items():
            assert relative([theta], [before[key] * (1 - 0.1 * DECAY) ** block.updates]) <= 1e-12


def test_it_is_the_weight_cost():
    with pytest.raises(LevelError, match="are the same term of the Hamiltonian: give one"):
        run("local", dynamics={"weight_cost": 0.1})
    own = run("local", own={"lr": 0.1}, dynamics={"weight_cost": DECAY})
    assert relative(run("local").model.parameters(), own.model.parameters()) == 0


@pytest.mark.ray
@pytest.mark.parametrize("recipe", ["dampened", "adam"])
def test_both_engines_and_a_run_gone_on_with(session, leaves_no_socket, recipe, tmp_path):
    whole = run("trace", recipe)
    assert_equal(whole, run("trace", recipe, engine={"kind": "ray", "actors": 2}))
    kept = {"path": str(tmp_path), "every": 6}
    run("trace", recipe, snapshots=kept)
    config = settings("trace", learning=learning(recipe), steps=ITEMS)
    resumed = train(
        mlp(SIZES), from_iterable(items(), outputs=2), config, loss=mse, resume=tmp_path
    )
    assert relative(resumed.model.parameters(), whole.model.parameters()) == 0
