"""Oracle: tables drawn by hand from equations.md and the rule of sequence_schedule.py, and
brute force on every signal of random graphs.

F n, B n: token n of the stream passes forward, backward; sequences are parted by their lengths.
"""

from __future__ import annotations

from collections import deque

import pytest
from dynamics.helpers import bare, drawn_events, edge, knobs, linear, samples, settings
from hypothesis import given, reject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from hamdist.dynamics.graph.graph import INPUT, BlockSpec, Graph
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.schedule.events import Event, Kind, Phase, Stamp
from hamdist.dynamics.schedule.sequence import SequenceSchedule
from hamdist.errors import GraphError, LevelError
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.timing.timed_graph import TimingModel
from hamdist.streams import from_iterable

CELL = ("cell: u cell", "y: cell")
STACK = ("e: u", "a: e a", "b: a b", "y: b")
FEEDBACK = ("a: u b", "b: a", "y: b")

TABLES = {
    "two sequences": (
        CELL,
        None,
        [3, 1],
        """
tick | cell | y
0    | F0   |
1    | F1   | F0
2    | F2   | F1
3    |      | F2 B2
4    | B2   | B1
5    | B1   | B0
6    | B0   |
7    | F3   |
8    |      | F3 B3
9    | B3   |
10   | F4   |
""",
    ),
    "truncated to two": (
        CELL,
        2,
        [3, 1],
        """
tick | cell | y
0    | F0   |
1    | F1   | F0
2    | F2   | F1
3    |      | F2 B2
4    | B2   | B1
5    | B1   |
6    | F3   |
7    |      | F3 B3
8    | B3   |
9    | F4   |
""",
    ),
    "stacked": (
        STACK,
        None,
        [2],
        """
tick | e  | a  | b  | y
0    | F0 |    |    |
1    | F1 | F0 |    |
2    |    | F1 | F0 |
3    |    |    | F1 | F0
4    |    |    |    | F1 B1
5    |    |    | B1 | B0
6    |    | B1 | B0 |
7    | B1 | B0 |    |
8    | B0 |    |    |
9    | F2 |    |    |
""",
    ),
    "a slow edge to itself": (
        ("cell: u cell+3", "y: cell"),
        None,
        [2],
        """
tick | cell | y
0    | F0   |
1    |      | F0
2    |      |
3    | F1   |
4    |      | F1 B1
5    | B1   |
6    |      |
7    |      | B0
8    | B0   |
9    | F2   |
""",
    ),
    "feedback": (
        FEEDBACK,
        None,
        [2],
        """
tick | a  | b  | y
0    | F0 |    |
1    |    | F0 |
2    | F1 |    | F0
3    |    | F1 |
4    |    |    | F1 B1
5    |    | B1 |
6    | B1 |    | B0
7    |    | B0 |
8    | B0 |    |
9    | F2 |    |
""",
    ),
    "a way back that is deeper than the readout": (
        ("a: u g", "y: a", "f: a", "g: f"),
        None,
        [2],
        """
tick | a  | y  | f  | g
0    | F0 |    |    |
1    |    | F0 | F0 |
2    |    |    |    | F0
3    | F1 |    |    |
4    |    | F1 | F1 |
5    |    |    |    | F1 B1
6    |    | B1 | B1 |
7    | B1 |    |    |
8    |    |    |    | B0
9    |    | B0 | B0 |
10   | B0 |    |    |
11   | F2 |    |    |
""",
    ),
    "a slow skip and an early readout": (
        ("a: u a", "w: a", "b: a+3 b", "y: b"),
        1,
        [2],
        """
tick | a  | w  | b  | y
0    | F0 |    |    |
1    | F1 | F0 |    |
2    |    | F1 |    |
3    |    |    | F0 |
4    |    |    | F1 | F0
5    |    |    |    | F1 B1
6    |    |    | B1 |
7    |    |    |    |
8    |    | B1 |    |
9    | B1 |    |    |
10   | F2 |    |    |
""",
    ),
}


def schedule_of(graph: Graph, truncation: int | None = None, *, carries: bool = False):
    overrides = {} if truncation is None else {"truncation": truncation}
    return SequenceSchedule(graph, knobs("bptt", **overrides), carries=carries)


def events_of(schedule: SequenceSchedule, block: str, lengths: list[int]) -> list[Event]:
    """The events of `block`, up to the first one after sequences of these lengths."""
    lasts = {sum(lengths[: i + 1]) - 1 for i in range(len(lengths))}
    event = schedule.forward(block, schedule.opening(), 0)
    events = []
    while True:
        if event.phase is Phase.FORWARD and event.sample in lasts:
            event = schedule.closed(event)
        events.append(event)
        if event.phase is Phase.FORWARD and event.sample == sum(lengths):
            return events
        event = schedule.after(block, event)


