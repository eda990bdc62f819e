"""Signals in memory that one process lends another, with files in place of a GPU's memory: exact,
never written too early, never believed from the dead; and with a GPU where there is one."""

from __future__ import annotations

import dataclasses
import os
import signal as signals_of_unix
import struct
import subprocess
import threading

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal, settings
from runtime.networks import PortableStream, chain
from runtime.ray_engine.test_recovery import Once, cut, driver, net  # noqa: F401  (a fixture)
from runtime.transport.standin import LIES, FileMemory, StandIn

from hamdist.config import EngineSettings, Settings, read_settings
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.errors import ClusterError, SettingsError, WireError
from hamdist.runtime.advice.advice import gpu_signal_notes
from hamdist.runtime.plan.derived import slot_bytes
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.signals.packing import Packer
from hamdist.runtime.signals.sent_log import ChannelLog
from hamdist.runtime.signals.signal import Aborted, Channel, Signal, on_host
from hamdist.runtime.train import train as training
from hamdist.runtime.train.prepare import as_graph
from hamdist.runtime.train.train import train
from hamdist.runtime.transport import gpu_ring as lending
from hamdist.runtime.transport import shared_memory as shared
from hamdist.runtime.transport.endpoint import EndpointContext, socket_folder
from hamdist.runtime.transport.gpu_ring import (
    ANSWER,
    OFFER,
    CudaMemory,
    GpuMemoryError,
    GpuRingReceiver,
    GpuRingSender,
    Refusal,
    cuda_memory,
    ending,
)
from hamdist.runtime.transport.shared_memory import GPU_SCHEME, SharedSender
from hamdist.runtime.transport.shared_receiver import SharedReceiver
from hamdist.runtime.transport.transport import Endpoints

RUN = 79
CHANNEL = Channel(5, Kind.STATE, "a", "b", "a->b", 6, slack=4)
SLOT = 4000  # bytes

pytestmark = [
    pytest.mark.timeout(110),
    pytest.mark.skipif(not shared.available(), reason="this platform has no such memory"),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand")
needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="no two CUDA devices are at hand"
)


def signal(n, size=10):
    return Signal(Stamp(n, n, 0), torch.arange(float(n), float(n + size)))


def same(got, sent):
    assert got.stamp == sent.stamp
    assert got.end == sent.end
    assert (got.payload is None) == (sent.payload is None)
    if sent.payload is not None:
        assert got.payload.dtype == sent.payload.dtype
        assert torch.equal(got.payload, sent.payload)


class Pair:
    """Both ends of a channel. put: how many signals went into slots."""

    def __init__(self, folder, channel=CHANNEL, lie="", holding=2**20, agree=True):
        self.aborts = threading.Event(), threading.Event()
        self.lines = [EndpointContext(RUN, abort) for abort in self.aborts]
        self.put = 0
        self.gpu_sender = Counting(self, FileMemory(folder, lie, holding), channel)
        self.receiver = SharedReceiver(self.lines[1], channel, FileMemory(folder, lie))
        self.sender = SharedSender(self.lines[0], channel, self.receiver.address, self.gpu_sender)
        if agree:
            self.receiver.answer()
            self.sender.poll()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sender.close()
        self.receiver.close()
        socket_folder(RUN).rmdir()

    def pass_on(self, *sent):
        self.sender.send(sent)
        self.check(*sent)

    def check(self, *sent):
        for one in sent:
            same(self.receiver.receive(one.stamp), one)

    def blocks(self, one):
        """Whether there is no room for it."""
        self.aborts[0].set()
        try:
            self.sender.send([one])
        except Aborted:
            return True
        finally:
            self.aborts[0].clear()
        return False


class Counting(GpuRingSender):
    def __init__(self, pair, memory, channel):
        super().__init__(memory, channel, RUN, SLOT)
        self.pair = pair

    def put(self, payload):
        self.pair.put += 1
        slot = super().put(payload)
        assert slot not in self._free
        return slot


