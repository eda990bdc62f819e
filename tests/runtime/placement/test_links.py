"""Links between actors. Oracles: the formula of links.py by hand, and brute force over all delays;
the in-process engine with the same delays."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import deque

import pytest
import torch
from dynamics.helpers import bare, bare_chain, settings
from runtime.engines.test_engines_equal import assert_equal
from runtime.networks import PortableStream, chain, stream

from hamdist.config import EngineSettings, Settings
from hamdist.dynamics.schedule.events import Kind, Phase, Stamp
from hamdist.errors import WireError
from hamdist.runtime.placement.links import (
    IN_TIME,
    MARGIN,
    WORSE,
    Probe,
    as_measured,
    cluster_of,
    least_delays,
    signals_of,
)
from hamdist.runtime.plan.derived import with_delays
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.ray_engine import wired_workers
from hamdist.runtime.signals.signal import Aborted, Channel, Signal
from hamdist.runtime.timing.cluster_model import (
    BYTES_PER_SECOND,
    REMOTE_SECONDS,
    Link,
)
from hamdist.runtime.timing.timed_graph import TimingModel
from hamdist.runtime.train.train import train
from hamdist.runtime.transport.endpoint import EndpointContext
from hamdist.runtime.transport.threaded_ends import DelayedReceiver
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
@pytest.mark.parametrize("nbytes", [0, 1000])
@pytest.mark.parametrize("way", ["shm", "tcp://127.0.0.1"])
def test_a_link_is_measured(leaves_no_socket, way, nbytes):
    ends = Probe(RUN, 0.01), Probe(RUN, 0.01)
    there, back = Probe.channels(0)
    addresses = ends[1].open({there.number: way}) | ends[0].open({back.number: way})
    for end in ends:
        end.join(addresses)
    thread = threading.Thread(target=ends[1].answer, args=(0, nbytes))
    thread.start()
    link = ends[0].measure(0, nbytes, 0.001)
    thread.join()
    for end in ends:
        end.close()
    assert link.seconds >= 0.01
    assert link.bytes_per_second > 0


class FakeLink:
    """Endpoints of a probe on a clock of their own: signals take LATE one way, queue behind others
    at `rate` bytes a second, and come `late(n)` seconds later, in order. Answers take LATE."""

    def __init__(self, rate, late):
        self.rate, self.late = rate, late
        self.now = self.free = self.newest = 100.0
        self.sent, self.most, self.answers = 0, 0, deque()

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def send(self, channel, signal):
        assert channel.kind is Kind.STATE
        self.free = max(self.free, self.now) + signal.payload.nbytes / self.rate
        self.newest = max(self.newest, self.free + LATE + self.late(self.sent))
        self.sent += 1
        self.answers.append((self.newest + LATE, self.newest + 1000.0))
        self.most = max(self.most, len(self.answers))

    def receive(self, channel, stamp):
        due, came = self.answers.popleft()
        self.now = max(self.now, due)
        return Signal(stamp, torch.tensor(came, dtype=torch.float64))


def measured(monkeypatch, fake, *arguments, room=1024):
    monkeypatch.setattr("hamdist.runtime.placement.links.time", fake)
    probe = Probe(RUN, 0.0)
    probe._endpoints, probe._room = fake, {0: room}
    return probe.measure(0, *arguments)


NBYTES = 10_000


@pytest.mark.parametrize("rate", [1e5, 1e6, 1e9])
@pytest.mark.parametrize("every", [0.02, 0.002])
def test_a_link_is_measured_at_the_runs_pace(monkeypatch, rate, every):
    """The rate is the link's, or the run's if that is less; signals at 0.9 of it do not queue, so
    that a signal's own bytes are all that comes to LATE, of which the quickest one has as many."""
    link = measured(monkeypatch, FakeLink(rate, lambda _: 0.0), NBYTES, every)
    assert link.bytes_per_second == pytest.approx(min(rate, NBYTES / every), rel=0.1)
    assert link.seconds == pytest.approx(LATE, rel=0.05)


