"""Three hosts in threads of one process: the stream, and two blocks of which one is slow."""

from __future__ import annotations

import threading

import pytest
import torch
from runtime.networks import CLASSES, EndlessStream, stream
from torch import nn

from hamdist.config import Settings
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.objective.prequential import Prequential
from hamdist.runtime.engines.worker import Worker
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.train.prepare import as_graph
from hamdist.streams import Sample, SampleSpec

pytestmark = pytest.mark.timeout(60)

WIDE = 65_536
GATE = threading.Event()


class Gate(nn.Module):
    """Waits in its sixth forward pass until GATE opens."""

    calls = 0

    def forward(self, x):
        self.calls += x.device.type != "meta"
        if self.calls == 6:
            GATE.wait()
        return x


class WideStream:
    """Signals of 1 MiB: what the kernel's own buffers take is less than one."""

    portable = True
    spec = SampleSpec((4, WIDE), torch.float32, (4,), torch.int64, CLASSES)

    def samples(self):
        return (Sample(torch.zeros(4, WIDE), torch.zeros(4, dtype=torch.int64)) for _ in range(60))


def hosts(source, steps, queue=4, level="trace"):
    """A host for the stream and one for each of two blocks, wired."""
    features = source.spec.u_shape[1]
    model = nn.Sequential(nn.Linear(features, 5), Gate(), nn.Linear(5, CLASSES))
    settings = Settings.model_validate({"level": level, "steps": steps, "engine": {"queue": queue}})
    graph = as_graph(model, settings, source.spec, cross_entropy)
    plan = make_plan(graph, settings, source.spec)
    made = {
        "u": Worker(plan, [], source),
        "block0": Worker(plan, ["block0"], None),
        "block1": Worker(plan, ["block1"], None),
    }
    addresses = {}
    for name, host in made.items():
        own = [c for c in plan.channels.all() if c.receiver == name]
        addresses |= host.bind({c.number: "shm" for c in own})
    for host in made.values():
        host.connect(addresses)
    return plan, made


def run_all(made):
    reports = {}
    threads = [
        threading.Thread(target=lambda n=name, h=host: reports.__setitem__(n, h.run()))
        for name, host in made.items()
    ]
    for thread in threads:
        thread.start()
    return threads, reports


def close(made):
    for host in made.values():
        host.close()


def test_a_slow_block_holds_the_stream_back(leaves_no_socket):
    GATE.clear()
    plan, made = hosts(WideStream(), 60)
    threads, reports = run_all(made)
    patience = threading.Event()
    wait = None
    while wait is None or wait.seconds < 0.5:
        patience.wait(0.05)
        wait = made["u"].status(0, None).wait
    drawn = made["u"].status(0, None).samples
    room = max(c.capacity for c in plan.channels.all()) + 1  # and the one that it is about to send
    assert 6 <= drawn <= 6 + room
    assert wait.waiter == "u"
    assert "room for" in wait.waits_for
    slow = made["block1"].status(0, None).wait
    assert slow is not None
    assert slow.awaited in {"block0", "u"}
    GATE.set()
    for thread in threads:
        thread.join(40)
    assert all(r.error is None and not r.aborted for r in reports.values())
    assert reports["u"].samples == 60
    assert reports["block0"].blocks["block0"].updates == 60
    close(made)


def test_a_host_that_is_called_off_ends_at_once(leaves_no_socket):
    GATE.set()
    _, made = hosts(EndlessStream(), None)
    threads, reports = run_all(made)
    patience = threading.Event()
    while made["u"].status(0, None).samples < 50:
        patience.wait(0.01)
    for host in made.values():
        host.abort()
    for thread in threads:
        thread.join(10)
    assert all(r.aborted for r in reports.values())
    close(made)


def test_traces_hold_what_the_schedule_says():
    """An endless stream runs in constant memory: floor(d_l / c) + 1 records, and no more."""
    from runtime.networks import chain

    from hamdist.runtime.nodes.factory import make_node
    from hamdist.runtime.nodes.loop import run_loop
    from hamdist.runtime.nodes.mailbox import Mailbox
    from hamdist.runtime.nodes.source import SourceNode

    source = stream(60)
    settings = Settings.model_validate({"level": "trace"})
    plan = make_plan(as_graph(chain(), settings, source.spec, cross_entropy), settings, source.spec)
    mailbox = Mailbox({"u", *plan.graph.blocks})
    nodes = [make_node(plan, name, mailbox) for name in plan.graph.blocks]
    most = dict.fromkeys(plan.graph.blocks, 0)

    def between():
        for node in nodes:
            most[node.name] = max(most[node.name], len(getattr(node.block, "trace", ())))

    run_loop([SourceNode(plan, source, mailbox), *nodes], between)
    assert most == {"block0": 9, "block1": 7, "block2": 5, "block3": 3, "block4": 0}
    assert all(not queue for queue in mailbox._queues.values() if queue and not queue[0].end)


def test_windows_of_an_endless_stream_are_joined():
    metrics = Prequential(every=1, limit=8)
    for n in range(1000):
        metrics.record(n, torch.zeros(1, 2), torch.tensor([0]), torch.tensor(float(n)))
    metrics.flush()
    assert len(metrics.windows) <= 8
    assert sum(w.samples for w in metrics.windows) == 1000
    assert sum(w.loss for w in metrics.windows) == sum(range(1000))
    assert metrics.windows[0].first == 0
    assert metrics.windows[-1].last == 999
    assert [w.first for w in metrics.windows[1:]] == [w.last + 1 for w in metrics.windows[:-1]]