def payloads():
    torch.manual_seed(3)
    yield torch.randn(7, 3)
    yield torch.randn(7, 3, dtype=torch.float64)
    yield torch.tensor(3.5)
    yield torch.randn(5, 1, 2).to(torch.bfloat16)
    yield torch.randint(-99, 99, (9,))
    yield torch.tensor([[True], [False], [True]])
    yield torch.empty(0, 4)
    yield None
    yield torch.randint(-128, 127, (3, 11), dtype=torch.int8)


def test_any_signal_arrives_to_the_bit(tmp_path, leaves_no_socket):
    with Pair(tmp_path) as pair:
        assert pair.receiver.address.startswith(GPU_SCHEME)
        for n, payload in enumerate(payloads()):
            pair.pass_on(Signal(Stamp(n, n, 0), payload, end=n == 4))
        assert pair.put == 7  # all that have bytes


def test_slots_are_used_again_and_kept_tensors_stay(tmp_path, leaves_no_socket):
    with Pair(tmp_path) as pair:
        kept = []
        for n in range(50):
            own = signal(n)
            pair.sender.send([own])
            own.payload.fill_(-1)
            kept.append(pair.receiver.receive(own.stamp))
        for n, got in enumerate(kept):
            same(got, signal(n))
        assert pair.put == 50
        assert len(list(tmp_path.glob("lent.*"))) == 1


@pytest.mark.parametrize("slack", [1, 4])
def test_a_full_ring_holds_the_sender_back(tmp_path, leaves_no_socket, slack):
    """As many signals as the channel has room for; none is written over."""
    with Pair(tmp_path, CHANNEL._replace(slack=slack)) as pair:
        first = 0
        for n in range(30):
            if pair.blocks(signal(n)):
                waiting = [signal(i) for i in range(first, n)]
                assert len(waiting) > CHANNEL.capacity - slack
                pair.check(*waiting)
                first = n
                pair.sender.send([signal(n)])
        assert pair.put == 30


def test_a_bundle_waits_for_the_gpu_once(tmp_path, leaves_no_socket, monkeypatch):
    settled = []
    settle = FileMemory.synchronise
    monkeypatch.setattr(FileMemory, "synchronise", lambda own: settled.append(settle(own)))
    with Pair(tmp_path, CHANNEL._replace(bundle=4)) as pair:
        settled.clear()
        pair.pass_on(*[signal(n) for n in range(4)])
        assert len(settled) == 2  # one at either end
        pair.pass_on(signal(4, 0))
        assert len(settled) == 2
        assert pair.put == 4


def test_nobody_waits_for_an_answer(tmp_path, leaves_no_socket):
    """Both ends of two channels that send before they receive would wait for ever."""
    with Pair(tmp_path, agree=False) as pair:
        for n in range(2):
            pair.sender.send([signal(n)])
        assert pair.put == 0
        for n in range(2):
            pair.check(signal(n))
        for n in range(2, 5):
            pair.pass_on(signal(n))
        assert pair.put == 3


@pytest.mark.parametrize("lie", LIES)
def test_memory_that_cannot_be_trusted_is_not_used(tmp_path, leaves_no_socket, lie):
    with Pair(tmp_path, lie=lie) as pair:
        for n in range(20):
            pair.pass_on(signal(n))
        assert pair.put == 0
        assert LIES[lie] in pair.gpu_sender.refusal
        assert "\n" not in pair.gpu_sender.refusal


