"""Oracle: tables drawn by hand from time-and-signals.md, and brute force on them.

F n, B n: forward and backward of sample n; FB n: an output net does both.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from itertools import islice

import pytest
import torch
from dynamics.helpers import bare, bare_chain, drawn_events, edge, knobs, rows, settings, until
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hamdist.dynamics.graph.graph import BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.schedule.events import (
    ALONE,
    Bundle,
    Event,
    Kind,
    Phase,
    Stamp,
    emitted,
)
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.make import make_schedule
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.errors import LevelError
from hamdist.runtime.plan.plan import make_plan
from hamdist.streams import from_iterable

# -- pulse -------------------------------------------------------------------------------------

CHAINS = {
    (1, 1): """
tick | b0
0    | FB0
1    | FB1
2    | FB2
""",
    (1, 2): """
tick | b0
0    | FB0
1    |
2    | FB1
3    |
4    | FB2
""",
    (1, "inf"): """
tick | b0
0    | FB0
1    | FB1
2    | FB2
""",
    (2, 1): """
tick | b0    | b1
0    | F0    |
1    | F1    | FB0
2    | F2 B0 | FB1
3    | F3 B1 | FB2
4    | F4 B2 | FB3
""",
    (2, 2): """
tick | b0    | b1
0    | F0    |
1    |       | FB0
2    | F1 B0 |
3    |       | FB1
4    | F2 B1 |
5    |       | FB2
""",
    (2, "inf"): """
tick | b0 | b1
0    | F0 |
1    |    | FB0
2    | B0 |
3    | F1 |
4    |    | FB1
5    | B1 |
6    | F2 |
""",
    (3, 1): """
tick | b0    | b1    | b2
0    | F0    |       |
1    | F1    | F0    |
2    | F2    | F1    | FB0
3    | F3    | F2 B0 | FB1
4    | F4 B0 | F3 B1 | FB2
5    | F5 B1 | F4 B2 | FB3
6    | F6 B2 | F5 B3 | FB4
""",
    (3, 2): """
tick | b0    | b1    | b2
0    | F0    |       |
1    |       | F0    |
2    | F1    |       | FB0
3    |       | F1 B0 |
4    | F2 B0 |       | FB1
5    |       | F2 B1 |
6    | F3 B1 |       | FB2
7    |       | F3 B2 |
""",
    (3, "inf"): """
tick | b0 | b1 | b2
0    | F0 |    |
1    |    | F0 |
2    |    |    | FB0
3    |    | B0 |
4    | B0 |    |
5    | F1 |    |
6    |    | F1 |
7    |    |    | FB1
8    |    | B1 |
9    | B1 |    |
10   | F2 |    |
""",
    (5, 1): """
tick | b0    | b1    | b2    | b3    | b4
0    | F0    |       |       |       |
1    | F1    | F0    |       |       |
2    | F2    | F1    | F0    |       |
3    | F3    | F2    | F1    | F0    |
4    | F4    | F3    | F2    | F1    | FB0
5    | F5    | F4    | F3    | F2 B0 | FB1
6    | F6    | F5    | F4 B0 | F3 B1 | FB2
7    | F7    | F6 B0 | F5 B1 | F4 B2 | FB3
8    | F8 B0 | F7 B1 | F6 B2 | F5 B3 | FB4
9    | F9 B1 | F8 B2 | F7 B3 | F6 B4 | FB5
""",
    (5, 2): """
tick | b0    | b1    | b2    | b3    | b4
0    | F0    |       |       |       |
1    |       | F0    |       |       |
2    | F1    |       | F0    |       |
3    |       | F1    |       | F0    |
4    | F2    |       | F1    |       | FB0
5    |       | F2    |       | F1 B0 |
6    | F3    |       | F2 B0 |       | FB1
7    |       | F3 B0 |       | F2 B1 |
8    | F4 B0 |       | F3 B1 |       | FB2
9    |       | F4 B1 |       | F3 B2 |
10   | F5 B1 |       | F4 B2 |       | FB3
""",
    (5, "inf"): """
