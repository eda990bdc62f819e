"""Documented contract: nothing is paired by arrival order. A receiver that finds another stamp than
the one its schedule names stops, and names the edge and both stamps. Bundles: what waits to leave
together leaves before anybody can miss it."""

from __future__ import annotations

import dataclasses
import functools
import threading

import pytest
import torch
from runtime.networks import chain, cycle_graph, skip_graph, stream

from hamdist.config import Settings, read_settings, to_yaml
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.errors import SettingsError, StampError
from hamdist.runtime.engines.worker import Worker
from hamdist.runtime.nodes.factory import make_node
from hamdist.runtime.nodes.loop import run_loop
from hamdist.runtime.nodes.mailbox import Mailbox
from hamdist.runtime.nodes.source import SourceNode
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.signals.signal import Channel, Signal
from hamdist.runtime.train.prepare import as_graph
from hamdist.runtime.train.train import train

CHANNEL = Channel(0, Kind.STATE, "a", "b", "a->b", 4)


def test_the_named_signal_is_handed_over():
    mailbox = Mailbox({"a", "b"})
    signal = Signal(Stamp(4, 2, 1), torch.ones(2))
    mailbox.post(CHANNEL, signal)
    assert mailbox.take(CHANNEL, Stamp(4, 2, 1), 5) is signal
    assert mailbox.payload_bytes == {"a->b": 8}


@pytest.mark.parametrize("sent", [Stamp(3, 2, 1), Stamp(4, 3, 1), Stamp(4, 2, 0)])
def test_another_stamp_is_a_defect(sent):
    mailbox = Mailbox({"a", "b"})
    mailbox.post(CHANNEL, Signal(sent))
    with pytest.raises(StampError) as caught:
        mailbox.take(CHANNEL, Stamp(4, 2, 1), 5)
    text = str(caught.value)
    assert "edge a->b" in text
    assert "names tick 4, sample 2, version 1" in text
    assert f"tick {sent.tick}, sample {sent.sample}, version {sent.version} was there" in text
    assert caught.value.block == "b"


def test_nothing_there_is_a_defect_too():
    with pytest.raises(StampError, match="nothing was there"):
        Mailbox({"a", "b"}).take(CHANNEL, Stamp(0, 0, 0), 1)


class Meddling(Mailbox):
    """Changes one signal on its way: what a defect of an engine would do."""

    def __init__(self, inside, kind, at, change):
        super().__init__(inside)
        self.kind, self.at, self.change = kind, at, change
        self.count = 0

    def post(self, channel, signal):
        if channel.kind is self.kind and channel.edge == "block1->block2":
            if self.count == self.at:
                signal = Signal(self.change(signal.stamp), signal.payload)
            self.count += 1
        super().post(channel, signal)


@pytest.mark.parametrize("kind", [Kind.STATE, Kind.MESSAGE])
@pytest.mark.parametrize("level", ["local", "trace"])
@pytest.mark.parametrize(
    "change",
    [
        lambda s: s._replace(tick=s.tick + 1),
        lambda s: s._replace(sample=s.sample - 1),
        lambda s: s._replace(version=s.version + 1),
    ],
)
def test_a_run_stops_at_the_first_wrong_stamp(kind, level, change):
    source = stream(40)
    settings = Settings.model_validate({"level": level})
    graph = as_graph(chain(), settings, source.spec, cross_entropy)
    plan = make_plan(graph, settings, source.spec)
    mailbox = Meddling({"u", *graph.blocks}, kind, 11, change)
    nodes = [
        SourceNode(plan, source, mailbox),
        *(make_node(plan, b, mailbox) for b in graph.blocks),
    ]
    with pytest.raises(StampError, match="block1->block2"):
        run_loop(nodes)


# -- bundles -----------------------------------------------------------------------------------

THREE = CHANNEL._replace(number=1, bundle=3, span=4)  # a signal every other tick
FIVE = CHANNEL._replace(number=2, bundle=5, span=8)
BACK = CHANNEL._replace(number=3, sender="b", receiver="a")


class Recorder:
    """A transport that notes the messages; nothing is ever waited for."""

    def __init__(self):
        self.messages = []

    def send(self, channel, *signals):
        self.messages.append((channel.number, [s.stamp.tick for s in signals]))

    def receive(self, channel, stamp):
        return Signal(stamp)


@pytest.fixture
def room():
    recorder = Recorder()
    return Mailbox({"a"}, recorder), recorder.messages


def post(mailbox, channel, tick, **fields):
    mailbox.post(channel, Signal(Stamp(tick, tick, 0), **fields))


def test_a_full_bundle_is_one_message(room):
    mailbox, messages = room
    for tick in range(0, 14, 2):
        post(mailbox, THREE, tick)
    assert messages == [(1, [0, 2, 4]), (1, [6, 8, 10])]
    mailbox.flush()
    assert messages[2:] == [(1, [12])]
    mailbox.flush()
    assert len(messages) == 3


def test_the_end_of_the_stream_takes_along_what_waits(room):
    mailbox, messages = room
    post(mailbox, THREE, 0)
    post(mailbox, THREE, 2, end=True)
    assert messages == [(1, [0, 2])]


def test_a_channel_without_bundles_sends_at_once(room):
    mailbox, messages = room
    post(mailbox, CHANNEL, 0)
    assert messages == [(0, [0])]


