"""Levels of a user's own. Oracles: a table drawn by hand, plain torch that follows it in float64,
and the built-in levels."""

from __future__ import annotations

from dataclasses import replace
from itertools import count, islice

import pytest
import torch
from dynamics.helpers import bare_chain, check_drawn, clones, knobs, relative
from dynamics.rules.test_rules import B, chain, items
from runtime.engines.test_engines_equal import assert_equal
from torch.nn import functional
from typer.testing import CliRunner

import hamdist
from hamdist.cli import app
from hamdist.config import Settings
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.dynamics.schedule.make import make_schedule
from hamdist.errors import LevelError, SettingsError
from hamdist.runtime.storage.snapshot_files import snapshot_folders
from hamdist.runtime.storage.store import storage
from hamdist.runtime.timing.step_graph import step_graph
from hamdist.runtime.train.prepare import level_fields
from hamdist.runtime.train.train import plan_of
from hamdist.streams import from_iterable
from hamdist.study.verify.topics.rule import VerifiedLevel

FILE = '''
import hamdist

TABLE = """
tick | block0 | block1 | block2
0    | F0     |        |
1    | F1     | F0     |
2    |        | F1     | FB0
3    |        | B0     | FB1
4    | B0     | B1     |
5    | B1     |        |
6    | F2     |        |
7    | F3     | F2     |
8    |        | F3     | FB2
"""


class TwoAndWait(hamdist.OwnLevel):
    tables = {3: TABLE}

    def ticks(self, graph):
        return 2 * graph.depth + 2

    def events(self, graph):
        for block, l in graph.depths.items():
            for n in range(2):
                yield n + l, block, "F", n
                yield n + 2 * graph.depth - l, block, "B", n


class WrongTable(TwoAndWait):
    tables = {3: TABLE.replace("F3     | F2", "       | F2")}


class Whole(TwoAndWait):
    base = "backprop"

    def ticks(self, graph):
        return 2 * graph.depth + 1

    def events(self, graph):
        return [event for event in super().events(graph) if event[3] == 0]
'''
OWN = {}
exec(FILE, OWN)  # (as a class of the user's script, whose module has no file)
TwoAndWait, Whole = OWN["TwoAndWait"], OWN["Whole"]


class Every(hamdist.OwnLevel):
    """The waves of the built-in levels, at a speed."""

    def __init__(self, ticks, base="trace", late=0):
        self.c, self.late, self.base = ticks, late, base

    def ticks(self, graph):
        return self.c

    def events(self, graph):
        for block, depth in graph.depths.items():
            yield depth, block, "F", 0
            if block not in graph.readouts:
                yield 2 * graph.depth - depth + self.late, block, "B", 0


def schedule_of(level, graph):
    return make_schedule(graph, replace(knobs("trace"), own=level))


def test_the_table_by_hand():
    table = OWN["TABLE"].replace("block", "b")
    schedule = schedule_of(TwoAndWait(), bare_chain(3))
    assert check_drawn(schedule, table) == 8
    assert [e.tick for e in islice(schedule.emissions(), 5)] == [-1, 0, 5, 6, 11]
    # F2 of b0 and b1 meets the weights after both messages, F1 those before any; the readout steps
    # in between.
    into = {e.child: e for e in bare_chain(3).edges}
    assert schedule.state(into["b1"], next(schedule.events("b1", 7))) == Stamp(6, 2, 2)
    assert schedule.state(into["b2"], next(schedule.events("b2", 3))) == Stamp(2, 1, 0)
    assert schedule.in_flight(into["b1"], Kind.STATE) == schedule.stored("b0") == 2
    assert schedule.staleness == 1
    assert schedule.delay("b0") == 1
    assert schedule.delay("b2") == 0
    assert schedule.idle == 1  # the message about sample 0 comes when 1 has entered
    assert schedule.enters(3) == 7
    assert [schedule.entered(tick) for tick in (0, 1, 5, 6)] == [0, 1, 1, 2]


def run(level, many=7, **fields):
    given = {"dtype": "float64", "learning": {"lr": 0.1}, "engine": {"kind": "inprocess"}, **fields}
    return hamdist.train(chain(None, None, None), items(many), level=level, classes=3, **given)


def test_the_wait_for_the_whole_round_is_backpropagation():
    assert_equal(run(Whole()), run("backprop"))
    assert_equal(run(Every(2)), run("trace", locality={"speed": 2}))
    assert_equal(run(Every(1)), run("trace"))
    heads = {"locality": {"memory": "none"}}
    assert_equal(run(Every(2, "heads"), **heads), run("heads", locality={"speed": 2}))