def test_the_latency_is_one_within_which_nearly_all_signals_come(monkeypatch):
    """Every 20th takes 60 ms more, and holds up those behind it: at one in 10 ms, 6 of 20 are late,
    by 60, 50, ... 10 ms. (One in 400 is 2 s late: too seldom to count.)"""
    fake = FakeLink(1e9, lambda n: 2.0 if n == 30 else 0.06 * (n % 20 == 0))
    link = measured(monkeypatch, fake, NBYTES, 0.01)
    assert MARGIN * link.seconds == pytest.approx(LATE + 0.06, rel=0.02)
    assert measured(monkeypatch, FakeLink(1e9, fake.late)).seconds == pytest.approx(LATE, rel=0.02)


@pytest.mark.parametrize("late", [0, 1])
def test_the_latency_counts_from_a_signal_that_nothing_holds_up(monkeypatch, late):
    """Every second takes 60 ms more: at one in 10 ms the others are held up, by 50 ms."""
    link = measured(monkeypatch, FakeLink(1e9, lambda n: 0.06 * (n % 2 == late)), NBYTES, 0.01)
    assert MARGIN * link.seconds == pytest.approx(LATE + 0.06, rel=0.02)


@pytest.mark.parametrize("nbytes", [0, NBYTES])
def test_the_run_s_signals_are_measured_beside_a_thread_that_computes(monkeypatch, nbytes):
    """As in a run, where they wait for a processor, too."""
    computing: list[bool] = []

    class Watched(FakeLink):
        def send(self, channel, signal):
            names = [thread.name for thread in threading.enumerate()]
            computing.append("hamdist computing" in names)
            super().send(channel, signal)

    measured(monkeypatch, Watched(1e6, lambda _: 0.0), nbytes, 0.01)
    assert set(computing) == {nbytes > 0}
    assert "hamdist computing" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("room", [4, 1024])
def test_what_is_under_way_is_bounded(monkeypatch, room):
    """By the channel's room, which both ends have; and on a slow link by what it carries."""
    fast, slow = FakeLink(1e12, lambda _: 0.0), FakeLink(2e6, lambda _: 0.0)
    measured(monkeypatch, fast, NBYTES, 1e-5, room=room)
    assert fast.most <= room
    measured(monkeypatch, slow, NBYTES, 1e-5, room=room)
    assert slow.most <= min(room, 15 + 2 * (4 * LATE + 0.01) * 2e6 / NBYTES)


# -- the least delays ------------------------------------------------------------------------------


def plan(graph, level="trace", outputs=1, **fields):
    source = from_iterable([(torch.zeros(2, 1).double(), torch.zeros(2, outputs).double())])
    return make_plan(graph, settings(level, **fields), source.spec)


def model_of(plan, forward, backward, readout):
    """Blocks b0, b1, ... with the seconds of their passes; the last one is the readout."""
    *blocks, last = plan.graph.blocks
    phases = {Phase.FORWARD: forward, Phase.BACKWARD: backward}
    seconds = dict.fromkeys(blocks, phases) | {last: {Phase.READ: readout}}
    return TimingModel(plan, seconds, blocks[0])


ALONE = {"bundle": "off"}


def fewest(model, placement, links):
    return least_delays(model, placement, range(len(placement)), cluster_of(placement, links))


def ring(d, f, g, r, link):
    """Two blocks, a link of d ticks. Block 0 does, in each tick, the forward pass of a new sample,
    then the backward pass of the one from 2 d ticks before, whose message it needs: once around,
    f + link + r + link + g, the cycle spans 2 d + 1 samples. Every message costs either end
    REMOTE; block 1 gets its targets across, too."""
    each = REMOTE_SECONDS + 2 * 8 / BYTES_PER_SECOND
    b0, b1 = f + g + 3 * each, r + 3 * each
    return max(b0, b1, (b0 + b1 + 2 * link) / (2 * d + 1))