@pytest.mark.parametrize("by", ["post", "take"])
def test_a_bundle_whose_sender_has_ended_leaves_when_its_time_is_over(room, by):
    """No signal says that a node has ended: the first call of a later tick finds it out, before it
    can block. Of two, the one that was due first goes first."""
    mailbox, messages = room

    def call(tick):
        if by == "post":
            post(mailbox, CHANNEL, tick)
        else:
            mailbox.take(BACK, Stamp(tick - 1, 0, 0), tick)

    post(mailbox, FIVE, 8)
    post(mailbox, THREE, 9)
    call(13)
    assert [m for m in messages if m[0]] == []
    call(14)
    assert [m for m in messages if m[0]] == [(1, [9])]
    call(16)
    assert len([m for m in messages if m[0]]) == 1
    call(17)
    assert [m for m in messages if m[0]] == [(1, [9]), (2, [8])]
    post(mailbox, FIVE, 18)
    post(mailbox, THREE, 19)
    call(99)
    assert [m for m in messages if m[0]] == [(1, [9]), (2, [8]), (1, [19]), (2, [18])]


@pytest.mark.parametrize(
    ("text", "bundle"), [("off", "off"), ("'off'", "off"), ("auto", "auto"), ("3", 3)]
)
def test_the_setting(text, bundle):
    """YAML reads off as false."""
    read = read_settings(f"engine: {{bundle: {text}}}", "here")
    assert read.engine.bundle == bundle
    assert read_settings(to_yaml(read), "again") == read


@pytest.mark.parametrize("text", ["0", "on", "many"])
def test_a_wrong_setting(text):
    with pytest.raises(SettingsError, match=r"engine\.bundle"):
        read_settings(f"engine: {{bundle: {text}}}", "here")


def deep(graph, delay):
    """`graph` with `delay` more on every edge."""
    blocks = [
        dataclasses.replace(
            block, delays={p: block.delays.get(p, 1) + delay for p in block.parents}
        )
        for block in graph.blocks.values()
    ]
    return Graph(blocks)


HELD = {"level": "local", "locality": {"speed": 2}}
LATE = {"level": "local", "locality": {"order": "sequential"}}
PULSE = {"level": "trace"}
FASTER = {"level": "trace", "locality": {"speed": 2}}
CASES = {
    "skips, held": (skip_graph, "adw|by|c", HELD),
    "skips, late": (skip_graph, "adw|by|c", LATE),
    "skips, pulse": (skip_graph, "aw|bd|cy", PULSE),
    "skips, faster": (skip_graph, "aw|bd|cy", FASTER),
    "cycle, held": (cycle_graph, "ac|b|d", HELD),
    "cycle, late": (cycle_graph, "ad|b|c", LATE),
}
ITEMS = 13  # several bundles of the largest size, and one that is not full


@functools.cache
def in_one_process(case):
    build, _, fields = CASES[case]
    wanted = Settings.model_validate({"steps": ITEMS, **fields})
    return train(deep(build(), 3), stream(ITEMS), wanted).blocks


@pytest.mark.parametrize(
    ("bundle", "way"),
    [("off", "shm"), ("auto", "shm"), (2, "shm"), (99, "shm"), ("auto", "ipc")],
)
@pytest.mark.parametrize("case", CASES)
def test_bundles_change_no_number_and_hang_nobody(leaves_no_socket, case, way, bundle):
    """With the shortest queue, blocks that wait for each other in a circle of processes, and nodes
    that end while others of their process go on."""
    build, placement, fields = CASES[case]
    source = stream(ITEMS)
    engine = {"queue": 1, "bundle": bundle}
    settings = Settings.model_validate({"steps": ITEMS, "engine": engine, **fields})
    plan = make_plan(deep(build(), 3), settings, source.spec)
    edges = [(e, k) for e in plan.graph.edges for k in (Kind.STATE, Kind.MESSAGE)]
    most = max(plan.schedule.bundle(e, k).size for e, k in edges)
    assert most > 1
    largest = {"off": 1, "auto": (most + 1) // 2, 2: 2, 99: most}[bundle]
    assert max(c.bundle for c in plan.channels.all()) == largest
    hosts = [Worker(plan.only(list(part)), list(part), None) for part in placement.split("|")]
    hosts.append(Worker(plan.only([]), [], source))
    places = [*({*part} for part in placement.split("|")), {"u"}]
    addresses = {}
    for host, inside in zip(hosts, places, strict=True):
        comes = [c for c in plan.channels.all() if c.receiver in inside and c.sender not in inside]
        addresses |= host.bind({c.number: way for c in comes})
    for host in hosts:
        host.connect(addresses)
    reports = [None] * len(hosts)

    def run(i):
        reports[i] = hosts[i].run()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    hung = [hosts[i].status(0, None).wait for i, thread in enumerate(threads) if thread.is_alive()]
    for host in hosts:
        host.abort()
    for thread in threads:
        thread.join(10)
    for host in hosts:
        host.close()
    assert hung == []
    assert [report.error for report in reports] == [None] * len(hosts)  # type: ignore[attr-defined]
    alone = in_one_process(case)
    spread = {name: state for report in reports for name, state in report.blocks.items()}  # type: ignore[attr-defined]
    assert spread.keys() == alone.keys()
    for name, state in alone.items():
        assert spread[name].updates == state.updates
        for key, value in state.theta.items():
            assert torch.equal(spread[name].theta[key], value), (name, key)
