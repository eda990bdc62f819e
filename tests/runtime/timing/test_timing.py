"""How long a run takes. Oracles: closed forms of a ring, a bottleneck and a shared link; the order
in which the in-process engine steps its nodes; brute force over all cycles; and, between the three
ways to the same period, each other."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from dynamics.helpers import bare, bare_chain, settings
from dynamics.sequences import tangle
from runtime.engines.test_sequence_engines import PortableText
from runtime.networks import chain, cycle_graph, skip_graph, stream

from hamdist.config import Settings
from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.schedule.events import Phase
from hamdist.errors import SettingsError
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.loop import run_loop
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.timing.cluster_model import (
    BYTES_PER_SECOND,
    REMOTE_SECONDS,
    ClusterModel,
    FailureModel,
    HostModel,
    Link,
)
from hamdist.runtime.timing.cycle_ratio import NoPeriodError, max_cycle_ratio
from hamdist.runtime.timing.disturbances import Disturbances, SnapshotModel
from hamdist.runtime.timing.simulations import EventSimulation, Recursion
from hamdist.runtime.timing.step_graph import step_graph
from hamdist.runtime.timing.timed_graph import TimingModel
from hamdist.runtime.train.prepare import as_graph
from hamdist.streams import from_iterable

pytestmark = pytest.mark.timeout(60)


def plan_of(graph, level="trace", outputs=1, **fields):
    source = from_iterable([(torch.zeros(2, 1).double(), torch.zeros(2, outputs).double())])
    return make_plan(graph, settings(level, **fields), source.spec)


def own_plan(model, source, **fields):
    given = Settings.model_validate(fields)
    return make_plan(as_graph(model, given, source.spec, cross_entropy), given, source.spec)


# -- the steps, against the in-process engine ------------------------------------------------------


CASES = {
    "trace": lambda: (own_plan(chain(), stream(60), level="trace"), stream(60)),
    "speed 3": lambda: (
        own_plan(chain(), stream(60), level="trace", locality={"speed": 3}),
        stream(60),
    ),
    "backprop": lambda: (own_plan(chain(), stream(60), level="backprop"), stream(60)),
    "pipeline": lambda: (
        own_plan(chain(), stream(60), level="pipeline", locality={"microbatches": 2}),
        stream(60),
    ),
    "heads": lambda: (own_plan(chain(), stream(60), level="heads"), stream(60)),
    "local": lambda: (
        own_plan(chain(), stream(60), level="local", locality={"speed": 2}),
        stream(60),
    ),
    "delay-free": lambda: (own_plan(chain(), stream(60), level="delay-free"), stream(60)),
    "skips": lambda: (own_plan(skip_graph(), stream(60), level="trace"), stream(60)),
    "cycle": lambda: (own_plan(cycle_graph(), stream(60), level="local"), stream(60)),
}


class Watched(Mailbox):
    """A mailbox that records which step took a signal, and which one had sent it."""

    def __init__(self, inside):
        super().__init__(inside)
        self.now, self.sent, self.seen = None, {}, []

    def post(self, channel, signal):
        self.sent[channel.number, signal.stamp] = self.now
        super().post(channel, signal)

    def take(self, channel, stamp, tick):
        self.seen.append((self.sent[channel.number, stamp], self.now, channel.number))
        return super().take(channel, stamp, tick)


@pytest.mark.parametrize("case", CASES)
def test_steps_and_signals_are_those_of_the_engine(case):
    """Order of the steps, and who waits for whom, over the periods in the middle of a run."""
    plan, source = CASES[case]()
    mailbox = Watched({INPUT, *plan.graph.blocks})
    nodes = [SourceNode(plan, source, mailbox)]
    nodes += [make_node(plan, name, mailbox) for name in plan.graph.blocks]
    done = []

    class Stepped:
        def __init__(self, node):
            self.node, self.name, self.late = node, node.name, node.late

        tick = property(lambda self: self.node.tick)

        def start(self):
            self.node.start()

        def step(self):
            event = self.node.event
            mailbox.now = (self.name, event.phase, event.tick)
            done.append(mailbox.now)
            self.node.step()

    run_loop([Stepped(node) for node in nodes])
    graph = step_graph(plan)
    begin = 25 * graph.ticks
    found = [(step.node, step.phase, begin + step.tick) for step in graph.steps]
    assert found == [one for one in done if begin <= one[2] < begin + graph.ticks]

    def absolute(place, periods_ago):
        step = graph.steps[place]
        return step.node, step.phase, begin + step.tick - periods_ago * graph.ticks

    waits = {
        (absolute(arc.source, arc.periods), absolute(arc.target, 0), arc.channel.number)
        for arc in graph.arcs
        if arc.channel.bundle == 1
    }
    channels = {c.number for c in plan.channels.all() if c.bundle == 1}
    real = {
        (sender, taker, number)
        for sender, taker, number in mailbox.seen
        if begin <= taker[2] < begin + graph.ticks and number in channels
    }
    assert waits == real


def test_sequences_are_unrolled_once():
    """Every token passes every block forward and backward, and a period is a whole sequence."""
    source = PortableText(words=True)
    plan = own_plan(tangle(), source, level="bptt", dtype="float64")
    graph = step_graph(plan, tokens=3)
    assert graph.samples == 3
    for name in plan.graph.blocks:
        phases = [step.phase for step in graph.steps if step.node == name]
        assert phases.count(Phase.FORWARD) == phases.count(Phase.BACKWARD) == 3
    assert all(arc.periods >= 0 for arc in graph.arcs)


def test_a_held_sample_of_too_many_ticks_is_refused():
    plan = plan_of(bare_chain(3), "local", locality={"speed": 10**6})
    with pytest.raises(SettingsError, match=r"locality.speed: a sample makes 1,000,000 ticks"):
        step_graph(plan)


# -- the maximum cycle ratio -----------------------------------------------------------------------


def every_cycle(n, arcs):
    """The largest ratio over all simple cycles, each found from its least node."""
    best = -math.inf
    for start in range(n):
        paths = [(start, 0.0, 0, {start})]
        while paths:
            at, seconds, periods, seen = paths.pop()
            for source, target, w, k in arcs:
                if source != at:
                    continue
                if target == start:
                    best = max(best, (seconds + w) / (periods + k))
                elif target > start and target not in seen:
                    paths.append((target, seconds + w, periods + k, seen | {target}))
    return best


@pytest.mark.parametrize("seed", range(60))
def test_no_cycle_is_slower(seed):
    draw = random.Random(seed)
    n = draw.randint(1, 7)
    arcs = [(i, (i + 1) % n, draw.randint(0, 20), 1 if i == n - 1 else 0) for i in range(n)]
    for _ in range(draw.randint(0, 10)):
        a, b = draw.randrange(n), draw.randrange(n)
        arcs.append((a, b, draw.randint(0, 20), draw.randint(b <= a, 2)))
    sources, targets, seconds, periods = (np.array(column) for column in zip(*arcs, strict=True))
    ratio, cycle = max_cycle_ratio(sources, targets, seconds.astype(float), periods)
    assert ratio == pytest.approx(every_cycle(n, arcs))
    assert ratio == pytest.approx(seconds[cycle].sum() / periods[cycle].sum())
    for one, after in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        assert targets[one] == sources[after]


def test_events_that_wait_for_each_other_have_no_period():
    """A cycle that takes time and no period would gain for ever."""
    places, seconds = np.array([0, 1]), np.array([1.0, 2.0])
    with pytest.raises(NoPeriodError, match="wait for each other"):
        max_cycle_ratio(places, places[::-1].copy(), seconds, np.array([0, 0]))


# -- periods ---------------------------------------------------------------------------------------


def model_of(plan, seconds):
    """b0, b1, ... take `seconds`, half of it forward; the last one reads."""
    phases = {
        name: {Phase.FORWARD: s / 2, Phase.BACKWARD: s / 2}
        for name, s in zip(plan.graph.blocks, seconds, strict=True)
    }
    last = [*plan.graph.blocks][-1]
    return TimingModel(
        plan, phases | {last: {Phase.READ: seconds[-1]}}, next(iter(plan.graph.blocks))
    )


def hosts(number, link=None, **fields):
    ways = [(i, j) for i in range(number) for j in range(number) if i != j]
    links = {} if link is None else dict.fromkeys(ways, link)
    return ClusterModel([HostModel(f"h{i}", **fields) for i in range(number)], links)


def rate(ends):
    half = len(ends) // 2
    return (ends[-1].max() - ends[half - 1].max()) / (len(ends) - half)


def test_the_slowest_block_is_the_bottleneck():
    """Alone on its actor: its own 9 ms and four messages."""
    model = model_of(plan_of(bare_chain(4)), [1e-3, 9e-3, 1e-3, 2e-3])
    period = model.timed([["b0"], ["b1"], ["b2"], ["b3"]], [0, 1, 2, 3], hosts(4)).period()
    each = REMOTE_SECONDS + 16 / BYTES_PER_SECOND
    assert period.seconds == pytest.approx(9e-3 + 4 * each)
    assert period.words == "limited by b1: 100 % work"


def test_bundles_of_micro_batches_end_with_their_sample():
    """A sample's last parts do not wait for the next sample's, which wait for them."""
    fields = {"locality": {"microbatches": 4}, "partition": {"delay": 5}, "engine": {"bundle": 2}}
    plan = own_plan(chain(), stream(60), level="pipeline", **fields)
    model = model_of(plan, [1e-3] * len(plan.graph.blocks))
    groups = [[name] for name in plan.graph.blocks]
    period = model.timed(groups, [*range(len(groups))], hosts(len(groups))).period()
    assert 0 < period.seconds < 1


def test_a_slow_host_and_a_slow_link_are_named():
    model = model_of(plan_of(bare_chain(2)), [1e-3, 1e-3])
    slow = ClusterModel([HostModel("fast"), HostModel("slow", speed=0.1)])
    period = model.timed([["b0"], ["b1"]], [0, 1], slow).period()
    assert period.seconds == pytest.approx(
        10 * (1e-3 + 3 * (REMOTE_SECONDS + 16 / BYTES_PER_SECOND))
    )
    narrow = hosts(2, Link(0.0, 1e3))  # 32 bytes there in a tick, state and target
    period = model.timed([["b0"], ["b1"]], [0, 1], narrow).period()
    assert period.seconds == pytest.approx(32e-3)
    assert "wire" in period.words


def test_thousands_of_blocks_need_few_rounds():
    """(Ten thousand: 0.3 s of one processor.)"""
    n = 3_000
    draw = random.Random(1)
    sources, targets, seconds, periods = [], [], [], []
    for i in range(n):  # two steps of each block, messages to the next and back
        arcs = [(2 * i, 2 * i + 1, 0), (2 * i + 1, 2 * i, 1)]
        if i < n - 1:
            arcs += [(2 * i, 2 * i + 2, 1), (2 * i + 3, 2 * i + 1, 1)]
        for a, b, k in arcs:
            sources.append(a)
            targets.append(b)
            seconds.append(draw.random())
            periods.append(k)
    ratio, _ = max_cycle_ratio(*map(np.array, (sources, targets, seconds, periods)))
    own = [seconds[4 * i] + seconds[4 * i + 1] for i in range(n)]
    around = [own[i] / 2 + own[i + 1] / 2 for i in range(n - 1)]
    assert ratio >= max(own) >= max(around)


# -- three ways to one period ----------------------------------------------------------------------


@pytest.mark.parametrize("level", ["trace", "backprop", "local", "heads"])
@pytest.mark.parametrize("link", [Link(3e-3), Link(3e-3, 1e4), Link(0.05)])
def test_recursion_and_events_reach_the_period(level, link):
    plan = plan_of(bare_chain(5), level)
    model = model_of(plan, [1e-3, 2e-3, 3e-3, 1e-3, 2e-3])
    if level == "local":
        model = TimingModel(plan, {f"b{i}": {Phase.TICK: 1e-3 * (i + 1)} for i in range(5)}, "b0")
    timed = model.timed([["b0", "b1"], ["b2"], ["b3", "b4"]], [0, 1, 2], hosts(3, link))
    assert not timed.shared
    expected = timed.period().seconds
    one = Recursion(timed, Disturbances(timed)).run(400)
    assert one == pytest.approx(EventSimulation(timed, Disturbances(timed)).run(400))
    assert rate(one) == pytest.approx(expected, rel=0.02)


def test_long_chains_of_one_actor_agree_with_short_ones():
    """20 blocks on two actors: the running maximum of all chains at once, against the events."""
    model = model_of(plan_of(bare_chain(20)), [1e-3 * (1 + i % 3) for i in range(20)])
    placement = [[f"b{i}" for i in own] for own in (range(12), range(12, 20))]
    timed = model.timed(placement, [0, 1], hosts(2, Link(0.08)))
    found = Recursion(timed, Disturbances(timed)).run(300)
    assert found == pytest.approx(EventSimulation(timed, Disturbances(timed)).run(300))


def test_a_channel_has_room_for_so_many_signals():
    """Labels and states go one way: the first block could run away from the last, but the channel
    holds `capacity` signals, and one more is in the making."""
    plan = plan_of(bare_chain(2), "heads")
    model = model_of(plan, [1e-3, 9e-3])
    timed = model.timed([["b0"], ["b1"]], [0, 0])
    ends = Recursion(timed, Disturbances(timed)).run(200)
    room = next(c.capacity for c in plan.channels.all() if c.edge == "b0->b1")
    ahead = [np.searchsorted(ends[:, 0], ends[n, 1]) - n for n in range(100)]
    assert max(ahead) <= room + 2
    assert max(ahead) >= room - 1


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_actors_share_processors(cores):
    """Four equally busy actors that never wait for long: their work over the cores."""
    model = model_of(plan_of(bare_chain(4)), [2e-3] * 4)
    cluster = ClusterModel([HostModel("one", cores=cores)])
    timed = model.timed([[f"b{i}"] for i in range(4)], [0] * 4, cluster)
    assert timed.shared
    period = timed.period()
    assert period.seconds == pytest.approx(sum(timed.busy) / cores)
    assert f"4 actors on {cores} core(s) of one" in period.words
    ends = EventSimulation(timed, Disturbances(timed)).run(400)
    assert rate(ends) == pytest.approx(period.seconds, rel=0.02)


def test_transfers_share_a_way_up():
    """a sends b, c and d 16 bytes each, and 48 of targets, through 10 kB/s: 6.4 ms a sample."""
    graph = bare("a: u", "b: a", "c: a", "d: b c a")
    model = TimingModel(plan_of(graph, outputs=3), {}, "a")
    cluster = ClusterModel(
        [HostModel("x", up=1e4), HostModel("y"), HostModel("z")],
        {(i, j): Link(1e-3) for i, j in itertools.permutations(range(3), 2)},
    )
    timed = model.timed([["a"], ["b"], ["c", "d"]], [0, 1, 2], cluster)
    sent = 16 * 3 + 48
    assert timed.period().seconds == pytest.approx(sent / 1e4)
    assert timed.period().words == "limited by link up of x: 100 % wire"
    ends = EventSimulation(timed, Disturbances(timed)).run(200)
    assert rate(ends) == pytest.approx(sent / 1e4, rel=0.02)


def test_jitter_is_drawn_by_seed_and_never_faster_than_the_mean():
    model = model_of(plan_of(bare_chain(3)), [1e-3] * 3)
    timed = model.timed([["b0"], ["b1", "b2"]], [0, 1], hosts(2, Link(0.02, sigma=0.3, loss=0.01)))
    one, again = (Recursion(timed, Disturbances(timed, seed=4)).run(500) for _ in range(2))
    other = Recursion(timed, Disturbances(timed, seed=5)).run(500)
    assert (one == again).all()
    assert (one != other).any()
    assert rate(one) >= timed.period().seconds


@pytest.mark.parametrize(
    ("sigma", "loss", "nbytes", "every", "above"),
    [
        (0.2, 0.0, 1000, 0.002, 0.01),
        (0.0, 0.01, 1000, 0.002, 0.02),
        (0.0, 0.001, 40_000, 0.004, 0.02),
        (0.2, 0.01, 1000, 0.05, 0.18),  # both at once are not as late as either and the other
        (0.3, 0.01, 10_000, 0.5, 0.1),
        (0.0, 0.0005, 1000, 0.02, 0.01),  # too few to count
    ],
)
def test_within_which_time_signals_come_in_order(sigma, loss, nbytes, every, above):
    """Of 400,000 signals whose times, losses and waits behind what was lost are drawn."""
    link = Link(0.05, sigma=sigma, loss=loss)
    random = np.random.default_rng(0)
    sent = every * np.arange(400_000)
    packets = -(-nbytes // 1448)
    lost = random.random(len(sent)) < 1 - (1 - loss) ** packets
    trips = 0.05 * np.exp(sigma * random.standard_normal(len(sent)) - sigma**2 / 2)
    came = np.maximum.accumulate(sent + (0.2 + 2 * 0.05) * lost)  # (a timeout, and a round trip)
    expected = np.quantile(came - sent + trips, 0.98)
    assert expected * 0.98 <= link.within(0.98, nbytes, every) <= expected * (1 + above)


@pytest.mark.parametrize("kind", [Recursion, EventSimulation])
def test_an_outage_holds_signals_back_until_its_end(kind):
    """One sample at a time: each outage costs its 0.4 s, but for the time before the next signal,
    which is no longer than a period."""
    model = model_of(plan_of(bare_chain(3), "backprop"), [1e-3] * 3)
    links = {(0, 1): Link(1e-3, outages_per_hour=1000, outage_seconds=0.4), (1, 0): Link(1e-3)}
    timed = model.timed([["b0"], ["b1", "b2"]], [0, 1], ClusterModel(hosts(2).hosts, links))
    disturbances = Disturbances(timed, 2)
    simulation = kind(timed, disturbances)
    end, period = simulation.run(3000)[-1].max(), timed.period().seconds
    (outages,) = disturbances._outages.values()
    number = (outages._starts < end).sum() - 1  # (the first one is before all time)
    assert number >= 5
    lost = end - 3000 * period
    assert number * (0.4 - period) <= lost + period <= number * 0.4 + 2 * period


def test_failures_cost_detection_start_up_and_replay():
    """Both simulations draw the same failures; each costs its seconds, and what came since the
    snapshot once more."""
    model = model_of(plan_of(bare_chain(3), "backprop"), [1e-3] * 3)
    cluster = hosts(2, Link(1e-3))
    failing = ClusterModel(cluster.hosts, cluster.links, FailureModel(600.0, 0.5, 0.25))
    timed = model.timed([["b0"], ["b1", "b2"]], [0, 1], failing)
    snapshots = SnapshotModel(50, [0.01, 0.01])
    seen = []
    for kind in (Recursion, EventSimulation):
        found = Disturbances(timed, 3, snapshots)
        ends = kind(timed, found).run(2000)
        seen.append((ends[-1].max(), found.failures, found.lost_seconds["failures"]))
    assert seen[0] == pytest.approx(seen[1], rel=2e-3)  # (a failure is noticed a step later)
    _, failures, lost = seen[0]
    assert failures >= 2
    most = 0.75 + 50 * max(timed.busy)
    assert 0.75 * failures < lost <= most * failures  # (some steps were done once more)


def test_the_pace_of_the_stream_holds_the_run_back():
    model = model_of(plan_of(bare_chain(2)), [1e-3, 1e-3])
    timed = model.timed([["b0", "b1"]], [0], ClusterModel(pace=100.0))
    assert timed.period().seconds == pytest.approx(0.01)
    assert timed.period().words == "limited by the stream's pace: 100 % work"
    assert rate(Recursion(timed, Disturbances(timed)).run(200)) == pytest.approx(0.01)