tick | b0 | b1 | b2 | b3 | b4
0    | F0 |    |    |    |
1    |    | F0 |    |    |
2    |    |    | F0 |    |
3    |    |    |    | F0 |
4    |    |    |    |    | FB0
5    |    |    |    | B0 |
6    |    |    | B0 |    |
7    |    | B0 |    |    |
8    | B0 |    |    |    |
9    | F1 |    |    |    |
10   |    | F1 |    |    |
""",
}

# a -(2)-> b -(3)-> r: depths 0, 2, 5
UNEQUAL = ("a: u", "b: a+2", "r: b+3")
UNEQUAL_TABLE = """
tick | a     | b     | r
0    | F0    |       |
1    |       |       |
2    |       | F0    |
3    |       |       |
4    | F1    |       |
5    |       |       | FB0
6    |       | F1    |
7    |       |       |
8    | F2    | B0    |
9    |       |       | FB1
10   | B0    | F2    |
11   |       |       |
12   | F3    | B1    |
13   |       |       | FB2
14   | B1    | F3    |
15   |       |       |
16   | F4    | B2    |
"""

SKIP = ("a: u", "b: a", "c: a b")
SKIP_TABLE = CHAINS[3, 1].replace("b0", "a").replace("b1", "b").replace("b2", "c")

# d waits for c, whose edge takes two ticks
DIAMOND = ("a: u", "b: a", "c: a", "d: b c+2")
DIAMOND_TABLE = """
tick | a     | b     | c     | d
0    | F0    |       |       |
1    | F1    | F0    | F0    |
2    | F2    | F1    | F1    |
3    | F3    | F2    | F2    | FB0
4    | F4    | F3    | F3    | FB1
5    | F5    | F4 B0 | F4 B0 | FB2
6    | F6 B0 | F5 B1 | F5 B1 | FB3
7    | F7 B1 | F6 B2 | F6 B2 | FB4
8    | F8 B2 | F7 B3 | F7 B3 | FB5
"""

# The message of the shallow readout waits for that of the deep one.
READOUTS = ("a: u", "near: a", "b: a", "far: b")
READOUTS_TABLE = """
tick | a     | near | b     | far
0    | F0    |      |       |
1    | F1    | FB0  | F0    |
2    | F2    | FB1  | F1    | FB0
3    | F3    | FB2  | F2 B0 | FB1
4    | F4 B0 | FB3  | F3 B1 | FB2
5    | F5 B1 | FB4  | F4 B2 | FB3
"""

TABLES = [
    *(
        pytest.param(bare_chain(n), c, table, id=f"chain-{n}-c-{c}")
        for (n, c), table in CHAINS.items()
    ),
    pytest.param(bare(*UNEQUAL), 4, UNEQUAL_TABLE, id="unequal-delays"),
    pytest.param(bare(*SKIP), 1, SKIP_TABLE, id="skip"),
    pytest.param(bare(*DIAMOND), 1, DIAMOND_TABLE, id="diamond"),
    pytest.param(bare(*READOUTS), 1, READOUTS_TABLE, id="two-readouts"),
]


ENDING = {
    "trace": settings("trace"),
    "speed 3": settings("trace", locality={"speed": 3}),
    "heads": settings("heads"),
    "parts": settings("pipeline", locality={"microbatches": 2}),
    "clipped": settings("backprop", learning={"clip": {"norm": 1.0, "of": "network"}}),
}


@pytest.mark.parametrize("case", ENDING)
def test_a_stream_that_ends(case):
    """Behind the first event without a sample come those of the samples that are still inside."""
    source = from_iterable([(torch.zeros(4, 1).double(), torch.zeros(4, 1).double())])
    schedule = make_plan(bare_chain(4), ENDING[case], source.spec).schedule
    assert isinstance(schedule, PulseSchedule)
    for block, end in itertools.product(("b0", "b1", "b3"), (2, 4, 12)):
        whole = list(islice(schedule.events(block), 100))
        events = [next(e for e in whole if e.sample == end and e.phase is not Phase.BACKWARD)]
        while (event := schedule.after_end(block, events[-1], end)) is not None:
            events.append(event)
        at = whole.index(events[0])
        assert events[1:] == [e for e in whole[at + 1 :] if e.sample < end]


def pulse(graph: Graph, c: int | str) -> PulseSchedule:
    made = make_schedule(graph, knobs("trace", speed=c))
    assert isinstance(made, PulseSchedule)
    return made


def hold(graph: Graph, **overrides: object) -> HoldSchedule:
    made = make_schedule(graph, knobs("local", **overrides))
    assert isinstance(made, HoldSchedule)
    return made


@pytest.mark.parametrize(("graph", "c", "table"), TABLES)
def test_pulse_events(graph, c, table):
    schedule = pulse(graph, c)
    last = len(rows(table)[1]) - 1
    for block, events in drawn_events(table).items():
        assert until(schedule.events(block), last) == events, block


@pytest.mark.parametrize(("graph", "c", "table"), TABLES)
def test_pulse_stamps_by_counting_in_the_table(graph, c, table):
    """The stamp of a signal: where its cell stands, and how many updates stand before it."""
    schedule = pulse(graph, c)
    stamps = {}
    for block, events in drawn_events(table).items():
        updates = 0
        for e in events:
            stamps[block, e.phase, e.sample] = Stamp(e.tick, e.sample, updates)
            updates += e.phase is not Phase.FORWARD
    checked = 0
    for block, events in drawn_events(table).items():
        for e in events:
            for into in graph.into[block]:
                if e.phase is Phase.BACKWARD:
                    assert schedule.state(into, e) is None
                elif into.from_input:
                    sent = Event(e.sample * schedule.c - 1, Phase.EMIT, e.sample)
                    assert sent in until(schedule.emissions(), e.tick)
                    assert schedule.state(into, e) == Stamp(sent.tick, e.sample, 0)
                else:
                    expected = stamps[into.parent, Phase.FORWARD, e.sample]
                    assert schedule.state(into, e) == expected, (block, e)
                    checked += 1
            for out in graph.out_of[block]:
                readout = out.child in graph.readouts
                sent = stamps.get((out.child, Phase.READ if readout else Phase.BACKWARD, e.sample))
                if e.phase is Phase.FORWARD:
                    assert schedule.message(out, e) is None
                else:
                    assert schedule.message(out, e) == sent, (block, e)
                    checked += 1
    assert checked or len(graph.blocks) == 1


def test_pulse_stamps_by_hand():
    graph = bare_chain(3)
    schedule = pulse(graph, 1)
    state, message = edge(graph, "b0->b1"), edge(graph, "b0->b1")
    # b1 does F5 at tick 6; b0 did it at tick 5, before B1 and after B0: one update.
    assert schedule.state(state, Event(6, Phase.FORWARD, 5)) == Stamp(5, 5, 1)
    # b0 does B3 at tick 7; b1 did it at tick 6, after its updates on samples 0, 1, 2.
    assert schedule.message(message, Event(7, Phase.BACKWARD, 3)) == Stamp(6, 3, 3)
    # the readout's sample 4 left the stream one tick before it entered b0
    assert schedule.target("b2", Event(6, Phase.READ, 4)) == Stamp(3, 4, 0)
    schedule = pulse(graph, 2)
    assert schedule.state(state, Event(9, Phase.FORWARD, 4)) == Stamp(8, 4, 2)
    assert schedule.target("b2", Event(10, Phase.READ, 4)) == Stamp(7, 4, 0)
    assert schedule.state(edge(graph, "u->b0"), Event(8, Phase.FORWARD, 4)) == Stamp(7, 4, 0)


@pytest.mark.parametrize(("graph", "c", "table"), TABLES)
def test_stored_is_the_most_samples_between_their_two_passes(graph, c, table):
    schedule = pulse(graph, c)
    for block, events in drawn_events(table).items():
        phases = Counter(e.phase for e in events)
        if phases[Phase.BACKWARD] < 2:
            continue  # a readout, or the table is too short to show the steady state
        held = most = 0
        for e in events:
            held += 1 if e.phase is Phase.FORWARD else -1
            most = max(most, held)
        assert schedule.stored(block) == most, block


@pytest.mark.parametrize(
    ("length", "c", "stored"),
    [
        (1, 1, [1]),
        (2, 1, [3, 1]),
        (2, 2, [2, 1]),
        (3, 1, [5, 3, 1]),
        (3, 2, [3, 2, 1]),
        (3, 3, [2, 1, 1]),
        (3, "inf", [1, 1, 1]),
        (5, 1, [9, 7, 5, 3, 1]),
        (5, 2, [5, 4, 3, 2, 1]),
        (5, "depth", [2, 2, 1, 1, 1]),  # 5 ticks a sample: 8//5, 6//5, 4//5, 2//5, 0//5
        (5, "inf", [1, 1, 1, 1, 1]),
    ],
)
def test_stored_and_delay_by_hand(length, c, stored):
    """floor(2 (D - l) / c) + 1 samples are kept; a message lags by that many less one."""
    schedule = pulse(bare_chain(length), c)
    assert [schedule.stored(f"b{i}") for i in range(length)] == stored
    assert [schedule.delay(f"b{i}") for i in range(length)] == [n - 1 for n in stored]
    assert schedule.staleness == stored[0] - 1


@pytest.mark.parametrize(("length", "ticks"), [(1, 1), (2, 3), (3, 5), (5, 9)])
def test_speed_inf_is_the_round_trip(length, ticks):
    assert pulse(bare_chain(length), "inf").c == ticks  # 2 L - 1 = 2 D + 1
    assert pulse(bare_chain(length), "depth").c == length
    assert pulse(bare_chain(length, delay=3), "inf").c == 6 * (length - 1) + 1


def test_in_flight_by_hand():
    graph = bare(*SKIP)
    one, two = pulse(graph, 1), pulse(graph, 2)
    a_c, a_b, u_a = edge(graph, "a->c"), edge(graph, "a->b"), edge(graph, "u->a")
    # a's state of sample n is sent at tick n and read by c at n + 2: three lie between, inclusive.
    assert one.in_flight(a_c, Kind.STATE) == 3
    assert two.in_flight(a_c, Kind.STATE) == 2
    assert one.in_flight(a_b, Kind.STATE) == 2
    assert one.in_flight(u_a, Kind.STATE) == 2
    # c's message about n is sent at n + 2 and read by a at n + 4.
    assert one.in_flight(a_c, Kind.MESSAGE) == 3
    assert one.in_flight(a_b, Kind.MESSAGE) == 2
    # the target of n leaves at n - 1 and is read at n + 2
    assert one.target_in_flight("c") == 4
    assert two.target_in_flight("c") == 2
    # b stops in tick k with what r sent in k - 3; r hears of it in k + 3, and has sent five more.
    assert hold(graph).in_flight(a_c, Kind.STATE) == 2
    assert hold(bare(*UNEQUAL)).in_flight(edge(bare(*UNEQUAL), "b->r"), Kind.MESSAGE) == 6


# -- hold --------------------------------------------------------------------------------------

# T: the block's state moves. C: the readout takes its loss. n: of sample n, recorded.
HOLD_TABLES = {
    # every block in every tick; the readout b2 (output net, D = 2) sees sample n at tick n + 2
    ("chain 3", "local", 1, "sample", False): """