@pytest.mark.parametrize(("holding", "fit"), [(2000, 2), (2**20, 3)])
def test_what_does_not_fit_goes_through_host_memory(tmp_path, leaves_no_socket, holding, fit):
    """Too large for a slot; elsewhere than on the GPU; and rings of host memory that grow between
    them: no slot is lost, or free twice."""
    with Pair(tmp_path, holding=holding) as pair:
        n = 0
        for size in (10, 400, 800, 2_000, 3_000, 9_000, 20_000):
            made = [signal(n + i, size if i % 2 else 10) for i in range(5)]
            for one in made:
                pair.sender.send([one])
            pair.check(*made)
            n += 5
        assert pair.put == 7 * 3 + fit * 2  # the small ones, and so many of the others' sizes
        refusal = pair.gpu_sender.refusal
        assert (refusal is None) == (holding < SLOT)
        assert refusal is None or "80,000 bytes do not fit into slots of 4,096" in refusal
        for i in range(n, n + 30):
            pair.pass_on(signal(i))
        under_way = [s - CHANNEL.capacity for s in pair.sender._under_way if s is not None]
        assert sorted([*pair.gpu_sender._free, *under_way]) == list(range(CHANNEL.capacity))


# -- a sender that is about to end --------------------------------------------------------------


def test_the_end_of_a_process_is_seen():
    assert not ending(os.getpid())
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert not ending(child.pid)
        os.kill(child.pid, signals_of_unix.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert ending(child.pid)  # it is still in the table of processes
    finally:
        child.kill()
        child.wait()
    assert ending(child.pid)


def test_nothing_is_believed_of_the_dead(tmp_path, leaves_no_socket, monkeypatch):
    """Nor what lies behind it: that would be another signal than the one that is due."""
    with Pair(tmp_path) as pair:
        pair.pass_on(signal(0))
        pair.sender.send([signal(1)])
        pair.sender.send([signal(2, SLOT)])  # through host memory, where it is as safe as ever
        monkeypatch.setattr(lending, "ending", lambda process: process == os.getpid())
        pair.aborts[1].set()
        for _ in range(2):
            with pytest.raises(Aborted):
                pair.receiver.receive(Stamp(1, 1, 0))


def test_a_sender_that_cannot_be_watched_lends_nothing(tmp_path, leaves_no_socket, monkeypatch):
    monkeypatch.setattr(lending, "ending", lambda process: True)
    with Pair(tmp_path) as pair:
        pair.pass_on(signal(0))
        assert pair.put == 0
        assert f"process {os.getpid()} in /proc" in pair.gpu_sender.refusal


def test_an_end_that_is_opened_anew_agrees_while_it_runs(tmp_path, leaves_no_socket):
    """A receiver that begins again gets what is in the log, and then what is new."""
    aborts = threading.Event(), threading.Event()
    sender, receiver = (Endpoints(RUN, abort) for abort in aborts)
    log = ChannelLog(CHANNEL.capacity)
    kept = [signal(n) for n in range(40)]
    for one in kept[:30]:
        log.add(one)
    gpu_senders = []
    try:
        for first in (1, 11):
            gpu_senders.append(GpuRingSender(FileMemory(tmp_path), CHANNEL, RUN, SLOT))
            address = receiver.bind(CHANNEL, "shm", memory=FileMemory(tmp_path))
            sender.connect(CHANNEL, address, -1, log, first, gpu_senders[-1])
            for one in kept[first - 1 : 20]:
                same(receiver.receive(CHANNEL, one.stamp), one)

        def post():
            for one in kept[30:]:
                log.add(one)
                sender.send(CHANNEL, one)

        thread = threading.Thread(target=post)
        thread.start()
        for one in kept[20:]:
            same(receiver.receive(CHANNEL, one.stamp), one)
        thread.join()
        assert gpu_senders[1].used
    finally:
        for end in (sender, receiver):
            end.close()


# -- strangers ----------------------------------------------------------------------------------


def head(magic=OFFER, form=1, number=5, run=RUN, slots=6, slot_bytes=512):
    return struct.pack("<2sBBIQIQ", magic, form, 0, number, run, slots, slot_bytes)


@pytest.mark.parametrize(
    ("packet", "words"),
    [
        (OFFER, "2 bytes offer"),
        (head(form=2), "format 2"),
        (head(number=4), "channel 4"),
        (head(run=RUN + 1), "run 50"),
        (head(slots=7), "7 slots of 512 bytes in 3072"),
        (head(slots=0), "0 slots"),
        (head(slot_bytes=1024), "6 slots of 1024"),
        (head(slots=2**31, slot_bytes=2**62), "slots of"),
    ],
)
def test_an_offer_of_a_stranger_is_refused(tmp_path, packet, words):
    gpu_receiver = GpuRingReceiver(FileMemory(tmp_path), CHANNEL, RUN)
    _, handle = FileMemory(tmp_path).export(6 * 512)
    with pytest.raises(WireError, match=words):
        gpu_receiver.answer(packet + (handle if len(packet) > 2 else b""), os.getpid())


@pytest.mark.parametrize(
    "answer",
    [ANSWER + b"?" + bytes(32), b"XX+" + bytes(32), ANSWER + b"+", ANSWER + b"+" + b"x" * 99],
)
def test_a_wrong_answer_opens_no_slot(tmp_path, answer):
    gpu_sender = GpuRingSender(FileMemory(tmp_path), CHANNEL, RUN, SLOT)
    assert gpu_sender.offer() is not None
    try:
        gpu_sender.answered(answer)
    except WireError:
        assert answer[:3] != ANSWER + b"+"
    assert not gpu_sender.used
    gpu_sender.waiting = False
    with pytest.raises(WireError, match="answers no offer"):
        gpu_sender.answered(ANSWER + b"+" + gpu_sender._expected)


@pytest.mark.parametrize(("slot", "floats"), [(6, 4), (2**32 - 7, 4), (0, 1025), (0, 2**20)])
def test_a_slot_that_is_not_there_is_refused(tmp_path, leaves_no_socket, slot, floats):
    with Pair(tmp_path) as pair:
        packer = Packer(RUN, CHANNEL)
        made = signal(0, floats)
        header = packer.header(made, packer.form(made.payload), CHANNEL.capacity + slot)
        pair.sender._socket.send(header)
        with pytest.raises(WireError, match=f"no slot {slot} of a GPU"):
            pair.receiver.receive(Stamp(0, 0, 0))


# -- CUDA's lines, as far as they go without it --------------------------------------------------


def test_a_handle_of_cuda_is_plain_data_and_opens_here(monkeypatch):
    """In place of torch's calls: what one process tells comes to the other, but for the number of
    the device and the setting of the block to wait for an event, which are its own."""
    told = (1, b"\x00handle\xff", 64, 512, b"/counter", 3, b"event", True)
    opened = []

    def opens(*args):
        opened.append(args)
        return memory.untyped_storage()

    monkeypatch.setattr(torch.UntypedStorage, "_share_cuda_", lambda own: told)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", staticmethod(opens))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    own = CudaMemory(0)
    monkeypatch.setattr(own, "_device", torch.device("cpu"))
    memory, handle = own.export(64)
    memory.copy_(torch.arange(64))
    reached = own.reach(handle)
    assert reached.dtype == torch.uint8
    assert torch.equal(reached, torch.arange(64, dtype=torch.uint8))
    assert opened == [(None, *told[1:7], False)]
    for wrong in (b"[1, 2]", b"{", b"\xff"):
        with pytest.raises(GpuMemoryError, match="cannot be reached: "):
            own.reach(wrong)


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_memory_is_lent_of_gpus_alone(device, index):
    assert cuda_memory(torch.device("cpu")) is None
    own = cuda_memory(torch.device(device))
    assert own is not None
    assert own._device == torch.device("cuda", index)  # type: ignore[attr-defined]
    assert not own.holds(torch.ones(1))


# -- whole runs ---------------------------------------------------------------------------------


def run_of(engine, items=41, **fields):
    wanted = {"level": "trace", **fields}
    return train(chain(), PortableStream(items), settings(engine, items, **wanted))


@pytest.fixture
def standin(monkeypatch, tmp_path):
    """Makes the processor a GPU for the runs that follow, whose memory lies as it is told."""

    def put(lie=""):
        folder = tmp_path / f"gpu {lie}"
        folder.mkdir(exist_ok=True)
        own = StandIn(str(folder), lie)

        def planned(*args, **kwargs):
            return dataclasses.replace(make_plan(*args, **kwargs), memory_of=own)

        monkeypatch.setattr(training, "make_plan", planned)
        return own

    return put


def about_gpus(result):
    return [w for w in result.warnings if "GPU" in w]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("engine", "fields"),
    [
        ({"actors": 3}, {"level": "local"}),
        ({"actors": 2, "compress": "int8", "feedback": "on"}, {"partition": {"delay": 4}}),
    ],
)
def test_a_run_by_lent_memory(session, leaves_no_socket, standin, engine, fields):
    """Alone and in bundles, as they are and compressed."""
    own = standin()
    wanted = {"kind": "ray", "device_signals": "ipc", **engine}
    alone = run_of({**engine, "kind": "inprocess", "actors": 1}, **fields)
    result = run_of(wanted, **fields)
    assert_equal(alone, result)
    ways = 2 * (engine["actors"] - 1)
    assert own.count("reached") == own.count("lent") == ways
    assert about_gpus(result) == []