@pytest.mark.parametrize("link", [0.0, 2e-3, 25e-3, 80e-3])
def test_the_period_of_a_ring(link):
    links = {(0, 1): Link(link)}
    for d in (1, 2, 7):
        model = model_of(plan(bare_chain(2, delay=d), engine=ALONE), 1e-3, 3e-3, 2e-3)
        placement = [["b0"], ["b1"]]
        timed = model.timed(placement, [0, 1], cluster_of(placement, links))
        assert timed.period().seconds == pytest.approx(ring(d, 1e-3, 3e-3, 2e-3, link))


@pytest.mark.parametrize("link", [0.0, 2e-3, 25e-3, 80e-3])
def test_the_least_delay_of_a_ring(link):
    model = model_of(plan(bare_chain(2)), 1e-3, 3e-3, 2e-3)
    aim = ring(1, 1e-3, 3e-3, 2e-3, 0.0) * (1 + WORSE)
    least = next(d for d in range(1, 99) if ring(d, 1e-3, 3e-3, 2e-3, MARGIN * link) <= aim)
    assert fewest(model, [["b0"], ["b1"]], {(0, 1): Link(link)}) == {"b0->b1": least}


@pytest.mark.parametrize("blocks", [3, 5])
def test_of_links_that_are_equally_slow_every_one_is_hidden(blocks):
    """A chain of a block an actor: two blocks and their link alone make the same ring."""
    model = model_of(plan(bare_chain(blocks)), 1e-3, 1e-3, 2e-3)
    placement = [[name] for name in model.plan.graph.blocks]
    links = {(i, i + 1): Link(25e-3) for i in range(blocks - 1)}
    found = fewest(model, placement, links)
    slower = cluster_of(placement, links).slowed(MARGIN)

    def period(delays, cluster):
        other = dataclasses.replace(model, plan=with_delays(model.plan, delays))
        return other.timed(placement, range(blocks), cluster).period().seconds

    alone = period(dict.fromkeys(found, 1), cluster_of(placement, {}))
    assert period(found, slower) <= alone * (1 + WORSE)
    for name, ticks in found.items():
        assert ticks > 1
        assert period({**found, name: ticks - 1}, slower) > alone * (1 + WORSE)


@pytest.mark.parametrize("rate", [1e9, 8e3, 5e3, 2e3])
def test_bytes_on_their_way_are_hidden_up_to_what_the_links_carry(rate):
    """Each way 16 bytes a sample: 2 ms of 8,000 bytes a second, within the work of a sample, which
    nothing may exceed then; 3.2 ms of 5,000, which the links alone take whatever the delays."""
    model = model_of(plan(bare_chain(3), engine=ALONE), 1e-3, 1e-3, 1e-3)
    placement = [["b0"], ["b1"], ["b2"]]
    links = {(i, i + 1): Link(25e-3, rate) for i in range(2)}
    found = fewest(model, placement, links)

    def period(delays, cluster):
        other = dataclasses.replace(model, plan=with_delays(model.plan, delays))
        return other.timed(placement, range(3), cluster).period().seconds

    alone = period(dict.fromkeys(found, 1), cluster_of(placement, {}))
    aim = max(alone * (1 + WORSE), 16 / rate * (1 + 1e-9))
    slower = cluster_of(placement, links).slowed(MARGIN)
    assert period(found, slower) <= aim
    for name, ticks in found.items():
        assert period({**found, name: ticks - 1}, slower) > aim