tick | shows | b0 | b1 | b2
0    | 0     | T  | T  | T
1    | 1     | T  | T  | T
2    | 2     | T  | T  | T C 0
3    | 3     | T  | T  | T C 1
4    | 4     | T  | T  | T C 2
""",
    ("chain 3", "local", 3, "sample", False): """
tick | shows | b0 | b1 | b2
0    | 0     | T  | T  | T
1    | 0     | T  | T  | T
2    | 0     | T  | T  | T C 0
3    | 1     | T  | T  | T C
4    | 1     | T  | T  | T C
5    | 1     | T  | T  | T C 1
6    | 2     | T  | T  | T C
""",
    # literal Algorithm 1: from the first tick on, recorded in the sample's last tick
    ("chain 3", "local", 3, "current", False): """
tick | shows | b0 | b1 | b2
0    | 0     | T  | T  | T C
1    | 0     | T  | T  | T C
2    | 0     | T  | T  | T C 0
3    | 1     | T  | T  | T C
4    | 1     | T  | T  | T C
5    | 1     | T  | T  | T C 1
""",
    # a state is one tick later than an output net
    ("chain 3", "local", 1, "sample", True): """
tick | shows | b0 | b1 | b2
0    | 0     | T  | T  | T
1    | 1     | T  | T  | T
2    | 2     | T  | T  | T
3    | 3     | T  | T  | T C 0
4    | 4     | T  | T  | T C 1
""",
    # inf: a round trip of 2 D + 1 = 5 ticks
    ("chain 3", "local", "inf", "sample", False): """