@pytest.mark.parametrize("name", TABLES)
def test_drawn_tables(name):
    lines, truncation, lengths, drawing = TABLES[name]
    schedule = schedule_of(bare(*lines, cut=lines[0][0]), truncation)
    for block, expected in drawn_events(drawing).items():
        events = events_of(schedule, block, lengths)
        last = max(e.tick for e in expected)
        found = [Event(e.tick, e.phase, e.sample) for e in events if e.tick <= last]
        assert found == expected, block


@pytest.mark.parametrize(
    ("lines", "c"),
    [(CELL, 1), (FEEDBACK, 2), (("a: u a+2 b+2", "b: a+3", "y: b"), 5), (("a: u", "y: a"), 1)],
)
def test_time_between_tokens_is_the_longest_way_round(lines, c):
    assert schedule_of(bare(*lines, cut="a")).c == c


def test_the_stream_sends_a_token_one_tick_before_it_is_read():
    schedule = schedule_of(bare(*CELL))
    event = schedule.emission(schedule.opening(), 0)
    sent = []
    for last in (False, False, True, True, False):
        event = schedule.closed(event) if last else event
        sent.append((event.tick, event.sample))
        event = schedule.after_emission(event)
    assert sent == [(-1, 0), (0, 1), (1, 2), (6, 3), (9, 4)]


def test_stamps_of_the_cell_by_hand():
    """Lengths 3 and 1: the forward of token 1 reads what the cell sent in tick 0; of token 3, the
    first of its sequence, only a schedule that carries states names a signal: that of token 2,
    sent in tick 2 before the weights moved for the first time."""
    graph = bare(*CELL, cut="cell")
    self_edge, from_input = edge(graph, "cell->cell"), edge(graph, "u->cell")
    for carries in (False, True):
        schedule = schedule_of(graph, carries=carries)
        f0, f1, f2, b2, b1, b0, f3, b3, *_ = events_of(schedule, "cell", [3, 1])
        assert schedule.state(from_input, f1) == Stamp(0, 1, 0)
        assert schedule.state(from_input, f3) == Stamp(6, 3, 0)
        assert schedule.state(self_edge, f1) == Stamp(0, 0, 0)
        assert schedule.state(self_edge, f2) == Stamp(1, 1, 0)
        assert schedule.state(self_edge, f3) == (Stamp(2, 2, 0) if carries else None)
        assert schedule.state(self_edge, f0) == (Stamp(-1, -1, 0) if carries else None)
        assert schedule.before("cell") == Stamp(-1, -1, 0)
        assert schedule.message(self_edge, b2) is None
        assert schedule.message(self_edge, b1) == Stamp(4, 2, 0)
        assert schedule.message(self_edge, b0) == Stamp(5, 1, 0)
        assert schedule.message(self_edge, b3) is None
        assert schedule.message(edge(graph, "cell->y"), b3) == Stamp(8, 3, 1)
        assert schedule.message(edge(graph, "cell->y"), f3) is None
        assert schedule.state(self_edge, b1) is None


# -- brute force ---------------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Up to five blocks with any edges among them, the last one a readout of some; delays to 3."""
    count = draw(st.integers(1, 4))
    blocks = []
    for i in range(count):
        earlier = draw(st.lists(st.integers(-1, i - 1), min_size=1, unique=True))
        later = draw(st.lists(st.integers(i, count - 1), unique=True))
        parents = tuple(INPUT if p < 0 else f"b{p}" for p in (*earlier, *later))
        delays = {p: draw(st.integers(1, 3)) for p in parents}
        blocks.append((f"b{i}", parents, delays, None))
    numbers = draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    read = tuple(f"b{i}" for i in numbers)
    blocks.append(("y", read, {p: draw(st.integers(1, 3)) for p in read}, mse))
    try:
        return Graph(
            BlockSpec(name, nn.Identity(), parents, delays=delays, loss=loss, shape=(1,))
            for name, parents, delays, loss in blocks
        )
    except GraphError:  # a block that leads to no readout
        reject()


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    graph=graphs(),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    truncation=st.sampled_from([None, 1, 2, 5]),
    carries=st.booleans(),
)
def test_every_signal_is_there_in_time_and_read_once(graph, lengths, truncation, carries):
    schedule = schedule_of(graph, truncation, carries=carries)
    events = {b: events_of(schedule, b, lengths)[:-1] for b in graph.blocks}
    for block, own in events.items():
        assert [e.tick for e in own] == sorted(e.tick for e in own), block
    for e in graph.edges:
        if e.from_input:
            continue
        reads = [
            (stamp, event.tick)
            for event in events[e.child]
            for stamp in [schedule.state(e, event)]
            if stamp is not None
        ]
        sends = _states_sent(schedule, e, events[e.parent], carries)
        _compare(reads, sends, e.delay, schedule.in_flight(e, Kind.STATE))
        reads = [
            (stamp, event.tick)
            for event in events[e.parent]
            for stamp in [schedule.message(e, event)]
            if stamp is not None
        ]
        sends = [
            Stamp(v.tick, v.sample, v.span.number)
            for v in events[e.child]
            if v.phase is Phase.BACKWARD and not (schedule.recurrent(e) and schedule.ends(v))
        ]
        _compare(reads, sends, e.delay, schedule.in_flight(e, Kind.MESSAGE))


