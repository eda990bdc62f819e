"""A replay is the run that was, or it says what is missing: a program's code, or settings of then.
Oracle: the run's own weights, to the bit."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from runtime.live.test_live import equal, network, samples, start
from torch.nn import functional

import hamdist
from hamdist.errors import HamdistWarning, SettingsError


class Slow(hamdist.OwnLevel):
    def __init__(self, ticks):
        self.ticks_of_a_round = ticks

    def ticks(self, graph):
        return self.ticks_of_a_round

    def events(self, graph):
        for block, depth in graph.depths.items():
            yield depth, block, "F", 0
            yield 2 * graph.depth - depth, block, "B", 0


class Scaled(hamdist.Rule):
    def __init__(self, factor):
        self.factor = factor

    def backward(self, block, kept, message):
        messages, g = block.vjp(kept, message)
        return messages, {name: self.factor * value for name, value in g.items()}


def fed(run, many=6):
    with run:
        for u, y in samples(many):
            run.feed(u, y)
    return run.result


def code(scale):
    """By argument of `start`."""
    return {
        "optimizer": lambda params: torch.optim.Adam(params, lr=0.01 * scale),
        "loss": lambda y, t: 3 * scale * functional.cross_entropy(y, t),
        "phi": lambda _: 0.5 / scale,
        "rules": {"block*": Scaled(2 * scale)},
        "level": Slow(2 + scale),
    }


CODE, OTHER = code(1), code(2)


@pytest.mark.parametrize("name", CODE)
def test_code_of_the_program_is_asked_for(name, tmp_path):
    given = {name: CODE[name], **({"learning": {}} if name == "optimizer" else {})}
    fields = dict(given)
    result = fed(start(fields.pop("level", "trace"), out=tmp_path, **fields))
    with pytest.raises(SettingsError, match=f"code, .*{name}=..."):
        hamdist.replay(tmp_path, network())
    assert equal(result, hamdist.replay(tmp_path, network(), **given))


@pytest.mark.parametrize(
    "rule", ["feedback-alignment", {"name": "sign-symmetry", "magnitude": "uniform"}]
)
def test_rules_with_names_are_in_the_journal(rule, tmp_path):
    result = fed(start("trace", out=tmp_path, rules={"block*": rule}))
    assert equal(result, hamdist.replay(tmp_path, network()))
    assert not equal(result, fed(start("trace")))


@pytest.mark.parametrize("name", CODE)
def test_changed_code_of_the_program_is_said(name, tmp_path):
    def given(code):
        return {name: code[name], **({"learning": {}} if name == "optimizer" else {})}

    def begun(code, **more):
        fields = given(code)
        return start(fields.pop("level", "trace"), out=tmp_path, **fields, **more)

    result = fed(begun(CODE), 3)
    whose = "the rule of block" if name == "rules" else name
    with pytest.warns(HamdistWarning, match=f"the code of {whose}.* has changed since"):
        other = hamdist.replay(tmp_path, network(), **given(OTHER))
    assert equal(result, other) == (name == "level")  # (a longer round computes the same)
    with pytest.warns(HamdistWarning, match=f"the code of {whose}.*`replay` cannot"):
        on = begun(OTHER, resume=tmp_path)
    fed(on, 1)
    with pytest.raises(SettingsError, match=f"the code of {whose}"):
        hamdist.replay(tmp_path, network(), **given(CODE))


@pytest.mark.parametrize("name", ["learning", "locality", "rules"])
@pytest.mark.parametrize("snapshot", [False, True])
def test_a_run_that_went_on_with_other_settings_is_refused(name, snapshot, tmp_path):
    other = {"learning": {"lr": 0.01}, "locality": {"speed": 2}, "rules": {"*": "mono-forward"}}
    with start("trace", out=tmp_path) as run:
        for u, y in samples(4):
            run.feed(u, y)
        if snapshot:
            run.snapshot()
    with pytest.warns(HamdistWarning, match="`replay` cannot"):
        on = start("trace", out=tmp_path, resume=tmp_path, **{name: other[name]})
    fed(on, 2)
    with pytest.raises(SettingsError, match="went on otherwise"):
        hamdist.replay(tmp_path, network())


def test_changed_code_that_settings_name_is_said(tmp_path, monkeypatch):
    """A rule and a level, by the names of their file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = """
import hamdist
from runtime.live.test_repeatable import Scaled, Slow
class Level(Slow):
    def __init__(self):
        super().__init__(3)
class Rule(Scaled):
    def __init__(self):
        super().__init__(0.5)
    def feedback(self, block):
        return {}
"""
    file = tmp_path / "named_in_settings.py"
    file.write_text(text)
    rules = {"block*": f"{file.name}:Rule"}
    fields = {"learning": {"rules": rules}, "locality": {"level": f"{file.name}:Level"}}
    result = fed(start("trace", out="out", **fields), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(result, hamdist.replay("out", network()))
    file.write_text(text.replace("return {}", "return dict()").replace("(3)", "(4)"))
    monkeypatch.delitem(sys.modules, file.stem)
    with pytest.warns(HamdistWarning, match=r"code of level, the code of the rule of block\*"):
        hamdist.replay("out", network())
