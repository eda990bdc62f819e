"""Links between actors. Oracles: the formula of links.py by hand, and brute force over all delays;
the in-process engine with the same delays."""

from __future__ import annotations

import itertools
import math
import threading
import time

import pytest
import torch
from dynamics.helpers import bare, bare_chain, settings
from runtime.networks import PortableStream, chain, stream
from runtime.test_engines_equal import assert_equal

from hamdist.config import EngineSettings, Settings
from hamdist.dynamics.partition.apply_settings import delayed
from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.errors import WireError
from hamdist.runtime.placement.assign_blocks import Costs
from hamdist.runtime.placement.links import ROUNDS, Link, Probe, least_delays, pairs
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.signals.interrupts import Aborted
from hamdist.runtime.signals.signal import Channel, Signal
from hamdist.runtime.train.train import train
from hamdist.runtime.transport.delayed_receiver import DelayedReceiver
from hamdist.runtime.transport.endpoint import EndpointContext
from hamdist.runtime.transport.transport import Endpoints
from hamdist.streams import from_iterable
from hamdist.study.report.save import as_it_was
from hamdist.study.run.run import run_level

RUN = 78
CHANNEL = Channel(3, Kind.STATE, "a", "b", "a->b", 4)
LATE = 0.02

# -- a late link -----------------------------------------------------------------------------------


@pytest.fixture
def late(leaves_no_socket):
    """A sending and a receiving transport, whose signals come LATE seconds later."""
    aborts = threading.Event(), threading.Event()
    sender, receiver = Endpoints(RUN, aborts[0]), Endpoints(RUN, aborts[1], LATE)
    sender.connect(CHANNEL, receiver.bind(CHANNEL, "shm"))
    yield sender, receiver, aborts
    for endpoints in (sender, receiver):
        endpoints.close()


def signal(n):
    return Signal(Stamp(n, n, 0), torch.full((4,), float(n)))


@pytest.mark.timeout(30)
def test_no_signal_is_handed_out_before_its_time(late):
    """Those that are under way at once come LATE after they were sent, not one after the other."""
    sender, receiver, _ = late
    sent = []
    for n in range(4):
        sent.append(time.monotonic())
        sender.send(CHANNEL, signal(n))
    for n in range(4):
        got = receiver.receive(CHANNEL, Stamp(n, n, 0))
        assert time.monotonic() - sent[n] >= LATE
        assert got.stamp == Stamp(n, n, 0)
        assert torch.equal(got.payload, signal(n).payload)
    assert receiver.seconds["waiting"] > 0


@pytest.mark.timeout(30)
def test_a_wait_on_a_late_link_can_be_called_off(late):
    _, receiver, aborts = late
    aborts[1].set()
    with pytest.raises(Aborted):
        receiver.receive(CHANNEL, Stamp(0, 0, 0))


class Script:
    """A receiver that has everything at once: signals, then an error."""

    address = "nowhere"

    def __init__(self, line, many):
        self.line, self.left, self.many = line, many, many

    def receive(self, stamp):
        if self.line.abort.is_set():
            raise Aborted
        if not self.left:
            raise WireError("broken")
        self.left -= 1
        return signal(self.many - self.left - 1)

    def close(self):
        pass


@pytest.mark.timeout(30)
def test_an_error_comes_behind_the_signals_and_room_is_bounded():
    made = []

    def script(line):
        made.append(Script(line, 10))
        return made[0]

    late = DelayedReceiver(EndpointContext(RUN, threading.Event()), CHANNEL, 0.0, script)
    for n in range(10):
        assert late.receive(Stamp(n, n, 0)).stamp.tick == n
        assert 10 - made[0].left <= n + 1 + CHANNEL.capacity + 1
    with pytest.raises(WireError, match="broken"):
        late.receive(Stamp(10, 10, 0))
    late.close()


# -- measuring -------------------------------------------------------------------------------------


@pytest.mark.timeout(30)
def test_a_link_is_measured(leaves_no_socket):
    ends = Probe(RUN, 0.01), Probe(RUN, 0.01)
    there, back = Probe.channels(0)
    addresses = ends[1].open({there.number: "shm"}) | ends[0].open({back.number: "shm"})
    for end in ends:
        end.join(addresses)
    thread = threading.Thread(target=ends[1].answer, args=(0,))
    thread.start()
    link = ends[0].measure(0)
    thread.join()
    for end in ends:
        end.close()
    assert link.seconds >= 0.01
    assert link.bytes_per_second > 0
    assert ROUNDS > 4


# -- the least delays ------------------------------------------------------------------------------


def plan(graph, level="trace", outputs=1, **fields):
    source = from_iterable([(torch.zeros(2, 1).double(), torch.zeros(2, outputs).double())])
    return make_plan(graph, settings(level, **fields), source.spec)