tick | shows | b0 | b1 | b2
0    | 0     | T  | T  | T
1    | 0     | T  | T  | T
2    | 0     | T  | T  | T C 0
3    | 0     | T  | T  | T C
4    | 0     | T  | T  | T C
5    | 1     | T  | T  | T C
6    | 1     | T  | T  | T C
7    | 1     | T  | T  | T C 1
""",
    ("chain 1", "local", "inf", "sample", False): """
tick | shows | b0
0    | 0     | T C 0
1    | 1     | T C 1
""",
    ("chain 2", "local", "inf", "sample", False): """
tick | shows | b0 | b1
0    | 0     | T  | T
1    | 0     | T  | T C 0
2    | 0     | T  | T C
3    | 1     | T  | T C
4    | 1     | T  | T C 1
""",
    ("chain 1", "delay-free", "depth", "sample", False): """
tick | shows | b0
0    | 0     | T C 0
1    | 1     | T C 1
""",
    ("chain 2", "delay-free", "depth", "sample", False): """
tick | shows | b0 | b1
0    | 0     | T  |
1    | 0     |    | T C 0
2    | 1     | T  |
3    | 1     |    | T C 1
""",
    # HL Eq. 10: the sample stays for D + 1 ticks, in tick k the blocks of depth k mod 3 move
    ("chain 3", "delay-free", "depth", "sample", False): """
tick | shows | b0 | b1 | b2
0    | 0     | T  |    |
1    | 0     |    | T  |
2    | 0     |    |    | T C 0
3    | 1     | T  |    |
4    | 1     |    | T  |
5    | 1     |    |    | T C 1
6    | 2     | T  |    |
""",
    # with a state the loss is taken in the tick behind the move
    ("chain 3", "delay-free", "depth", "sample", True): """
tick | shows | b0 | b1 | b2
0    | 0     | T  |    |
1    | 0     |    | T  |
2    | 0     |    |    | T
3    | 1     | T  |    | C 0
4    | 1     |    | T  |
5    | 1     |    |    | T
6    | 2     | T  |    | C 1
""",
    ("chain 5", "delay-free", "depth", "sample", False): """