def test_two_and_wait_as_plain_torch():
    """The table, event by event, with gradients by hand."""
    net = run(TwoAndWait(), many=6)
    theta = [clones(chain(None).blocks[name].module.parameters()) for name in "abr"]
    (W0, b0), (W1, b1), (W2, b2) = theta

    def step(W, b, z, x):
        W -= 0.1 * z.T @ x
        b -= 0.1 * z.sum(0)

    data = items(6)
    for first in range(0, 6, 2):
        pair = []
        for u, y in data[first : first + 2]:  # both pass a and b before a message is back
            h0 = torch.tanh(u @ W0.T + b0)
            pair.append((u, y, h0, torch.tanh(h0 @ W1.T + b1)))
        for u, y, h0, h1 in pair:  # block by block, in order: each with its weights of then
            e = (torch.softmax(h1 @ W2.T + b2, 1) - functional.one_hot(y, 3)) / B
            z1 = (e @ W2) * (1 - h1**2)
            step(W2, b2, e, h1)
            z0 = (z1 @ W1) * (1 - h0**2)
            step(W1, b1, z1, h0)
            step(W0, b0, z0, u)
    found = [t for name in "abr" for t in net.blocks[name].theta.values()]
    assert relative(found, [t for pair in theta for t in pair]) <= 1e-13


def events(*made, ticks=3):
    """A level of these events on a chain of two."""
    return type(
        "Wrong", (hamdist.OwnLevel,), {"ticks": lambda *_: ticks, "events": lambda *_: list(made)}
    )()


def failing(*_):
    raise KeyError("depth")