@pytest.mark.ray
def test_a_run_whose_memory_cannot_be_trusted(session, leaves_no_socket, standin):
    """Goes on through host memory and says so once, or is refused where that was asked for."""
    own = standin("is other memory")
    engine = {"kind": "ray", "actors": 2}
    result = run_of(engine)
    assert_equal(run_of({"kind": "inprocess"}), result)
    (said,) = about_gpus(result)
    assert "between GPUs: " in said
    assert "1 more like it" in said
    assert "something else there than its sender has written" in said
    assert own.count("reached") == 2
    with pytest.raises(ClusterError, match="engine.device_signals 'ipc': .* on edge .*use 'auto'"):
        run_of({**engine, "device_signals": "ipc"})
    run_of({**engine, "device_signals": "host"})
    assert own.count("lent") == 4


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_actor(session, driver, leaves_no_socket, standin, tmp_path):  # noqa: F811
    """Its neighbours lend to its successor, and it to them."""
    own = standin()
    mark = tmp_path / "mark"
    given = {"level": "trace", "partition": cut()}
    alone = train(net((2, Once(None, mark, ""))), PortableStream(60), settings({}, 60, **given))
    kept = {"path": str(tmp_path / "kept"), "every": 10}
    engine = {"kind": "ray", "actors": 3, "device_signals": "ipc"}
    odd = net((2, Once(31, mark, "kill")))
    result = train(odd, PortableStream(60), settings(engine, 60, snapshots=kept, **given))
    assert_equal(alone, result)
    assert len(result.replaced) == 1
    assert own.count("reached") == 8  # four ways, of which all lead to the one that was lost
    assert about_gpus(result) == []