tick | shows | b0 | b1 | b2 | b3 | b4
0    | 0     | T  |    |    |    |
1    | 0     |    | T  |    |    |
2    | 0     |    |    | T  |    |
3    | 0     |    |    |    | T  |
4    | 0     |    |    |    |    | T C 0
5    | 1     | T  |    |    |    |
""",
    ("chain 5", "local", 3, "sample", False): """
tick | shows | b0 | b1 | b2 | b3 | b4
0    | 0     | T  | T  | T  | T  | T
1    | 0     | T  | T  | T  | T  | T
2    | 0     | T  | T  | T  | T  | T
3    | 1     | T  | T  | T  | T  | T
4    | 1     | T  | T  | T  | T  | T C 0
5    | 1     | T  | T  | T  | T  | T C
6    | 2     | T  | T  | T  | T  | T C
7    | 2     | T  | T  | T  | T  | T C 1
""",
    # delays 2 and 3: D = 5
    ("unequal", "local", 1, "sample", False): """
tick | shows | a | b | r
0    | 0     | T | T | T
1    | 1     | T | T | T
2    | 2     | T | T | T
3    | 3     | T | T | T
4    | 4     | T | T | T
5    | 5     | T | T | T C 0
6    | 6     | T | T | T C 1
""",
    ("skip", "local", 1, "sample", False): """
tick | shows | a | b | c
0    | 0     | T | T | T
1    | 1     | T | T | T
2    | 2     | T | T | T C 0
3    | 3     | T | T | T C 1
""",
    # layer by layer: blocks of one depth move together; c counts the diamond's longest way
    ("diamond", "delay-free", "depth", "sample", False): """