def test_a_plan_hides_what_a_run_would_measure():
    """Signals that vary and are lost: the latency within which nearly all of them come."""
    model = model_of(plan(bare_chain(2), engine=ALONE), 1e-3, 3e-3, 2e-3)
    placement = [["b0"], ["b1"]]
    link = Link(25e-3, 1e7, sigma=0.3, loss=0.02)
    cluster = as_measured(model, placement, [0, 1], cluster_of(placement, {(0, 1): link}))
    nbytes, every = signals_of(model, placement)
    late = link.within(IN_TIME, max(nbytes.values()), every)
    assert late > 0.2  # a retransmission
    assert cluster.links == dict.fromkeys([(0, 1), (1, 0)], Link(late / MARGIN, 1e7))
    steady = cluster_of(placement, {(0, 1): Link(25e-3)})
    assert as_measured(model, placement, [0, 1], steady).links == steady.links


def test_one_sample_at_a_time_gains_nothing():
    model = model_of(plan(bare_chain(2), "backprop"), 1e-3, 3e-3, 4e-3)
    assert fewest(model, [["b0"], ["b1"]], {(0, 1): Link(25e-3)}) == {"b0->b1": 1}


def test_a_bundle_uses_its_delay_up():
    """Of 3: the first of them waits for the last, two ticks, there and back."""
    alone = model_of(plan(bare_chain(2), engine={"bundle": "off"}), 1e-3, 3e-3, 4e-3)
    bundled = model_of(plan(bare_chain(2), engine={"bundle": 3}), 1e-3, 3e-3, 4e-3)
    links = {(0, 1): Link(25e-3)}
    (one,) = fewest(alone, [["b0"], ["b1"]], links).values()
    (three,) = fewest(bundled, [["b0"], ["b1"]], links).values()
    assert one + 1 <= three <= one + 2


@pytest.mark.parametrize("level", ["local", "trace"])
def test_no_smaller_delays_would_do(level):
    """A diamond over three actors, two ticks a sample: every choice that is smaller on some edges
    and larger on none has a longer period."""
    graph = bare("a: u", "b: a", "c: a", "d: b c a")
    model = model_of(plan(graph, level, 3, locality={"speed": 2}), 1e-3, 5e-4, 1e-3)
    if level == "local":
        seconds = {name: {Phase.TICK: 2e-3} for name in graph.blocks}
        model = TimingModel(model.plan, seconds, "a")
    placement = [["a"], ["b", "c"], ["d"]]
    links = {(0, 1): Link(2e-3), (1, 2): Link(1e-3), (0, 2): Link(3e-3)}
    slower = {pair: Link(MARGIN * link.seconds) for pair, link in links.items()}

    def period(delays, links):
        other = dataclasses.replace(model, plan=with_delays(model.plan, delays))
        return other.timed(placement, [0, 1, 2], cluster_of(placement, links)).period().seconds

    found = fewest(model, placement, links)
    aim = (1 + WORSE) * period(dict.fromkeys(found, 1), {})
    assert period(found, slower) <= aim
    assert max(found.values()) > 1
    for name, d in found.items():
        assert d == 1 or period({**found, name: d - 1}, slower) > aim


# -- in a run --------------------------------------------------------------------------------------


@pytest.mark.ray
def test_auto_hides_the_link_and_can_be_repeated(session, leaves_no_socket, monkeypatch):
    """25 ms between actors, on one host, where a link carries any number of bytes (a ring's few
    slots do not, of messages that come late); the run with what was chosen, in one process, equals
    it to the bit."""
    measured = []

    def recorded(model, placement, hosts, cluster):
        measured.extend(cluster.links.values())
        return least_delays(model, placement, hosts, cluster)

    monkeypatch.setattr(wired_workers, "least_delays", recorded)
    engine = {"kind": "ray", "actors": 2, "link_delay": 0.025}
    fields = {"level": "trace", "steps": 60, "seed": 5}
    partition = {"delays": "auto"}

    def run(engine, partition):
        given = {**fields, "engine": engine, "partition": partition}
        return train(chain(), stream(60), Settings.model_validate(given))

    spread = run(engine, partition)
    (crossing,) = [d for d in spread.delays.values() if d != 1]
    assert crossing >= 3
    assert len(measured) == 2
    for link in measured:
        assert link.seconds >= 0.025
        assert link.bytes_per_second == math.inf
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
