"""What a placement goes by. Oracles: a clock that the modules themselves move, and tables made by
hand from the schedules of time-and-signals.md. The run that follows must notice nothing."""

from __future__ import annotations

import gc
import math
import os
import re
import signal
import threading

import psutil
import pytest
import torch
from dynamics.sequences import tangle
from runtime.engines.test_sequence_engines import PortableText
from runtime.networks import CLASSES, FEATURES, chain, skip_graph, stream
from torch import nn

from hamdist.config import Settings
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.schedule.events import Phase
from hamdist.runtime.advice.advice import placement_notes
from hamdist.runtime.placement import step_costs as module
from hamdist.runtime.placement.assign_blocks import Costs
from hamdist.runtime.placement.step_costs import (
    Unmeasured,
    in_flight,
    measure,
    measured_costs,
    unmeasured_costs,
    wants_costs,
)
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.process.interrupts import terminated_as_interrupted
from hamdist.runtime.timing.cluster_model import BYTES_PER_SECOND, LOCAL_SECONDS
from hamdist.runtime.train.prepare import as_graph

pytestmark = pytest.mark.timeout(60)


def plan_of(model, source=None, **fields):
    settings = Settings.model_validate({"level": "trace", **fields})
    spec = (stream(3) if source is None else source).spec
    return make_plan(as_graph(model, settings, spec, cross_entropy), settings, spec)


class Clock:
    """Stands still until a module moves it."""

    now = 0.0

    def __call__(self):
        return Clock.now


class Work(nn.Module):
    """Takes `seconds` on the clock, forward and backward alike."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        if x.device.type != "meta":
            Clock.now += self.seconds
            if x.requires_grad:
                x.register_hook(self.back)
        return x * 1

    def back(self, _):
        Clock.now += self.seconds


def worker(*seconds):
    layers = [nn.Sequential(nn.Linear(FEATURES, FEATURES), Work(s)) for s in seconds]
    return nn.Sequential(*layers, nn.Linear(FEATURES, CLASSES))


@pytest.mark.parametrize("level", ["trace", "backprop"])
def test_the_clock_of_the_modules(level):
    """A block whose module takes s forward and s backward takes 2 s a sample."""
    seconds = measure(plan_of(worker(1.0, 5.0, 2.0), level=level), Clock())
    both = [{Phase.FORWARD: s, Phase.BACKWARD: s} for s in (1.0, 5.0, 2.0)]
    assert [seconds[f"block{i}"] for i in range(4)] == [*both, {Phase.READ: 0.0}]
    assert seconds["u"] == {Phase.EMIT: 0.0}


def test_a_held_sample_is_worked_on_in_every_tick():
    held = plan_of(worker(1.0, 3.0), level="local", locality={"speed": 4})
    seconds = measure(held, Clock())
    assert [seconds[f"block{i}"][Phase.TICK] for i in range(3)] == [8.0, 24.0, 0.0]


CLOCKED = {"tau": "stamps", "c": 1.0, "beta": 0.01, "phi": 1.0, "eta": 0.1}
LEVELS = {
    "trace": {"level": "trace"},
    "local": {"level": "local"},
    "local, stamps": {"level": "local", "dynamics": CLOCKED},
    "backprop": {"level": "backprop"},
    "delay-free": {"level": "delay-free"},
}


def all_measured(plan):
    costs = measured_costs(plan, portable=True)
    assert len(costs.seconds) == len(plan.graph.blocks)
    return all(seconds > 0 for seconds in costs.seconds)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_can_be_measured(level):
    assert all_measured(plan_of(chain(), **LEVELS[level]))


def test_sequences_can_be_measured():
    assert all_measured(plan_of(tangle(), PortableText(words=True), level="bptt", dtype="float64"))


def test_several_readouts_and_skips():
    assert all_measured(plan_of(skip_graph()))


def test_nothing_of_it_is_seen():
    """Weights, buffers and every random number stay as they were."""
    model = nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES)
    )
    plan = plan_of(model)
    blocks = plan.graph.blocks.values()
    before = [{k: t.clone() for k, t in b.module.state_dict().items()} for b in blocks]
    state = torch.get_rng_state()
    measure(plan)
    assert torch.equal(state, torch.get_rng_state())
    for block, old in zip(blocks, before, strict=True):
        new = block.module.state_dict()
        assert all(torch.equal(new[key], old[key]) for key in old)


class Failing(nn.Module):
    def forward(self, x):
        if x.device.type != "meta":
            raise ArithmeticError("not today")
        return x


class Waiting(nn.Module):
    """Comes back when it is told to, and then touches what all of its process have in common."""

    go_on = threading.Event()
    came_back = threading.Event()

    def forward(self, x):
        if x.device.type != "meta":
            self.go_on.wait()
            torch.manual_seed(1)
            torch.set_num_threads(3)
            self.came_back.set()
        return x


def test_a_block_that_fails_is_a_reason():
    model = nn.Sequential(nn.Linear(FEATURES, 8), Failing(), nn.Linear(8, CLASSES))
    with pytest.raises(Unmeasured, match=r"block0.*not today"):
        measure(plan_of(model))


def test_a_block_that_does_not_come_back_is_a_reason(monkeypatch):
    monkeypatch.setattr(module, "GIVE_UP_SECONDS", 0.2)
    layers = [nn.Linear(FEATURES, 8), nn.Dropout(0.5), Waiting(), nn.Linear(8, CLASSES)]
    plan = plan_of(nn.Sequential(*layers))
    state, threads = torch.get_rng_state(), set(threading.enumerate())
    children = set(psutil.Process().children())
    with pytest.raises(Unmeasured, match="more than 0.2 s"):
        measure(plan)
    assert set(psutil.Process().children()) <= children
    Waiting.go_on.set()
    for thread in set(threading.enumerate()) - threads:  # nothing of it goes on beside the run
        thread.join(10)
    assert not Waiting.came_back.is_set()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_beside_threads_that_are_not_copied(threads):
    """OpenMP's of this process, of which a copy has none."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.mm(torch.ones(512, 512), torch.ones(512, 512))
        assert all_measured(plan_of(chain(width=256), engine={"threads": threads}))
    finally:
        torch.set_num_threads(before)