tick | shows | a | b | c | d
0    | 0     | T |   |   |
1    | 0     |   | T | T |
2    | 0     |   |   |   |
3    | 0     |   |   |   | T C 0
4    | 1     | T |   |   |
5    | 1     |   | T | T |
""",
}
GRAPHS = {"unequal": UNEQUAL, "skip": SKIP, "diamond": DIAMOND}


def _graph(name: str, state: bool) -> Graph:
    if name.startswith("chain"):
        return bare_chain(int(name.split()[1]), state=state)
    return bare(*GRAPHS[name], state=state)


@pytest.mark.parametrize("case", HOLD_TABLES, ids=lambda c: "-".join(map(str, c)))
def test_hold_table(case):
    name, level, speed, target, state = case
    graph = _graph(name, state)
    readout = "state" if state else "output"
    made = knobs(level, speed=speed, target=target, readout=readout)
    schedule = make_schedule(graph, made)
    assert isinstance(schedule, HoldSchedule)
    (_, *names), body = rows(HOLD_TABLES[case])
    for tick, (shows, *cells) in body:
        for block, cell in zip(names, cells, strict=True):
            event = next(islice(schedule.events(block), tick, None))
            assert event == Event(tick, Phase.TICK, int(shows))
            marks = cell.split()
            assert schedule.moves(block, tick) == ("T" in marks), (block, tick)
            if block in graph.readouts:
                assert schedule.compares(block, tick) == ("C" in marks), (block, tick)
                recorded = [int(m) for m in marks if m.isdigit()]
                found = schedule.records(block, tick)
                assert ([] if found is None else [found]) == recorded, (block, tick)


def test_hold_sequential_compares_the_new_state_in_the_same_tick():
    """h_{k+1} is compared inside tick k, so a readout with a state has no extra tick (App. D)."""
    schedule = hold(bare_chain(3, state=True), order="sequential", readout="state", speed=1)
    assert [schedule.records("b2", k) for k in range(5)] == [None, None, 0, 1, 2]
    assert hold(bare_chain(3, state=True), readout="state", speed="inf").c == 7
    assert hold(bare_chain(3, state=True), order="sequential", readout="state", speed="inf").c == 5


@pytest.mark.parametrize(
    ("overrides", "updates", "versions"),
    [
        # versions: of what is sent in ticks -1, 0, 1, ...: updates that came before that tick
        ({"speed": 1}, [1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4, 5, 6]),
        ({"speed": 3}, [1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4, 5, 6]),
        ({"speed": 3, "update": "last-tick"}, [0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1, 1, 2]),
        ({"speed": 1, "update": "last-tick"}, [1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_hold_updates_and_stamps(overrides, updates, versions):
    graph = bare_chain(3)
    schedule = hold(graph, **overrides)
    c = overrides["speed"]
    assert [schedule.updates(k) for k in range(7)] == [bool(u) for u in updates]
    b0_b1 = edge(graph, "b0->b1")
    for k in range(8):
        event = Event(k, Phase.TICK, k // c)
        sent = Stamp(k - 1, (k - 1) // c, versions[k])  # sent one tick before it is read
        assert schedule.state(b0_b1, event) == sent
        assert schedule.message(b0_b1, event) == sent
        emits = k % c == 0
        expected = Stamp(k - 1, k // c, 0) if emits else None
        assert schedule.state(edge(graph, "u->b0"), event) == expected


def test_hold_unequal_delays():
    graph = bare("a: u+3", "b: a+2", "r: b+3")
    schedule = hold(graph, speed=2)
    assert graph.depths == {"a": 2, "b": 4, "r": 7}
    at = [Event(k, Phase.TICK, k // 2) for k in range(8)]
    # sample n leaves at 2 n - 1 and needs three ticks: it shows at a from tick 2 n + 2
    shown = [schedule.state(edge(graph, "u->a"), e) for e in at]
    assert shown == [None, None, Stamp(-1, 0, 0), None, Stamp(1, 1, 0), None, Stamp(3, 2, 0), None]
    assert schedule.state(edge(graph, "b->r"), at[0]) == Stamp(-3, -2, 0)
    assert schedule.message(edge(graph, "b->r"), at[7]) == Stamp(4, 2, 4)
    assert schedule.state(edge(graph, "a->b"), at[7]) == Stamp(5, 2, 5)
    # the target of sample n is taken when its prediction stands at r: tick 2 n + 7
    wanted = [schedule.target("r", Event(k, Phase.TICK, k // 2)) for k in range(6, 12)]
    assert wanted == [None, emitted(0, 2), None, emitted(1, 2), None, emitted(2, 2)]


@pytest.mark.parametrize(
    ("order", "lag"), [("omega-first", 2), ("simultaneous", 2), ("sequential", 1)]
)
def test_hold_cycle(order, lag):
    """a -> b -> a: depths by the shortest way from the input, and the same lags as in a chain."""
    graph = Graph(
        [
            BlockSpec("a", bare_chain(1).blocks["b0"].module, ("u", "b"), shape=(1,)),
            BlockSpec("b", bare_chain(1).blocks["b0"].module, ("a",), loss=mse, state=True),
        ]
    )
    assert graph.depths == {"a": 0, "b": 1}
    schedule = hold(graph, order=order, readout="state", speed=2)
    # sample n shows from tick 2 n on, and stands at b `lag` ticks later
    at_b = {lag: 0, lag + 2: 1, lag + 4: 2}
    for k in range(lag + 6):
        event = Event(k, Phase.TICK, k // 2)
        n = at_b.get(k)
        assert schedule.records("b", k) == n
        assert schedule.target("b", event) == (None if n is None else emitted(n, 2))
    event = Event(4, Phase.TICK, 2)
    assert schedule.state(edge(graph, "u->a"), event) == Stamp(3, 2, 0)
    assert schedule.state(edge(graph, "b->a"), event) == Stamp(3, 1, 3)
    assert schedule.message(edge(graph, "b->a"), event) == Stamp(3, 1, 3)


@pytest.mark.parametrize(
    ("overrides", "delays", "staleness"),
    [
        # z of sample n completes 2 (D - l) ticks after the block saw it, c ticks a sample
        ({"speed": 1}, [4, 2, 0], 4),
        ({"speed": 3}, [4, 2, 0], 1),
        ({"speed": 2, "update": "last-tick"}, [2, 1, 0], 2),
        ({"speed": "inf", "update": "last-tick"}, [0, 0, 0], 0),
        # layer by layer a message goes down one block per sample
        ({"speed": "depth", "moves": "layer-by-layer"}, [2, 1, 0], 2),
    ],
)
def test_hold_delays(overrides, delays, staleness):
    schedule = hold(bare_chain(3), **overrides)
    assert [schedule.delay(f"b{i}") for i in range(3)] == delays
    assert schedule.staleness == staleness


# -- what a graph does not allow ---------------------------------------------------------------


def test_pulse_refuses_a_cycle_and_names_it():
    graph = bare("a: u b", "b: a", "r: b", cut="a")
    with pytest.raises(LevelError, match=r"acyclic.* a, b, r lie on or behind a cycle.*local"):
        pulse(graph, 1)
    for speed in ("inf", "depth"):
        with pytest.raises(LevelError, match=rf"'{speed}' counts the depth.*number of ticks"):
            hold(graph, speed=speed)


def test_pulse_refuses_a_readout_with_a_state():
    with pytest.raises(LevelError, match=r"the readout 'b1' has a state.*state=False"):
        pulse(bare_chain(2, state=True), 1)


def test_a_sequential_output_net_reads_the_new_states_of_its_parents():
    """App. D, step 2: L_k is taken of h_{k+1}, which the parents send in their tick k."""
    graph = bare_chain(3)
    schedule = hold(graph, order="sequential", speed=1)
    state, onward = graph.into["b1"][0], graph.into["b2"][0]
    for k in range(5):
        event = Event(k, Phase.TICK, k)
        assert schedule.state(state, event).tick == k - 1
        assert schedule.state(onward, event).tick == k
        assert schedule.message(onward, event).tick == k - 1
    assert [schedule.late(b) for b in graph.blocks] == [False, False, True]
    assert list(schedule.before_start(state)) == [-1]
    assert list(schedule.before_start(onward)) == []
    # Two states before it: sample n stands at the output net in tick n c + 1.
    assert schedule.target_lag("b2") == 1
    assert [schedule.records("b2", k) for k in range(4)] == [None, 0, 1, 2]
    assert hold(graph, order="sequential", moves="layer-by-layer", speed="depth").c == 2


# -- bundles -----------------------------------------------------------------------------------


def test_bundles_by_hand():
    """d // (ticks between two signals) leave together; those that are read at once leave alone."""
    graph = bare("a: u+5", "b: a+3", "r: b")
    u_a, a_b, b_r = (edge(graph, name) for name in ("u->a", "a->b", "b->r"))
    held = hold(graph, speed=2)
    assert held.bundle(u_a, Kind.STATE) == Bundle(2, 2)
    for kind in (Kind.STATE, Kind.MESSAGE):
        assert held.bundle(a_b, kind) == Bundle(3, 1)
        assert held.bundle(b_r, kind).size == 1
        assert [pulse(graph, c).bundle(a_b, kind) for c in (1, 2, 4)] == [(3, 1), (1, 2), (1, 4)]
    assert [pulse(graph, c).bundle(u_a, Kind.STATE) for c in (1, 2, 4)] == [(5, 1), (2, 2), (1, 4)]
    # A sequential output net reads a state in the tick in which it is sent.
    late = hold(bare("a: u", "r: a+4"), order="sequential", speed=1)
    a_r = edge(bare("a: u", "r: a+4"), "a->r")
    assert late.bundle(a_r, Kind.STATE) == ALONE
    assert late.bundle(a_r, Kind.MESSAGE) == Bundle(4, 1)


