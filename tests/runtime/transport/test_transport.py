"""Every way between two processes: bounded queues hold a sender back, blocked
calls can be called off, files go away."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest
import torch
import zmq

from hamdist.config import Compress, EngineSettings
from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.errors import ClusterError, WireError
from hamdist.runtime.process.leftovers import remove_leftovers
from hamdist.runtime.signals.codec import Codec
from hamdist.runtime.signals.packing import Packer
from hamdist.runtime.signals.signal import Aborted, Channel, Signal
from hamdist.runtime.transport.encryption import new_keys
from hamdist.runtime.transport.endpoint import socket_folder
from hamdist.runtime.transport.transport import Endpoints
from hamdist.runtime.transport.zeromq import NO_LIMIT, NUMBER, connections

RUN = 77
CHANNEL = Channel(3, Kind.STATE, "a", "b", "a->b", 4)

pytestmark = pytest.mark.timeout(30)


WAYS = {"shm": "shm", "ipc": "ipc", "tcp": "tcp://127.0.0.1", "tcp, IPv6": "tcp://::1"}
LIMIT = 2**27  # of a frame: four signals may be under way, each of a sixteenth of it, 32 MiB in all


@pytest.fixture(params=WAYS)
def pair(request, leaves_no_socket):
    """A sending and a receiving transport, joined by CHANNEL."""
    if "IPv6" in request.param and not Path("/proc/net/if_inet6").exists():
        pytest.skip("a kernel without IPv6")
    aborts = threading.Event(), threading.Event()
    sender, receiver = (Endpoints(RUN, abort) for abort in aborts)
    address = receiver.bind(CHANNEL, WAYS[request.param])
    sender.connect(CHANNEL, address)
    yield sender, receiver, aborts, address
    sender.close()
    receiver.close()


def signal(n, size=4):
    return Signal(Stamp(n, n, 0), torch.full((size,), float(n)))


def test_ports_of_a_range():
    """Each channel takes one that is free; with none left the error names the range."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        receiver = Endpoints(RUN, threading.Event(), ports=range(taken, taken + 40))
        try:
            channels = [Channel(n, Kind.STATE, "a", "b", "a->b", 4) for n in range(3)]
            addresses = [receiver.bind(c, WAYS["tcp"]) for c in channels]
            ports = [int(address.rpartition(":")[2]) for address in addresses]
            assert len(set(ports)) == 3
            assert all(taken < port < taken + 40 for port in ports)
            sender = Endpoints(RUN, threading.Event())
            sender.connect(channels[2], addresses[2])
            sender.send(channels[2], signal(0))
            assert receiver.receive(channels[2], Stamp(0, 0, 0)).stamp == Stamp(0, 0, 0)
            sender.close()
        finally:
            receiver.close()
        full = Endpoints(RUN, threading.Event(), ports=range(taken, taken + 1))
        with pytest.raises(ClusterError, match=rf"engine.ports {taken}-{taken}: all 1 ports are"):
            full.bind(CHANNEL, WAYS["tcp"])
        full.close()


@pytest.mark.parametrize("ports", ["40000", "40100-40000", "80-90", "a-b", "1024-70000"])
def test_ranges_of_ports_are_checked(ports):
    with pytest.raises(ValueError, match=r"'ports' is .*give the first and the last one"):
        EngineSettings(kind="ray", ports=ports)


@pytest.mark.parametrize("size", [1, 20_000, 300_000])
def test_signals_arrive_in_order_and_whole(pair, size):
    """Of 4 bytes, 80 kB and 1.2 MB: in a packet or a slot, in one frame or two."""
    sender, receiver, _, _ = pair

    def send():
        for n in range(50):
            sender.send(CHANNEL, signal(n, size))

    thread = threading.Thread(target=send)
    thread.start()
    for n in range(50):
        got = receiver.receive(CHANNEL, Stamp(n, n, 0))
        assert got.stamp == Stamp(n, n, 0)
        assert torch.equal(got.payload, torch.full((size,), float(n)))
        assert got.payload.data_ptr() % 64 == 0
    thread.join()
    assert sender.seconds["packing"] > 0
    assert receiver.seconds["waiting"] > 0