def test_slots_have_the_size_of_a_signal():
    """By hand: batches of 4, 8 numbers of 4 or 8 bytes; a message in the wider type of its
    ends."""
    wanted = {"level": "trace", "engine": {"blocks": {"block1": {"dtype": "float64"}}}}
    own = Settings.model_validate(wanted)
    source = PortableStream(3)
    plan = make_plan(as_graph(chain(), own, source.spec, cross_entropy), own, source.spec)
    edges = {e.name: e.index for e in plan.graph.edges}
    states = {n: slot_bytes(plan, plan.channels.states[edges[n]]) for n in edges if "u" not in n}
    assert states["block0->block1"] == 4 * 8 * 4
    assert states["block1->block2"] == 4 * 8 * 8
    back = {n: slot_bytes(plan, plan.channels.messages[edges[n]]) for n in states}
    assert back["block0->block1"] == back["block1->block2"] == 4 * 8 * 8
    assert back["block2->block3"] == 4 * 8 * 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("device_signals: nccl", "engine.device_signals: .*'auto', 'host' or 'ipc'"),
        ("{device_signals: ipc, transport: tcp}", "'ipc' with transport 'tcp'.*'auto' or 'shm'"),
        ("{device_signals: ipc, link_delay: 0.1}", "'ipc' with link_delay 0.1"),
    ],
)
def test_wrong_words(text, words):
    text = text if text.startswith("{") else f"{{{text}}}"
    with pytest.raises(SettingsError, match=words):
        read_settings(f"engine: {text}", "here")