# -- causality on any graph --------------------------------------------------------------------


@st.composite
def dags(draw):
    size = draw(st.integers(1, 6))
    lines = []
    for i in range(size):
        known = ["u", *(f"b{j}" for j in range(i))]
        parents = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
        delays = [draw(st.integers(1, 3)) for _ in parents]
        lines.append(f"b{i}: " + " ".join(f"{p}+{d}" for p, d in zip(parents, delays, strict=True)))
    return bare(*lines)


class Wire:
    """A channel: what was sent and not yet read, with the tick of its sending."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, Stamp]] = deque()
        self.sent: list[tuple[int, Stamp]] = []

    def send(self, tick: int, stamp: Stamp) -> None:
        self.waiting.append((tick, stamp))
        self.sent.append((tick, stamp))

    def read(self, stamp: Stamp, tick: int, delay: int) -> int:
        """FIFO; returns the tick of the sending."""
        sent, found = self.waiting.popleft()
        assert found == stamp
        assert sent <= tick - delay
        return sent

    def before(self, tick: int) -> int:
        """How many wait that were sent before `tick`."""
        return sum(sent < tick for sent, _ in self.waiting)


def _ends(event: Event) -> bool:
    return event.phase in (Phase.BACKWARD, Phase.READ)


@hypothesis_settings(max_examples=60, deadline=None)
@given(graph=dags(), c=st.sampled_from([1, 2, 3, 7, "depth", "inf"]))
def test_pulse_is_causal_on_any_dag(graph, c):
    """Every signal was sent early enough, about the same sample, in the order of its reading."""
    schedule = pulse(graph, c)
    last = 2 * graph.depth + 4 * schedule.c
    states = {e.index: Wire() for e in graph.edges}
    messages = {e.index: Wire() for e in graph.edges if not e.from_input}
    targets = {r: Wire() for r in graph.readouts}
    updates = Counter()
    timeline = [(e, "u") for e in until(schedule.emissions(), last)]
    timeline += [(e, b) for b in graph.blocks for e in until(schedule.events(b), last)]
    timeline.sort(key=lambda pair: pair[0].tick)  # stable: a block's own order within a tick
    for event, block in timeline:
        if event.phase is Phase.EMIT:
            for out in graph.out_of["u"]:
                states[out.index].send(event.tick, Stamp(event.tick, event.sample, 0))
            for target in targets.values():
                target.send(event.tick, Stamp(event.tick, event.sample, 0))
            continue
        reads = []
        if event.phase is not Phase.BACKWARD:
            reads += [(e, Kind.STATE, states[e.index]) for e in graph.into[block]]
        if event.phase is Phase.BACKWARD:
            reads += [(e, Kind.MESSAGE, messages[e.index]) for e in graph.out_of[block]]
        for e, kind, wire in reads:
            name = schedule.state if kind is Kind.STATE else schedule.message
            stamp = name(e, event)
            assert wire.before(event.tick) <= schedule.in_flight(e, kind)
            # the stream's edges count from their second tick
            wire.read(stamp, event.tick, e.delay)
            assert stamp.sample == event.sample
        if event.phase is Phase.READ:
            assert targets[block].before(event.tick) <= schedule.target_in_flight(block)
            targets[block].read(schedule.target(block, event), event.tick, 1)
        mine = Stamp(event.tick, event.sample, updates[block])
        if event.phase is Phase.FORWARD:
            for e in graph.out_of[block]:
                states[e.index].send(event.tick, mine)
        if _ends(event):
            for e in graph.into[block]:
                if not e.from_input:
                    messages[e.index].send(event.tick, mine)
            updates[block] += 1
    assert all(updates[b] >= 3 for b in graph.blocks)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    graph=dags(),
    speed=st.sampled_from([1, 2, 3, "depth", "inf"]),
    update=st.sampled_from(["tick", "last-tick"]),
)
def test_hold_is_causal_on_any_dag(graph, speed, update):
    """Tick k reads exactly what the neighbour sent at its tick k - delay (time-and-signals.md)."""
    schedule = hold(graph, speed=speed, update=update)
    last = 2 * graph.depth + 2 * schedule.c
    states = {e.index: Wire() for e in graph.edges}
    messages = {e.index: Wire() for e in graph.edges if not e.from_input}
    targets = {r: Wire() for r in graph.readouts}
    emits = {e.tick: e.sample for e in until(schedule.emissions(), last)}
    updates = 0
    for k in range(-max(e.delay for e in graph.edges), last):
        if k in emits:
            for wire in (*(states[e.index] for e in graph.out_of["u"]), *targets.values()):
                wire.send(k, Stamp(k, emits[k], 0))
        for block in graph.blocks:
            event = Event(k, Phase.TICK, k // schedule.c)
            for e in graph.into[block]:
                stamp = schedule.state(e, event) if k >= 0 else None
                if stamp is not None:
                    assert states[e.index].before(k) <= schedule.in_flight(e, Kind.STATE)
                    assert states[e.index].read(stamp, k, e.delay) == k - e.delay
            for e in graph.out_of[block]:
                if k >= 0:
                    stamp = schedule.message(e, event)
                    assert messages[e.index].before(k) <= schedule.in_flight(e, Kind.MESSAGE)
                    assert messages[e.index].read(stamp, k, e.delay) == k - e.delay
            if k >= 0 and block in targets:
                stamp = schedule.target(block, event)
                if stamp is not None:
                    assert targets[block].before(k) <= schedule.target_in_flight(block)
                    targets[block].read(stamp, k, 1)
        for block in graph.blocks:  # after all have read: what is sent is read in a later tick
            stamp = Stamp(k, k // schedule.c, updates)
            for e in graph.out_of[block]:
                if k >= -e.delay:
                    states[e.index].send(k, stamp)
            for e in graph.into[block]:
                if not e.from_input and k >= -e.delay:
                    messages[e.index].send(k, stamp)
        updates += k >= 0 and (update == "tick" or (k + 1) % schedule.c == 0)


def _in_time(sent: dict[Stamp, int], needed: dict[Stamp, int], bundle: Bundle) -> None:
    """Whatever signal a bundle begins with, its last one is sent before the first is needed.

    sent, needed: the tick of each signal.
    """
    for stamp, tick in sent.items():
        if stamp in needed and bundle.size > 1:
            last = tick + (bundle.size - 1) * bundle.spacing
            assert last in sent.values() or last > max(sent.values())
            assert last < needed[stamp]


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    graph=dags(),
    c=st.sampled_from([1, 2, 3]),
    held=st.booleans(),
    order=st.sampled_from(["omega-first", "sequential"]),
)
def test_bundles_are_in_time_on_any_dag(graph, c, held, order):
    """Oracle: the schedule's own events, which say when each signal is sent and when it is read."""
    schedule = hold(graph, speed=c, order=order) if held else pulse(graph, c)
    last = 2 * graph.depth + 4 * c + 8
    events = {b: list(until(schedule.events(b), last)) for b in graph.blocks}
    for e in graph.edges:
        needed = {schedule.state(e, event): event.tick for event in events[e.child]}
        sent = {s: s.tick for s in needed if s is not None}
        _in_time(sent, needed, schedule.bundle(e, Kind.STATE))
        if not e.from_input:
            needed = {schedule.message(e, event): event.tick for event in events[e.parent]}
            sent = {s: s.tick for s in needed if s is not None}
            _in_time(sent, needed, schedule.bundle(e, Kind.MESSAGE))