def test_a_bundle_is_one_message_of_several_signals(pair):
    """Small and large, empty and last: taken one by one, in their order."""
    sender, receiver, _, _ = pair
    sizes = [4, 200_000, 0, 5]
    made = [signal(n, size) for n, size in enumerate(sizes)]
    made[2].payload = None
    made[3].end = True
    got = []

    def receive():
        got.extend(receiver.receive(CHANNEL, s.stamp) for s in made * 3)

    thread = threading.Thread(target=receive)
    thread.start()
    for _ in range(3):
        sender.send(CHANNEL, *made)
    thread.join()
    for old, new in zip(made * 3, got, strict=True):
        assert (new.stamp, new.end) == (old.stamp, old.end)
        assert (new.payload is None) == (old.payload is None)
        assert new.payload is None or torch.equal(new.payload, old.payload)


def test_connections_follow_from_the_bytes_that_may_be_under_way():
    """1 MiB each: 80 messages of 32 KiB make 2.5, 160 signals in bundles of 4 40 messages, 1.25."""
    one = CHANNEL._replace(capacity=80)
    assert connections(one, 16 * 2**15) == 1 + 2
    assert connections(one, NO_LIMIT) == connections(CHANNEL, 16 * 2**15) == 1
    assert connections(one._replace(capacity=160, bundle=4), 16 * 2**15) == 1 + 1
    assert connections(one, LIMIT) == 8
    half = Codec(Compress.FP16, torch.float32, (64,))
    assert connections(one._replace(codec=half), 16 * 2**15) == 1 + 1


@pytest.fixture
def striped(leaves_no_socket):
    """A receiver of eight connections, and a function that sends messages by their number."""
    receiver = Endpoints(RUN, threading.Event())
    address = receiver.bind(CHANNEL, WAYS["tcp"], LIMIT)
    packer, context = Packer(RUN, CHANNEL), zmq.Context()
    sockets = [context.socket(zmq.PUSH) for _ in range(8)]
    for other in sockets:
        other.connect(address)

    def send(*order):
        for n in order:
            sockets[n % 8].send(NUMBER.pack(n) + packer.header(Signal(Stamp(n, n, 0)), None))

    yield receiver, send
    context.destroy(linger=0)
    receiver.close()


@pytest.mark.parametrize("order", [[7, 2, 1, 0], [1, 9, 2, 0, 3, 4], [0, 8, 16, 24, 1, 2, 3]])
def test_the_order_of_connections_is_restored(striped, order):
    receiver, send = striped
    send(*order)
    for n in range(next(n for n in range(40) if n not in order)):
        assert receiver.receive(CHANNEL, Stamp(n, n, 0)).stamp == Stamp(n, n, 0)


@pytest.mark.parametrize("order", [[1, 10], [8], [1, 1]])
def test_a_message_that_a_connection_has_lost_is_noticed(striped, order):
    receiver, send = striped
    send(*order)
    with pytest.raises(WireError, match=r"message \d+ came after -?\d by one of 8 connections"):
        receiver.receive(CHANNEL, Stamp(0, 0, 0))


@pytest.mark.parametrize("size", [1, 300_000])
@pytest.mark.parametrize("encrypted", [False, True])
def test_several_connections_carry_signals_in_order(leaves_no_socket, size, encrypted):
    """Without a receiver the queues of both ends fill up, and what the kernel holds."""
    keys = new_keys() if encrypted else None
    sender = Endpoints(RUN, threading.Event(), keys=keys)
    receiver = Endpoints(RUN, threading.Event(), keys=new_keys() if encrypted else None)
    way = WAYS["tcp"] if keys is None else f"{WAYS['tcp']} {keys.public}"
    sender.connect(CHANNEL, receiver.bind(CHANNEL, way, LIMIT), LIMIT)
    sent = []

    def send():
        for n in range(200):
            sender.send(CHANNEL, signal(n, size))
            sent.append(n)

    thread = threading.Thread(target=send)
    thread.start()
    # (it waits before its first message, too, until the connections stand)
    while size > 1 and (sender.waiting is None or len(sent) < CHANNEL.capacity):
        threading.Event().wait(0.02)
    assert size == 1 or CHANNEL.capacity <= len(sent) < 200
    for n in range(200):
        got = receiver.receive(CHANNEL, Stamp(n, n, 0))
        assert got.stamp == Stamp(n, n, 0)
        assert torch.equal(got.payload, signal(n, size).payload)
    thread.join()
    for endpoints in (sender, receiver):
        endpoints.close()