def test_what_is_said():
    auto, ipc = EngineSettings(), EngineSettings(device_signals="ipc")
    assert gpu_signal_notes(auto, 0, []) == gpu_signal_notes(ipc, 2, []) == []
    (idle,) = gpu_signal_notes(ipc, 0, [])
    assert "'ipc' has no effect: no two actors" in idle
    told = [Refusal("h 1", "no peer"), Refusal("h 2", "no memory"), Refusal("m 1", "no peer")]
    first, second = gpu_signal_notes(auto, 3, told)
    assert "h 1, and 1 more like it, went through host memory: no peer" in first
    assert "h 2 went through host memory: no memory" in second


def test_signals_of_the_processor_stay_what_they_are():
    made = [signal(0), Signal(Stamp(1, 1, 0))]
    assert on_host(made) is made


# -- with a GPU ---------------------------------------------------------------------------------


@needs_gpu
def test_signals_leave_a_gpu_or_stay():
    made = [signal(0), Signal(Stamp(1, 1, 0)), Signal(Stamp(2, 2, 0), torch.ones(3, device="cuda"))]
    moved = on_host(made)
    assert moved[2].payload.is_cpu
    assert on_host(made, lambda tensor: tensor.is_cuda)[2].payload is made[2].payload


HALVES = [["block0", "block1"], ["block2", "block3", "block4"]]


def on_gpus(share, ways, **engine):
    """Two actors, equal to one process on a GPU to the bit."""
    blocks = {"block[01]": {"device": "cuda", "gpus": share}}
    blocks["block[2-4]"] = {"device": "cuda", "gpus": share}
    spread = {"kind": "ray", "placement": HALVES, "blocks": blocks, "device_signals": ways}
    alone = run_of({"kind": "inprocess", "device": "cuda", **engine})
    assert_equal(alone, run_of({**spread, **engine}))


@pytest.mark.ray
@needs_gpu
@pytest.mark.parametrize("ways", ["ipc", "host"])
@pytest.mark.parametrize("compress", ["none", "int8"])
def test_two_actors_on_one_gpu(session, leaves_no_socket, ways, compress):
    """With 'ipc' a run is refused whose signals would go through host memory."""
    on_gpus(0.5, ways, compress=compress)


@pytest.mark.ray
@needs_two_gpus
def test_two_actors_on_two_gpus(session, leaves_no_socket):
    on_gpus(1, "auto")


@pytest.mark.ray
@needs_gpu
@pytest.mark.parametrize("ways", ["ipc", "host"])
def test_a_killed_actor_on_a_gpu(session, driver, leaves_no_socket, tmp_path, ways):  # noqa: F811
    """What is sent again lies on the GPU of who has kept it."""
    given = {"level": "trace", "partition": cut()}
    mark = tmp_path / "mark"
    blocks = {"*": {"device": "cuda", "gpus": 0.25}}
    alone = train(
        net((2, Once(None, mark, ""))),
        PortableStream(60),
        settings({"device": "cuda"}, 60, **given),
    )
    kept = {"path": str(tmp_path / "kept"), "every": 10}
    engine = {"kind": "ray", "actors": 3, "blocks": blocks, "device_signals": ways}
    odd = net((2, Once(31, mark, "kill")))
    result = train(odd, PortableStream(60), settings(engine, 60, snapshots=kept, **given))
    assert_equal(alone, result)
    assert len(result.replaced) == 1