LONGER = count(3)
F0, F1, B0 = (0, "b0", "F", 0), (1, "b1", "F", 0), (2, "b0", "B", 0)
REFUSED = {
    "no ticks": (events(F0, F1, B0, ticks=0), r"ticks\(\) is 0"),
    "it raises": (type("Wrong", (hamdist.OwnLevel,), {"ticks": failing})(), "KeyError: 'depth'"),
    "another round each time": (
        type(
            "Wrong",
            (hamdist.OwnLevel,),
            {"ticks": lambda *_: next(LONGER), "events": lambda *_: [F0, F1, B0]},
        )(),
        "it is another one when asked again",
    ),
    "no events": (type("Wrong", (hamdist.OwnLevel,), {"ticks": lambda *_: 1})(), "NotImpl"),
    "none": (events(), "yields none"),
    "no end": (
        type(
            "Wrong",
            (hamdist.OwnLevel,),
            {"ticks": lambda *_: 3, "events": lambda *_: ((n, "b0", "F", n) for n in count())},
        )(),
        "more than the 12 that fit into 3 ticks",
    ),
    "three values": (events((0, "b0", "F")), "yield .tick, block"),
    "another block": (events((0, "b9", "F", 0)), "blocks are b0, b1"),
    "another phase": (events((0, "b0", "G", 0)), "yields .0, 'b0', 'G', 0.; yield"),
    "half a tick": (events((0.5, "b0", "F", 0)), "whole numbers"),
    "twice": (events(F0, F0), "F0 of block 'b0' is there twice"),
    "a sample is missing": (events(F0, B0, F1, (3, "b0", "F", 2), ticks=9), "block 'b0' has no F1"),
    "no message": (events(F0, F1), "block 'b0' has no B0"),
    "before the state": (
        events(F0, (0, "b1", "F", 0), B0),
        "F0 of 'b1' is in tick 0, but waits for a signal of 'b0' that is sent in tick 0",
    ),
    "before the message": (
        events(F0, F1, (1, "b0", "B", 0)),
        "B0 of 'b0' is in tick 1, but waits for a signal of 'b1'",
    ),
    "late entrance": (events((1, "b0", "F", 0), F1, B0), "enters in tick 1"),
    "a readout's message": (events(F0, F1, B0, (2, "b1", "B", 0)), "is not in the tick of F"),
    "passing": (
        events(F0, F1, B0, (3, "b0", "F", 1), (4, "b1", "F", 1), (5, "b0", "B", 1)),
        "one by one and in their order",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_schedule_can_be(case):
    level, said = REFUSED[case]
    with pytest.raises(LevelError, match=f"level Wrong: .*{said}"):
        schedule_of(level, bare_chain(2))


def test_what_it_does_not_fit():
    for fields, said in [
        ({"locality": {"speed": 3}}, "says when samples enter, and so does locality.speed 3"),
        ({"locality": {"presentation": "hold"}}, "presentation 'hold'"),
        ({"locality": {"microbatches": 2}}, "microbatches 2"),
        ({"learning": {"lr": 0.1, "clip": {"norm": 1.0, "of": "network"}}}, "of the network"),
    ]:
        with pytest.raises(LevelError, match=said):
            run(TwoAndWait(), **fields)
    with pytest.raises(SettingsError, match="give a hamdist.OwnLevel"):
        run(TwoAndWait)
    with pytest.raises(SettingsError, match="base 'local'; give one of trace, heads"):
        run(Every(3, base="local"))
    blocks = bare_chain(3).blocks.values()
    graph = Graph([replace(one, rule=None if one.loss else Direct()) for one in blocks])
    with pytest.raises(
        LevelError, match="level Every: B0 of 'b0' is in tick 2, but waits for a signal of 'b2'"
    ):
        schedule_of(Every(9, late=-2), graph)


class Direct(hamdist.Rule):
    signals = hamdist.Signals(back="error")


@pytest.fixture
def file(user_file):
    return user_file(FILE)


def test_by_name_and_resumed_in_the_midst_of_a_round(file, tmp_path):
    kept = {"path": str(tmp_path / "kept"), "every": 15, "keep": 9}  # after F0 F1 B0 of a round
    whole = run(f"{file}:TwoAndWait", 12, snapshots=kept)
    assert_equal(whole, run(TwoAndWait(), 12))
    first, *_ = snapshot_folders(storage(kept["path"]))
    again = run(
        f"{file}:TwoAndWait", 12, resume=f"{kept['path']}/{first}", snapshots={"path": None}
    )
    assert_equal(whole, again)
    other = run("trace", 12, resume=f"{kept['path']}/{first}", snapshots={"path": None})
    assert any("was taken of another run" in text for text in other.warnings)


def test_its_round_in_the_simulation(file):
    """Two samples in 6 ticks; each signal is sent a tick or more before it is taken."""
    config = Settings.model_validate(level_fields("level", f"{file}:TwoAndWait"))
    steps = step_graph(plan_of(chain(None, None, None), config, from_iterable(items()).spec))
    assert (steps.ticks, steps.samples) == (6, 2)
    assert len(steps.steps) == 2 * 6
    for arc in steps.arcs:
        sent, taken = steps.steps[arc.source], steps.steps[arc.target]
        assert taken.tick + 6 * arc.periods - sent.tick >= 1


def test_compared(file):
    words = ["compare", "digits", "--levels", f"trace,{file}:TwoAndWait", "--steps", "6"]
    done = CliRunner().invoke(app, [*words, "--out", "out", "--engine", "inprocess"])
    assert done.exit_code == 0, done.output
    assert "TwoAndWait" in done.output
    wrong = CliRunner().invoke(app, ["compare", "digits", "--levels", "nowhere.py:Level"])
    assert wrong.exit_code == 2
    assert "there is no file 'nowhere.py'" in wrong.output
    assert "centralised" not in wrong.output  # nothing has run


def talked_to(out, level, **fields):
    """Talk to a run, go on with it, and compare its weights with those of a replay."""
    data, fields = items(9), {"classes": 3, "out": out, "dtype": "float64", **fields}
    for resume in (None, out):
        with hamdist.start(
            chain(None, None, None), level=level, example=data[0], resume=resume, **fields
        ) as live:
            numbers = [
                live.feed(*data[k]) if k % 3 else live.predict(data[k][0]).number for k in range(9)
            ]
            live.snapshot()
            for k in (6, 0, 3):
                live.teach(numbers[k], data[k][1])
            live.feed(*data[4])
        again = hamdist.replay(out, chain(None, None, None))
        old, new = live.result.model.state_dict(), again.model.state_dict()
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert live.result.samples == 20
    return live.result


def test_talked_to(file, tmp_path):
    talked_to(tmp_path / "a", f"{file}:TwoAndWait")


@pytest.mark.ray
def test_talked_to_on_ray(session, file, tmp_path):
    talked_to(tmp_path / "a", f"{file}:TwoAndWait", engine={"kind": "ray", "actors": 2})


def test_what_verify_says(file):
    wrong = VerifiedLevel(f"{file}:WrongTable").table(3, OWN["WrongTable"].tables[3])
    assert wrong.difference == 1
    assert wrong.where == "7 | F3 | F2 | , by hand 7 |  | F2 | "
    fine = VerifiedLevel(f"{file}:TwoAndWait")
    assert fine.table(3, OWN["TABLE"]).difference == 0
    assert fine._resumed().difference == 0
    assert fine._cosine().difference < 1e-9
    names = [check.name for check, _ in zip(fine.checks(), range(2), strict=False)]
    assert names == [
        "its table of 3 block(s)",
        "every signal comes before it is used, over skips and delays, too",
    ]


@pytest.mark.ray
def test_a_killed_actor(session, file):
    assert VerifiedLevel(f"{file}:TwoAndWait")._killed().difference == 0
