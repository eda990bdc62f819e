"""Rules in both engines. Oracle: the in-process run that nothing has disturbed, to the last bit."""

from __future__ import annotations

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal, settings
from runtime.networks import PortableStream
from runtime.ray_engine.test_recovery import ALONE, ITEMS, Once, both, cut, driver, net
from torch import nn

import hamdist
from hamdist.dynamics.rules.names import HOMES, built_in
from hamdist.runtime.storage.snapshot_files import snapshot_folders
from hamdist.runtime.storage.store import storage
from hamdist.runtime.train.train import train
from hamdist.study.verify.topics.rule import VerifiedRule

__all__ = ["driver"]  # a fixture


class Counting(hamdist.Rule):
    """Everything that a rule can have: memory that learns, memory that changes, random numbers, a
    label, a step in the tick of the forward pass and one with the message."""

    signals = hamdist.Signals(label=True)

    def start(self, block):
        return {"gain": nn.Parameter(torch.ones(block.shape)), "seen": 0, "classes": {}}

    def forward(self, block, inputs):
        h = block.f(inputs) * block.memory["gain"]
        return h, {"x": list(inputs), "noise": torch.randn(h.shape, generator=block.generator)}

    def learn(self, block, kept, label):
        for one in label.tolist():
            block.memory["classes"][one] = block.memory["classes"].get(one, 0) + 1
        return {name: 1e-3 * block.randn_like(w) for name, w in block.theta.items()}

    def backward(self, block, kept, message):
        block.memory["seen"] += 1
        messages, g = block.vjp(kept["x"], message + 1e-3 * kept["noise"])
        scale = 1 / block.memory["seen"]
        return messages, {**{n: t * scale for n, t in g.items()}, "memory:gain": message.sum(0)}


MIXED = {
    "block0": "direct-feedback-alignment",
    "block1": "kolen-pollack",
    "block2": Counting(),
    "block4": {"name": "sign-symmetry", "magnitude": "batchwise"},
}


@pytest.mark.ray
@pytest.mark.timeout(110)
def test_a_killed_actor(session, driver, leaves_no_socket, tmp_path):
    """Mixed rules on three actors, one of which is killed: equal to one process."""
    odd = net((2, Once(31, tmp_path / "mark", "kill")))
    learning = {"lr": 0.05, "optimizer": {"name": "adamw"}}
    result = both(tmp_path, odd, functions={"rules": MIXED}, learning=learning)
    assert any("block2" in lost.blocks for lost in result.replaced)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in HOMES if name != "e-prop"]


@pytest.mark.ray
@pytest.mark.timeout(110)
@pytest.mark.parametrize("name", ["e-prop", *SLOW])
def test_every_rule_with_a_killed_actor(session, leaves_no_socket, name):
    """On all blocks that it may have, as `hamdist verify --rule` does it: lost at sample 17."""
    verified = VerifiedRule(name)
    assert verified._killed().difference == 0
    assert verified._resumed().difference == 0


def resumed(tmp_path, rules, **level):
    given = {**level, "partition": cut(), "learning": {"lr": 0.05, "momentum": 0.5}}
    every = 13 if level["level"] == "trace" else 150
    kept = {"path": str(tmp_path / "kept"), "every": every, "keep": 9}
    whole = train(
        net(), PortableStream(ITEMS), settings(ALONE, ITEMS, snapshots=kept, **given), rules=rules
    )
    at = storage(kept["path"])
    for folder in sorted(snapshot_folders(at))[1:2]:
        again = train(
            net(),
            PortableStream(ITEMS),
            settings(ALONE, ITEMS, **given),
            rules=rules,
            resume=f"{kept['path']}/{folder}",
        )
        assert 0 < again.resumed < ITEMS
        assert_equal(whole, again)
    return whole


WITHOUT_SEQUENCES = [name for name in HOMES if built_in(name).presentation != "sequence"]


@pytest.mark.parametrize("name", [*WITHOUT_SEQUENCES, "mixed"])
def test_a_resumed_run(tmp_path, name):
    rules = MIXED if name == "mixed" else {"block*": name}
    held = name in HOMES and built_in(name).presentation == "hold"
    level = {"level": "trace"}
    if held:
        level = {"level": "local", "locality": {"speed": 9, "update": "last-tick"}}
        if nudges := built_in(name)().nudges(9):
            level["dynamics"] = {"phi": {"values": nudges, "cycle": True}}
    result = resumed(tmp_path, rules, **level)
    assert result.samples == ITEMS
    assert result.model.state_dict().keys() == net().state_dict().keys()


def test_another_rule_is_another_run(tmp_path):
    """Its memory means nothing to the other one: weights are taken over, and that is said."""
    given = {"level": "trace", "partition": cut()}
    kept = {"path": str(tmp_path / "kept"), "every": 13}
    run = settings(ALONE, 30, snapshots=kept, **given)
    train(net(), PortableStream(30), run, rules={"block1": "kolen-pollack"})
    again = train(
        net(),
        PortableStream(ITEMS),
        settings(ALONE, ITEMS, **given),
        rules={"block1": "feedback-alignment"},
        resume=kept["path"],
    )
    assert any("was taken of another run (blocks differ)" in text for text in again.warnings)
