"""When a worker group is asked for snapshots, what a log of sent signals weighs, and what stays
behind of snapshots that are done: against hand-made crews and sums."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

import pytest
import torch
from runtime.networks import chain, stream

from hamdist.config import Settings
from hamdist.dynamics.graph.graph import INPUT
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.errors import ClusterError, SnapshotError
from hamdist.runtime.engines.inprocess import InProcessSnapshots
from hamdist.runtime.engines.worker_report import SnapshotNews, WorkerStatus
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.plan.plan import make_plan, make_snapshot_policy
from hamdist.runtime.ray_engine.engine import _Watch
from hamdist.runtime.ray_engine.session import Session
from hamdist.runtime.ray_engine.supervision import (
    LAST_SECONDS,
    PATIENCE_SECONDS,
    SnapshotSupervision,
)
from hamdist.runtime.results.measured import ProcessSample
from hamdist.runtime.signals.sent_log import OBJECT_BYTES, SentLog
from hamdist.runtime.signals.signal import Channel, Signal
from hamdist.runtime.snapshots.catalogue import SnapshotCatalogue
from hamdist.runtime.snapshots.process_snapshots import ProcessSnapshots, WrittenFiles
from hamdist.runtime.storage.snapshot_files import write_part
from hamdist.runtime.storage.store import storage
from hamdist.runtime.train.prepare import as_graph


def plan_of(path, engine="ray", **fields):
    chosen = {"engine": {"kind": engine}, "snapshots": {"path": str(path), **fields}}
    settings = Settings.model_validate(chosen)
    spec = stream(1).spec
    plan = make_plan(as_graph(chain(), settings, spec, cross_entropy), settings, spec)
    return replace(plan, snapshot_policy=make_snapshot_policy(settings))


@dataclass
class OneActor:
    name = "actor 0"
    report = None
    kept_bytes: int = 0
    dropped: bool = False
    status: WorkerStatus | None = None
    tick = None


@dataclass
class FakeCrew:
    """One actor with all blocks, which writes what it is asked for when the test says so."""

    plan: object
    path: object
    actors: list = field(default_factory=lambda: [OneActor()])
    asked: list = field(default_factory=list)
    completed: list = field(default_factory=list)
    told: list = field(default_factory=list)
    done = lost = stopped = called_off = late = local_dropped = False
    arithmetic = ()
    live = None
    session = Session()

    def too_late(self):
        return self.late

    def loses(self):
        self.lost = True
        assert self.on_lost(self.actors[0], None, ClusterError("an actor died"))  # type: ignore[attr-defined]

    def ask(self, now, seconds):
        pass

    def stop_stream(self):
        self.stopped = True

    def call_off(self):
        self.called_off = True

    def at(self, tick):
        self.actors[0].status = WorkerStatus(
            {"b": tick}, {}, 0, [], 0, None, {}, ProcessSample(), None
        )

    def keep(self, tick):
        self.asked.append(tick)

    def complete(self, tick):
        self.completed.append(tick)

    def new_snapshot_news(self):
        told, self.told = self.told, []
        return told

    def silent(self, now, seconds=0.0):
        return []

    def writes(self, tick):
        store = storage(str(self.path))
        names = (INPUT, *self.plan.graph.blocks)  # type: ignore[attr-defined]
        parts = {n: write_part(store, tick, f"{i}.x", b"x") for i, n in enumerate(names)}
        self.told.append(SnapshotNews([WrittenFiles(tick, parts)], None, 0))


def crew_of(path, **fields):
    plan = plan_of(path, **fields)
    worker_group = FakeCrew(plan, path)
    return worker_group, SnapshotSupervision(plan, worker_group, plan.snapshot_policy)


def test_a_snapshot_follows_another_in_its_interval(tmp_path):
    """Every 2 s, though an unanswered one would be waited for ten times as long."""
    worker_group, snapshot_policy = crew_of(tmp_path, seconds=2)
    for second in range(9):
        worker_group.at(100 * second)
        snapshot_policy.poll(float(second))
        if second % 2 == 0 and worker_group.asked:
            worker_group.writes(worker_group.asked[-1])
    assert len(worker_group.asked) == 4  # at 2, 4, 6 and 8 s
    assert worker_group.completed == worker_group.asked[:-1]


def test_an_unanswered_one_is_waited_for(tmp_path):
    worker_group, snapshot_policy = crew_of(tmp_path, seconds=2)
    for second in range(int(PATIENCE_SECONDS) + 2):
        snapshot_policy.poll(float(second))
    assert len(worker_group.asked) == 1
    snapshot_policy.poll(PATIENCE_SECONDS + 2)
    assert len(worker_group.asked) == 2


def test_a_snapshot_each_time_that_too_many_signals_are_kept(tmp_path):
    worker_group, snapshot_policy = crew_of(tmp_path, seconds=1000, memory=1)
    snapshot_policy.poll(0.0)
    assert not worker_group.asked
    for turn in range(1, 4):
        worker_group.actors[0].kept_bytes = 2**19 + 1  # more than half of what it may keep
        worker_group.at(100 * turn)
        snapshot_policy.poll(float(turn))
        assert len(worker_group.asked) == turn
        worker_group.writes(worker_group.asked[-1])
        snapshot_policy.poll(turn + 0.5)  # the actor has not told yet that it has let them go
        assert len(worker_group.asked) == turn


@pytest.mark.parametrize("who", ["actor", "driver"])
def test_who_keeps_no_signals_cannot_be_replaced(tmp_path, who):
    worker_group, snapshot_policy = crew_of(tmp_path, memory=3)
    worker_group.told.append(SnapshotNews([], "the disk is full", 0))
    with pytest.warns(UserWarning, match="a snapshot was not written: the disk is full"):
        snapshot_policy.poll(0.0)
    worker_group.actors[0].dropped, worker_group.local_dropped = who == "actor", who == "driver"
    said = rf"{who}.* would keep more than snapshots.memory \(3 MiB\).*the disk is full; until"
    with pytest.warns(UserWarning, match=said):
        snapshot_policy.poll(1.0)
    snapshot_policy.poll(2.0)  # (said once)
    assert not worker_group.on_lost(worker_group.actors[0], None, ClusterError("an actor died"))
    assert len(snapshot_policy.warnings) == 2
    worker_group.actors[0].dropped = worker_group.local_dropped = False
    snapshot_policy.poll(3.0)
    assert worker_group.on_lost(worker_group.actors[0], None, ClusterError("an actor died"))


def test_a_run_that_is_to_end_when_it_would_keep_too_much(tmp_path):
    worker_group, snapshot_policy = crew_of(tmp_path, memory=3, full="end")
    worker_group.actors[0].dropped = True
    with pytest.raises(SnapshotError, match=r"actor 0 would keep more than .*full 'end'"):
        snapshot_policy.poll(0.0)


@pytest.mark.filterwarnings("ignore:a snapshot was not written")
def test_failures_are_counted_and_leave_no_files(tmp_path):
    worker_group, snapshot_policy = crew_of(tmp_path, seconds=2)
    left = tmp_path / "tick-000000000001"
    left.mkdir()
    (left / "block-0.1.1.safetensors").write_bytes(b"x")
    for second in range(3):
        worker_group.told.append(SnapshotNews([], f"reason {second}", 0))
        snapshot_policy.poll(float(second))
    (text,) = snapshot_policy.warnings
    assert text.endswith("not written: reason 0 (3 were not, the last of them: reason 2)")
    assert worker_group.asked
    assert not left.exists()


def test_a_ledger_keeps_no_more_than_it_may(tmp_path):
    channel = Channel(7, "a->b", "a", "b", Kind.STATE, capacity=3)
    limit = 100 * (OBJECT_BYTES + 8)
    sent_log = SentLog({"a"}, replays=True, limit=limit)

    def post(many):
        most = 0
        for n in range(many):
            sent_log.post(channel, Signal(Stamp(n, n, 0), torch.zeros(2)))
            most = max(most, sent_log.nbytes)
        return most

    sent_log.mark(5)
    assert post(90) < limit
    assert not sent_log.dropped
    assert post(1000) <= 1.2 * limit
    assert sent_log.dropped
    sent_log.complete(5)  # taken before the signals were let go: of no use
    assert sent_log.dropped
    sent_log.mark(900)
    post(90)
    assert sent_log.nbytes >= 90 * (OBJECT_BYTES + 8)  # kept again, from that snapshot on
    sent_log.complete(900)
    assert not sent_log.dropped


def test_the_last_one_before_the_end(tmp_path):
    worker_group, snapshot_policy = crew_of(tmp_path, seconds=1000)
    snapshot_policy.poll(0.0)
    assert not snapshot_policy.last(1.0)
    worker_group.writes(worker_group.asked[-1])
    snapshot_policy.poll(1.1)
    assert snapshot_policy.last(1.2)


def test_after_a_loss_the_last_one_is_asked_for_again(tmp_path):
    """Who was replaced has not heard of it. None comes within ten seconds of the second request."""
    worker_group, snapshot_policy = crew_of(tmp_path, seconds=1000)
    snapshot_policy._recovery.replace = lambda losses: None
    snapshot_policy.poll(0.0)
    assert not snapshot_policy.last(1.0)
    worker_group.loses()
    snapshot_policy.poll(2.0)
    assert not snapshot_policy.last(2.1)
    assert len(worker_group.asked) == 2
    assert not snapshot_policy.last(2.1 + LAST_SECONDS)
    assert not snapshot_policy.warnings
    assert snapshot_policy.last(2.2 + LAST_SECONDS)
    assert "no snapshot could be taken before the end within 10 s: there is none" in str(
        snapshot_policy.warnings
    )


def test_what_is_lost_is_replaced_before_the_last_one(tmp_path):
    worker_group, snapshot_policy = crew_of(tmp_path, seconds=1000)
    worker_group.loses()
    assert not snapshot_policy.last(1.0)
    assert not worker_group.asked


@pytest.mark.parametrize("when", ["before", "behind"])
def test_an_end_that_meets_with_a_loss(tmp_path, when):
    """Before the last snapshot, and the cluster cannot take a replacement; behind it, when none
    is tried: the run is called off, which is no error, and says why."""
    worker_group, _ = crew_of(tmp_path, seconds=1000)
    watch = _Watch(worker_group.plan, worker_group, None)

    def refused(losses):
        if when == "behind":
            raise AssertionError("tried")
        raise ClusterError("there is no room for it")

    def answers(seconds):
        if (when == "before" and not worker_group.lost) or worker_group.stopped:
            worker_group.loses()
        elif worker_group.asked and not worker_group.completed:
            worker_group.writes(worker_group.asked[-1])

    watch._supervision._recovery.replace = refused
    worker_group.wait = answers
    stop = threading.Event()
    stop.set()
    watch._follow(stop)
    assert worker_group.called_off
    assert worker_group.stopped == (when == "behind")
    found = watch._warnings
    words = "an actor died" if when == "behind" else "there is no room for it"
    assert [words in line and "while the run was ending" in line for line in found] == [True]


def test_who_had_passed_the_tick_is_asked_again(tmp_path):
    """At once, further ahead, and not after the patience for an unanswered request."""
    worker_group, snapshot_policy = crew_of(tmp_path, seconds=2)
    snapshot_policy.poll(0.0)
    snapshot_policy.poll(2.0)
    assert len(worker_group.asked) == 1
    worker_group.late = True
    worker_group.at(500)
    snapshot_policy.poll(2.2)
    assert len(worker_group.asked) == 2
    assert worker_group.asked[1] > 500
    worker_group.late = False
    snapshot_policy.poll(2.4)
    assert len(worker_group.asked) == 2


class Stands:
    """A node that has come to a tick."""

    name = "u"

    def __init__(self, tick):
        self.tick = tick


@pytest.mark.parametrize(
    ("ticks", "tick", "comes"),
    [((5, 9), 6, True), ((5, 9), 5, False), ((5, 9), 4, False), ((None, 9), 6, False),
     ((None, 9), 10, True), ((None, None), 10, False)],
)  # fmt: skip
def test_no_snapshot_of_a_tick_that_has_begun(tmp_path, ticks, tick, comes):
    """Its file would hold a later state. What was asked for before is still due."""
    plan = plan_of(tmp_path, seconds=1000)
    snapshot_writer = ProcessSnapshots(plan, [Stands(k) for k in ticks], None, None)
    assert snapshot_writer.ask(7 if None not in ticks else 20) == (ticks != (None, None))
    before = snapshot_writer.due
    assert snapshot_writer.ask(tick) == comes
    assert snapshot_writer.due == (tick if comes else before)


def test_a_ledger_weighs_objects_too():
    channel = Channel(0, Kind.STATE, "a", "b", "a->b", capacity=2)
    sent_log = SentLog({"a"}, replays=True)
    for n in range(10):
        sent_log.post(channel, Signal(Stamp(n, n, n), torch.zeros(3, dtype=torch.float64)))
    sent_log.post(channel, Signal(Stamp(10, 10, 10), end=True))
    assert sent_log.nbytes == 11 * OBJECT_BYTES + 10 * 24
    sent_log.mark(11)
    sent_log.complete(11)  # the two latest stay
    assert sent_log.nbytes == 2 * OBJECT_BYTES + 24


def numbered(log):
    """The samples that a log has: those at its numbers, and those behind the one before them."""
    numbers = range(log.first, log.posted + 1)
    found = [log.at(n).stamp.sample for n in numbers]
    assert found == [signal.stamp.sample for signal in log.behind(log.first - 1)]
    assert log.behind(log.posted) == []
    for outside in (log.first - 1, log.posted + 1):
        with pytest.raises(SnapshotError, match=f"signal {outside} of a channel that keeps"):
            log.at(outside)
    return found


def test_which_signals_a_log_has():
    """Written out for a room of 3. Signal n is about sample n; at a cut the last three that were
    posted may be under way, so those before them go, and no other."""
    channel = Channel(7, Kind.STATE, "a", "b", "a->b", capacity=3)
    size = OBJECT_BYTES + 8

    def posted(many, **given):
        sent_log = SentLog({"a"}, **given)
        for n in range(1, many + 1):
            assert sent_log.post(channel, Signal(Stamp(n, n, 0), torch.zeros(2))) == n
            if n == 5:
                sent_log.mark(50)
        return sent_log, sent_log.log(channel)

    sent_log, log = posted(9, replays=True)
    assert numbered(log) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    sent_log.complete(50)
    assert numbered(log) == [3, 4, 5, 6, 7, 8, 9]
    sent_log.complete(50)  # known no more
    assert numbered(log) == [3, 4, 5, 6, 7, 8, 9]
    assert log.nbytes == 7 * size

    for many, first in ((11, 1), (12, 10), (23, 10), (24, 22)):  # every fourth room is cleared
        _, log = posted(many, replays=False)
        assert numbered(log) == list(range(first, many + 1))

    _, log = posted(32, replays=True, limit=16 * size)  # weighed at every 16th: the second is over
    assert numbered(log) == [30, 31, 32]

    log.begin(40, [Signal(Stamp(n, n, 0)) for n in (39, 40)])
    assert (log.first, log.posted, log.nbytes) == (39, 40, 2 * OBJECT_BYTES)
    assert numbered(log) == [39, 40]


def test_a_relative_folder_is_made_absolute_by_the_driver(tmp_path, monkeypatch):
    """Actors may have another current folder; a URL stays one."""
    monkeypatch.chdir(tmp_path)
    assert plan_of("kept").snapshot_policy.path == str(tmp_path / "kept")
    assert plan_of("memory://kept").snapshot_policy.path == "memory://kept"


@pytest.mark.parametrize("snapshots", [3, 30])
def test_nothing_is_left_of_snapshots_that_are_done(snapshots, tmp_path):
    plan = plan_of(tmp_path, engine="inprocess")
    inside = {INPUT, *plan.graph.blocks}
    sent_log = SentLog(inside, replays=False)
    mailbox = Mailbox(inside, sent_log=sent_log)
    nodes = [SourceNode(plan, stream(1), mailbox)]
    nodes += [make_node(plan, name, mailbox) for name in plan.graph.blocks]
    with InProcessSnapshots(plan, nodes, mailbox, sent_log) as run:
        for tick in range(1, snapshots + 1):
            run.snapshot_writer.ask(tick)
            run.snapshot_writer.reach(tick)
    assert len(run.snapshots) == 2
    assert run.snapshot_writer.collected() == ([], None)


def test_two_snapshots_under_way(tmp_path):
    """One process is a snapshot ahead of the other: both snapshots are had, with the samples of
    whoever draws them, and nothing of them is kept behind."""
    plan = plan_of(tmp_path)
    catalogue = SnapshotCatalogue(plan)
    store = storage(plan.snapshot_policy.path)
    blocks = list(plan.graph.blocks)

    def put(tick, names, samples=0):
        parts = {name: write_part(store, tick, f"{i}.x", b"1") for i, name in enumerate(names)}
        return catalogue.put(WrittenFiles(tick, parts, samples, samples // 2))

    first, others = [INPUT, *blocks[:2]], blocks[2:]
    assert put(10, first, 8) is None
    assert put(20, first, 18) is None
    for tick, samples in ((10, 8), (20, 18)):
        manifest = put(tick, others).manifest
        assert (manifest.tick, manifest.samples, manifest.passed) == (tick, samples, samples // 2)
        assert set(manifest.parts) == {INPUT, *blocks}
    assert put(10, others) is None  # what comes late is let go
    assert not catalogue._partial