def test_a_slow_receiver_holds_the_sender_back(pair):
    """4 MiB signals: what the kernel's own buffers take is small beside them."""
    sender, receiver, aborts, _ = pair
    sent = []

    def send():
        try:
            for n in range(100):
                sender.send(CHANNEL, signal(n, 2**20))
                sent.append(n)
        except Aborted:
            sent.append("aborted")

    thread = threading.Thread(target=send)
    thread.start()
    patience = threading.Event()
    try:
        while sender.waiting is None:
            patience.wait(0.02)
        assert sender.waiting.sending
        assert sender.waiting.channel == CHANNEL
        stopped_at = len(sent)
        # Both queues, and a few that the kernel and ZeroMQ's own batches hold.
        assert CHANNEL.capacity <= stopped_at <= 2 * CHANNEL.capacity + 4
        for n in range(CHANNEL.capacity):
            receiver.receive(CHANNEL, Stamp(n, n, 0))
        while len(sent) == stopped_at:
            patience.wait(0.02)
    finally:
        aborts[0].set()
        thread.join(10)
    assert sent[-1] == "aborted"


def test_a_waiting_receiver_says_for_what_and_can_be_called_off(pair):
    _, receiver, aborts, _ = pair
    ended = []

    def receive():
        try:
            receiver.receive(CHANNEL, Stamp(9, 8, 7))
        except Aborted:
            ended.append(True)

    thread = threading.Thread(target=receive)
    thread.start()
    patience = threading.Event()
    while receiver.waiting is None:
        patience.wait(0.01)
    assert receiver.waiting.stamp == Stamp(9, 8, 7)
    assert not receiver.waiting.sending
    aborts[1].set()
    thread.join(10)
    assert ended == [True]


@pytest.mark.parametrize(
    "frames", [[b"junk"], [b"junk", b"more"], [b""] * 3, [b"x" * 100, b"y" * 5]]
)
def test_bytes_of_a_stranger_are_refused(pair, frames):
    _, receiver, _, address = pair
    if address.startswith("shm"):
        pytest.skip("test_shared.py")
    context = zmq.Context()
    stranger = context.socket(zmq.PUSH)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.ipv6 = True
    stranger.connect(address)
    stranger.send_multipart(frames)
    with pytest.raises(WireError):
        receiver.receive(CHANNEL, Stamp(0, 0, 0))
    stranger.close()
    context.term()


@pytest.mark.parametrize("index", [0, 1, 2, 2**31])
def test_a_frame_that_is_not_there_is_refused(pair, index):
    _, receiver, _, address = pair
    if address.startswith("shm"):
        pytest.skip("test_shared.py")
    packer = Packer(RUN, CHANNEL)
    made = signal(0)
    data = packer.header(made, packer.form(made.payload), index)
    with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
        stranger.ipv6 = True
        stranger.connect(address)
        stranger.send_multipart([data, b"too short"])
        with pytest.raises(WireError, match=f"frame {index}"):
            receiver.receive(CHANNEL, Stamp(0, 0, 0))


@pytest.mark.parametrize("way", ["shm", "ipc"])
def test_the_socket_folder_is_private_and_goes_away(leaves_no_socket, way):
    endpoints = Endpoints(RUN, threading.Event())
    address = endpoints.bind(CHANNEL, way)
    folder = socket_folder(RUN)
    assert address.startswith(f"{way}://{folder}/3.")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    os.utime(folder, (0, 0))
    assert folder not in remove_leftovers()  # (it is claimed until it is closed, however old it is)
    endpoints.close()
    assert not folder.exists()


@pytest.mark.parametrize("way", ["shm", "ipc"])
def test_a_folder_that_others_can_reach_is_refused(leaves_no_socket, way):
    folder = socket_folder(RUN)
    folder.mkdir(mode=0o755)
    endpoints = Endpoints(RUN, threading.Event())
    try:
        with pytest.raises(ClusterError, match="belongs to somebody else"):
            endpoints.bind(CHANNEL, way)
    finally:
        endpoints.close()
    assert not folder.exists()


def test_a_process_without_a_zeromq_channel_has_no_thread_for_it(leaves_no_socket):
    """What ZeroMQ needs is made with its first channel."""
    endpoints = Endpoints(RUN, threading.Event())
    endpoints.bind(CHANNEL, "shm")
    assert endpoints._zmq is None
    endpoints.bind(CHANNEL._replace(number=4), "ipc")
    assert endpoints._zmq is not None
    endpoints.close()