class Lost(nn.Module):
    def forward(self, x):
        if x.device.type != "meta":
            os.kill(os.getpid(), signal.SIGKILL)
        return x


class Farewell:
    """Part of a cycle: garbage that writes a file when it is collected."""

    def __init__(self, path):
        self.path, self.me = path, self

    def __del__(self):
        self.path.write_text(str(os.getpid()))


def test_garbage_of_the_driver_is_left_alone(tmp_path):
    def work():
        gc.collect()
        return "collected"

    path = tmp_path / "farewell"
    Farewell(path)
    assert module._in_child(work, 20) == "collected"
    assert not path.exists()
    gc.collect()
    assert path.read_text() == str(os.getpid())


def test_a_block_that_ends_its_process_is_a_reason():
    with pytest.raises(Unmeasured, match="ended before it had an answer"):
        measure(plan_of(nn.Sequential(nn.Linear(FEATURES, 8), Lost(), nn.Linear(8, CLASSES))))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"level": "trace"}, 9.0),  # D = 4: nine ticks to the readout and back, one sample a tick
        ({"level": "trace", "locality": {"speed": 3}}, 3.0),
        ({"level": "backprop"}, 1.0),
        ({"level": "backprop", "locality": {"speed": 100}}, 1.0),
        ({"level": "local"}, math.inf),
        ({"level": "local", "locality": {"speed": "inf"}}, math.inf),
    ],
)
def test_samples_in_flight(fields, expected):
    assert in_flight(plan_of(chain(), **fields)) == expected


def cross(*numbers):
    """Seconds of one end for float32 signals of these many numbers."""
    return sum(LOCAL_SECONDS + 4 * n / BYTES_PER_SECOND for n in numbers)


def test_what_crosses_in_a_chain():
    """Batch 4, width 8: state and message of an edge; the targets (4 int64) go from the stream,
    which lives with block 0, to block 2."""
    costs = measured_costs(plan_of(chain(depth=3)), portable=True)
    target = LOCAL_SECONDS + 8 * 4 / BYTES_PER_SECOND
    assert {(i, j): s for i, j, s in costs.crossings} == pytest.approx(
        {(0, 1): cross(32, 32), (1, 2): cross(32, 32), (0, 2): target}
    )


def test_what_crosses_where_samples_are_held():
    """Three ticks a sample: three states and three messages; the driver's stream crosses anyway."""
    plan = plan_of(chain(depth=3), level="local", locality={"speed": 3})
    costs = measured_costs(plan, portable=False)
    assert {(i, j): s for i, j, s in costs.crossings} == pytest.approx(
        {(0, 1): 3 * cross(32, 32), (1, 2): 3 * cross(32, 32)}
    )


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"engine": {"kind": "ray", "actors": 2}}, True),
        ({"engine": {"kind": "ray", "actors": 1}}, False),
        ({"engine": {"kind": "ray", "actors": 5}}, False),  # one each
        ({"engine": {"kind": "ray", "actors": 2, "balance": "parameters"}}, False),
        ({"engine": {"placement": [["block0", "block1", "block2", "block3", "block4"]]}}, False),
        ({"engine": {"address": "host:1"}}, True),
        ({"engine": {"address": "host:1"}, "level": "backprop"}, False),
    ],
)
def test_measured_only_where_it_matters(fields, wanted):
    assert wants_costs(plan_of(chain(), **fields)) is wanted


def test_one_sample_at_a_time_is_known_without_measuring():
    costs = unmeasured_costs(plan_of(chain(), level="backprop"))
    assert costs is not None
    assert costs.in_flight == 1.0
    assert unmeasured_costs(plan_of(chain(), level="trace")) is None


ALONE = [["block0", "block1", "block2", "block3", "block4"]]
MICROSECONDS = (1e-6,) * 5
BUSY_EDGES = tuple((i, i + 1, 48e-6) for i in range(4))


@pytest.mark.parametrize(
    ("fields", "costs", "words"),
    [
        ({"level": "backprop"}, Costs(MICROSECONDS, (), 1.0), "one sample is in the network"),
        # two actors: three blocks and one end of an edge
        ({}, Costs(MICROSECONDS, BUSY_EDGES), "work 5 µs a sample, spread .* would take 51 µs"),
        ({}, None, "one processor"),
    ],
)
def test_one_actor_says_why(fields, costs, words):
    (note,) = placement_notes(plan_of(chain(), **fields), ALONE, costs)
    assert re.search(words, note)
    assert "--engine inprocess" in note


@pytest.mark.parametrize("engine", [{"actors": 1}, {"placement": ALONE}])
def test_one_actor_that_was_asked_for_is_no_news(engine):
    assert placement_notes(plan_of(chain(), engine=engine), ALONE, None) == []


def test_a_signal_while_the_child_is_forked_is_not_lost(monkeypatch):
    """It may be the only one that a scheduler sends; the child, which has it too, ends as ever."""
    fork, children = os.fork, []

    def signalled():
        os.kill(os.getpid(), signal.SIGTERM)
        children.append(fork())
        return children[-1]

    monkeypatch.setattr("os.fork", signalled)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), terminated_as_interrupted():
        module._in_child(lambda: "measured", 20)
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)