def test_by_the_formula():
    """Blocks of 2 ms, two an actor: ticks of 4 ms; 25 ms of link and a quarter need 1 + 8."""
    made = plan(bare_chain(4))
    placement = [["b0", "b1"], ["b2", "b3"]]
    costs = Costs((2e-3,) * 4)
    assert pairs(made, placement) == {(0, 1)}
    found = least_delays(made, placement, costs, {(0, 1): Link(25e-3)})
    assert found == {"b0->b1": 1, "b1->b2": 9, "b2->b3": 1}
    # 16 bytes a signal at 1,000 bytes/s take 16 ms a sample, which is then a tick
    slow = {(0, 1): Link(25e-3, 1e3)}
    assert least_delays(made, placement, costs, slow)["b1->b2"] == 1 + math.ceil(1.25 * 41 / 16)
    # what actors spend on signals counts as work: 5 ms a tick
    dear = Costs((2e-3,) * 4, ((0, 1, 9.0), (1, 2, 1e-3)))
    assert least_delays(made, placement, dear, {(0, 1): Link(25e-3)})["b1->b2"] == 8


def test_bundles_need_as_much_more():
    """Of 3: the first of them waits for the last, 2 ticks."""
    made = plan(bare_chain(2), engine={"bundle": 3})
    found = least_delays(made, [["b0"], ["b1"]], Costs((4e-3, 4e-3)), {(0, 1): Link(25e-3)})
    assert found == {"b0->b1": 11}


def test_one_sample_at_a_time_gains_nothing():
    made = plan(bare_chain(2), "backprop")
    found = least_delays(made, [["b0"], ["b1"]], Costs((4e-3, 4e-3)), {(0, 1): Link(25e-3)})
    assert found == {"b0->b1": 1}


def test_held_samples_have_shorter_ticks():
    """At speed 4 a sample's 8 ms are four ticks of 2 ms."""
    made = plan(bare_chain(2), "local", locality={"speed": 4})
    found = least_delays(made, [["b0"], ["b1"]], Costs((8e-3, 8e-3)), {(0, 1): Link(25e-3)})
    assert found == {"b0->b1": 1 + math.ceil(1.25 * 25 / 2)}


def test_no_smaller_delays_would_do():
    """A diamond over three actors: every other choice that gives each crossing edge its time has
    some larger delay."""
    graph = bare("a: u", "b: a", "c: a", "d: b c a")
    made = plan(graph, outputs=3)
    placement = [["a"], ["b", "c"], ["d"]]
    links = {(0, 1): Link(2e-3), (1, 2): Link(1e-3), (0, 2): Link(3e-3)}
    needs = {"a->b": 4, "a->c": 4, "b->d": 3, "c->d": 3, "a->d": 5}
    found = least_delays(made, placement, Costs((1e-3, 5e-4, 5e-4, 1e-3)), links)

    def enough(delays):
        depths = delayed(graph, delays).depths
        edges = [name.split("->") for name in delays]
        return all(depths[c] - depths[p] >= needs[f"{p}->{c}"] for p, c in edges)

    assert enough(found)
    ways = itertools.product(range(1, 6), repeat=len(needs))
    for way in (dict(zip(needs, w, strict=True)) for w in ways):
        smaller = all(way[e] <= found[e] for e in needs) and way != found
        assert not (smaller and enough(way)), way


# -- in a run --------------------------------------------------------------------------------------


@pytest.mark.ray
def test_auto_hides_the_link_and_can_be_repeated(session, leaves_no_socket, tmp_path):
    """25 ms between actors; the run with what was chosen, in one process, equals it to the bit."""
    engine = {"kind": "ray", "actors": 2, "link_delay": 0.025}
    fields = {"level": "trace", "steps": 60, "seed": 5}
    partition = {"delays": "auto"}

    def run(engine, partition):
        given = {**fields, "engine": engine, "partition": partition}
        return train(chain(), stream(60), Settings.model_validate(given))

    spread = run(engine, partition)
    (crossing,) = [d for d in spread.delays.values() if d != 1]
    assert crossing >= 3
    assert "links" in spread.startup
    assert_equal(run({"kind": "inprocess"}, {"delays": spread.delays}), spread)


@pytest.mark.ray
def test_late_links_slices_and_delays_change_no_number(session, leaves_no_socket):
    engine = {"kind": "ray", "actors": 3, "link_delay": 0.005}
    partition = {"slices": {"block1": 3}, "delays": {"block0->block1": 4, "block1_*->block2": 3}}

    def run(engine):
        given = {"level": "trace", "steps": 40, "engine": engine, "partition": partition}
        return train(chain(), PortableStream(40), Settings.model_validate(given))

    alone, spread = run({}), run(engine)
    assert "block1_2" in alone.blocks
    assert_equal(alone, spread)


def test_the_settings_of_a_run_name_what_was_chosen():
    config = Settings.model_validate({"steps": 3, "partition": {"delays": "auto", "blocks": 2}})
    with pytest.warns(UserWarning, match="one process"):
        run, _ = run_level(config)
    written = as_it_was(config, run)
    assert written.partition.delays == run.delays == {"block0->block1": 1}
    assert written.engine.bundle == "off"
    assert as_it_was(written, run) is written
    assert EngineSettings().link_delay == 0