def _states_sent(schedule, e, events, carries):
    """What the parent posts on the edge, and is read before the stream ends."""
    recurrent = schedule.recurrent(e)
    forward = [v for v in events if v.phase is Phase.FORWARD]
    sent = [schedule.before(e.parent)] if recurrent and carries else []
    for v in forward:
        last = v.span.length is not None
        if recurrent and last and (not carries or v is forward[-1]):
            continue
        sent.append(Stamp(v.tick, v.sample, v.span.number))
    return sent


def _compare(reads, sends, delay, in_flight):
    """reads: (stamp, tick of the reader); sends: stamps, in order."""
    assert [stamp for stamp, _ in reads] == sends
    assert all(tick - stamp.tick >= delay for stamp, tick in reads)
    waiting: deque[int] = deque()
    timeline = sorted(
        [(stamp.tick, 1, stamp) for stamp, _ in reads] + [(tick, 0, stamp) for stamp, tick in reads]
    )
    for _, sent, _ in timeline:
        if sent:
            waiting.append(1)
            assert len(waiting) <= in_flight
        else:
            waiting.popleft()


# -- refused -------------------------------------------------------------------------------------


def test_a_block_that_reads_only_later_blocks_is_refused():
    with pytest.raises(LevelError, match=r"'a' reads only 'b'.*earlier, or give it 'u'"):
        schedule_of(bare("a: b", "b: u a", "y: b", cut="a"))


def test_a_readout_with_a_state_is_refused():
    with pytest.raises(LevelError, match=r"readout 'y' has a state.*output net"):
        schedule_of(bare(*CELL, state=True))


def test_an_edge_is_recurrent_by_the_order_in_which_blocks_are_listed():
    graph = bare("a: u a b", "b: a u", "y: b", cut="a")
    found = {e.name for e in graph.edges if graph.recurrent(e)}
    assert found == {"a->a", "b->a"}


# Two stacked cells with an embedding before and a readout behind them, two blocks to an actor; a
# pass of a block takes 1. By hand, with n tokens: the second actor has its first state at 3 and its
# second at 5, from where it has work for the 2n - 1 forward passes left and 2n back; the first one
# ends two passes later. So a sequence takes 4n + 6, of 8n of work: both work at the same time, and
# the next sequence follows at once.
@pytest.mark.parametrize("tokens", [3, 16])
def test_two_actors_work_at_once_while_sequences_follow_one_another(tokens):
    blocks = [
        BlockSpec("e", linear(4, 4, 0), ("u",)),
        BlockSpec("a", linear(8, 4, 1), ("e", "a"), shape=(4,)),
        BlockSpec("b", linear(8, 4, 2), ("a", "b"), shape=(4,)),
        BlockSpec("y", linear(4, 4, 3), ("b",), loss=mse),
    ]
    spec = from_iterable(samples(1, 4, 4, 4)).spec
    second = 1000.0  # (beside which signals cost nothing)
    seconds = {b.name: {Phase.FORWARD: second, Phase.BACKWARD: second} for b in blocks}
    plan = make_plan(Graph(blocks), settings("bptt", engine={"kind": "ray"}), spec)
    model = TimingModel(plan, seconds, tokens=tokens)
    period = model.period([["e", "a"], ["b", "y"]]).seconds / second
    assert period == pytest.approx(4 * tokens + 6, abs=1e-3)
    assert model.period([["e", "a", "b", "y"]]).seconds / second == pytest.approx(8 * tokens, 1e-3)
