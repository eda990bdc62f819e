"""`hamdist verify --rule`: rows that pass for a sound rule, and the row that each fault fails."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.errors import GraphError
from hamdist.study.verify.topics import rule
from hamdist.study.verify.topics.rule import VerifiedRule

RULES = """
import hamdist

class Backprop(hamdist.Rule):
    on_readout = True

    def backward(self, block, kept, message):
        return block.vjp(kept, message)

class Object(Backprop):
    def start(self, block):
        return {"x": object()}

class Leaks(Backprop):
    others = {}

    def backward(self, block, kept, message):
        self.others[block.name] = block.theta
        all = sum(w.sum() for theta in self.others.values() for w in theta.values())
        messages, g = block.vjp(kept, message)
        return messages, {name: t + 0 * all for name, t in g.items()}

class Forgets(Backprop):
    seen = [0]  # (of the class: a dry run looks at the object alone)

    def backward(self, block, kept, message):
        self.seen[0] += 1
        messages, g = block.vjp(kept, message)
        return messages, {name: t / self.seen[0] for name, t in g.items()}
"""

SOUND = ["kolen-pollack", "predictive-coding", "e-prop", "snap-1", "diagonal"]


@pytest.fixture
def rules(user_file):
    return user_file(RULES)


SLOW = {"predictive-coding"}  # (seconds)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in [*SOUND, "Backprop"]]
)
def test_a_sound_rule(rules, monkeypatch, name):
    """(of 12 samples, one of them without a target: the command takes 30)"""
    monkeypatch.setattr(rule, "SAMPLES", 12)
    monkeypatch.setattr(rule, "AT", 7)
    own = VerifiedRule(name if name in SOUND else f"{rules}:{name}")
    for measure in (own._resumed, own._poisoned):
        assert measure().difference == 0, measure
    cosine = own._cosine()
    if name in ("Backprop", "diagonal"):
        assert abs(cosine.difference) < 1e-9
        assert cosine.where.count("1.00") == (5 if name == "Backprop" else 2)
    else:
        assert 0 < cosine.difference < (0.1 if name == "predictive-coding" else 2)


def test_faults_fail_their_rows(rules):
    checks = VerifiedRule(f"{rules}:Object").checks()
    with pytest.raises(GraphError, match="keeps no plain data"):
        next(checks).measure()
    assert not [*checks]  # the other rows would fail of the same
    assert VerifiedRule(f"{rules}:Forgets")._resumed().difference > 0
    leaks = VerifiedRule(f"{rules}:Leaks")
    found = leaks._poisoned()
    assert math.isinf(found.difference)
    assert found.where.startswith("it reads other blocks: block 'block")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(250)
def test_the_command(session, rules):
    done = CliRunner().invoke(app, ["verify", "--rule", f"{rules}:Backprop", "--json", "rows.json"])
    assert done.exit_code == 0, done.output
    with open("rows.json") as file:
        rows = json.load(file)["rows"]
    assert [row["passed"] for row in rows] == [True] * 6
    wrong = CliRunner().invoke(app, ["verify", "--rule", f"{rules}:Forgets"])
    assert wrong.exit_code == 1
    for more in (["--model", "x.py:y"], ["--only", "bptt"]):
        both = CliRunner().invoke(app, ["verify", "--rule", "oja", *more])
        assert both.exit_code == 2
        assert "is verified alone" in both.output
