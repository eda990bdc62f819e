"""Shared memory: exact room, slots that nobody pins, strangers' packets and memory refused."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from pathlib import Path

import pytest
import torch

from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.errors import ClusterError, WireError
from hamdist.runtime.signals.packing import MAX_HEADER, Packer
from hamdist.runtime.signals.signal import Aborted, Channel, Signal
from hamdist.runtime.transport import shared_memory
from hamdist.runtime.transport import shared_memory as shared
from hamdist.runtime.transport.endpoint import EndpointContext, socket_folder
from hamdist.runtime.transport.shared_memory import SCHEME, SharedSender, inline_limit, takes
from hamdist.runtime.transport.shared_receiver import SharedReceiver
from hamdist.runtime.transport.transport import Endpoints, local_way

RUN = 78
CHANNEL = Channel(5, Kind.STATE, "a", "b", "a->b", 6, slack=4)
LARGE = 100_000

pytestmark = [
    pytest.mark.timeout(30),
    pytest.mark.skipif(not shared.available(), reason="this platform has no such memory"),
]


def signal(n, size):
    return Signal(Stamp(n, n, 0), torch.full((size,), float(n)))


class Pair:
    """Both ends of a channel, each with its own way of being called off."""

    def __init__(self, channel):
        self.channel = channel
        self.aborts = threading.Event(), threading.Event()
        self.lines = [EndpointContext(RUN, abort) for abort in self.aborts]
        self.receiver = SharedReceiver(self.lines[1], channel)
        self.sender = SharedSender(self.lines[0], channel, self.receiver.address)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sender.close()
        self.receiver.close()
        socket_folder(RUN).rmdir()

    def send(self, n, size):
        self.sender.send([signal(n, size)])

    def check(self, n, size):
        got = self.receiver.receive(Stamp(n, n, 0))
        assert got.stamp == Stamp(n, n, 0)
        assert torch.equal(got.payload, torch.full((size,), float(n)))
        return got

    def blocks(self, n, size):
        """Whether there is no room for one more."""
        self.aborts[0].set()
        try:
            self.send(n, size)
        except Aborted:
            return True
        finally:
            self.aborts[0].clear()
        return False


@pytest.mark.parametrize("size", [2, LARGE])
@pytest.mark.parametrize("slack", [1, 2, 4])
@pytest.mark.parametrize("capacity", [4, 6, 128])
def test_room_counts_signals_whatever_their_size(leaves_no_socket, capacity, slack, size):
    """Exactly `capacity` signals find room, and then what the receiver takes makes room for as many
    but for the group that it has not told yet: fewer than `slack`."""
    size = size if capacity < 100 or size < 100 else 20_000
    with Pair(CHANNEL._replace(capacity=capacity, slack=slack)) as pair:
        for n in range(capacity):
            pair.send(n, size)
        assert pair.blocks(capacity, size)
        for taken in range(1, capacity + 1):
            pair.check(taken - 1, size)
            given = taken // max(1, slack // 2) * max(1, slack // 2)
            assert given > taken - slack
        sent = capacity
        while not pair.blocks(sent, size):
            sent += 1
        assert sent == capacity + given


@pytest.mark.parametrize("buffer", [60_000, 212_992, 2**22])
def test_the_kernels_buffer_holds_as_many_signals_as_there_is_room(
    leaves_no_socket, monkeypatch, buffer
):
    """The story of a trap: signals just small enough for a packet fill the kernel's buffer long
    before a long queue is full, and a schedule that counts on the queue would hang."""
    monkeypatch.setattr(shared, "BUFFER_BYTES", buffer)
    with Pair(CHANNEL._replace(capacity=128)) as pair:
        inline = pair.sender._inline // 4
        assert (inline > 0) == (buffer > 100_000)
        for n in range(128):
            pair.send(n, inline)
        assert pair.blocks(128, inline)
        for n in range(128):
            pair.check(n, inline)


def test_inline_limits():
    """C packets of p payload bytes count as no more than the buffer, by the kernel's rule."""
    for buffer in (4096, 212_992, 425_984, 8_388_608):
        for capacity in (1, 5, 60, 128):
            p = inline_limit(capacity, buffer)
            assert 0 <= p <= shared_memory.INLINE_BYTES
            assert p == 0 or capacity * (2 * (p + MAX_HEADER) + 1536) <= buffer


def test_a_kept_tensor_pins_no_slot_and_does_not_change(leaves_no_socket):
    with Pair(CHANNEL) as pair:
        kept = []
        for n in range(40):
            pair.send(n, LARGE)
            kept.append(pair.check(n, LARGE))
        for n, got in enumerate(kept):
            assert torch.equal(got.payload, torch.full((LARGE,), float(n)))


def test_the_senders_tensor_is_its_own_again(leaves_no_socket):
    with Pair(CHANNEL) as pair:
        for size in (4, LARGE):
            own = signal(3, size)
            pair.sender.send([own])
            own.payload.fill_(-1)
            pair.check(3, size)


def test_larger_payloads_make_a_new_ring(leaves_no_socket):
    """Also while smaller ones still lie in the old ring, and in the midst of a bundle."""
    with Pair(CHANNEL._replace(bundle=3)) as pair:
        sizes = [5_000, 3, 20_000, 5_000, 100_000, 0]
        pair.sender.send([signal(n, size) for n, size in enumerate(sizes[:3])])
        pair.sender.send([signal(3 + n, size) for n, size in enumerate(sizes[3:])])
        for n, size in enumerate(sizes):
            pair.check(n, size)


def test_a_bundle_that_is_larger_than_a_packet_becomes_several(leaves_no_socket):
    with Pair(CHANNEL._replace(capacity=40, bundle=40)) as pair:
        size = shared_memory.INLINE_BYTES // 4
        pair.sender.send([signal(n, size) for n in range(40)])
        for n in range(40):
            pair.check(n, size)


def test_what_is_open_is_closed(leaves_no_socket):
    def opened():
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("hamdist-5")

    before = opened()
    with Pair(CHANNEL) as pair:
        pair.send(0, LARGE)
        pair.check(0, LARGE)
        assert opened()[1] == 2
    assert opened() == before


def test_a_dead_receiver_is_waited_for_until_the_run_is_called_off(leaves_no_socket):
    """Its run call tells the driver who died; that this process misses it tells nothing new."""
    with Pair(CHANNEL) as pair:
        pair.send(0, 4)
        pair.receiver.close()
        ended = []

        def send():
            try:
                for n in range(1, 100):
                    pair.send(n, 4)
            except Aborted:
                ended.append("called off")

        run_until_waiting(send, pair.lines[0], pair.aborts[0])
        assert ended == ["called off"]


def test_a_dead_sender_leaves_what_it_has_sent(leaves_no_socket):
    with Pair(CHANNEL) as pair:
        for n in range(3):
            pair.send(n, 4)
        pair.check(0, 4)
        pair.check(1, 4)  # (a credit is on its way, which nobody will read)
        pair.sender.close()
        pair.check(2, 4)
        ended = []

        def receive():
            try:
                pair.check(3, 4)
            except Aborted:
                ended.append("called off")

        run_until_waiting(receive, pair.lines[1], pair.aborts[1])
        assert ended == ["called off"]


def run_until_waiting(act, line, abort):
    thread = threading.Thread(target=act)
    thread.start()
    patience = threading.Event()
    while line.waiting is None and thread.is_alive():
        patience.wait(0.01)
    abort.set()
    thread.join(10)
    assert not thread.is_alive()


def test_a_failed_start_leaves_nothing(leaves_no_socket, monkeypatch):
    endpoints = Endpoints(RUN, threading.Event())
    endpoints.bind(CHANNEL, "shm")
    before = len(os.listdir("/proc/self/fd"))
    endpoints.bind(CHANNEL, "shm")  # anew: the first one is closed
    assert len(os.listdir("/proc/self/fd")) == before
    with monkeypatch.context() as patch:
        patch.setattr(
            "hamdist.runtime.transport.shared_receiver.socket_file",
            lambda run, _: socket_folder(run) / "a/b",
        )
        with pytest.raises(ClusterError, match="no socket at"):
            endpoints.bind(CHANNEL, "shm")
    with pytest.raises(ClusterError, match="cannot be reached"):
        endpoints.connect(CHANNEL, f"{SCHEME}{socket_folder(RUN)}/77")
    assert len(os.listdir("/proc/self/fd")) == before
    endpoints.close()


def test_long_queues_go_by_zeromq():
    assert takes(CHANNEL._replace(capacity=128))
    assert local_way(CHANNEL._replace(capacity=128)) == "shm"
    assert local_way(CHANNEL._replace(capacity=129)) == "ipc"


# -- strangers ---------------------------------------------------------------------------------


@pytest.fixture
def stranger(leaves_no_socket):
    """A receiver, and a socket that is no SharedSender's."""
    line = EndpointContext(RUN, threading.Event())
    receiver = SharedReceiver(line, CHANNEL)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(receiver.address.removeprefix(SCHEME))
        yield receiver, connection
    receiver.close()
    socket_folder(RUN).rmdir()


def refused(receiver, kept=0):
    """kept: descriptors of a ring that is in order. (One connection for one listener besides.)"""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WireError) as caught:
        receiver.receive(Stamp(0, 0, 0))
    assert len(os.listdir("/proc/self/fd")) == before + kept
    return str(caught.value)


def of_run(run):
    return Packer(run, CHANNEL).header(Signal(Stamp(0, 0, 0)), None)


@pytest.mark.parametrize(
    ("packet", "words"),
    [
        (b"junk", "header of 4"),
        (b"x" * 300, "not a signal"),
        (of_run(RUN + 1), "run 4f"),
        (of_run(RUN) + b"x", "header of 1"),
        (b"x" * 60_000, "more than"),
        (b"HR", "announce a ring"),
        (b"HR" + b"x" * 30, "announce a ring"),
    ],
)
def test_packets_of_a_stranger_are_refused(stranger, packet, words):
    receiver, connection = stranger
    connection.send(packet)
    assert words in refused(receiver)


SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def memory(size, seals=SEALS):
    fd = os.memfd_create("stranger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def offer(connection, fd, slots=6, slot_bytes=64, number=5, run=RUN, form=1):
    connection.send(struct.pack("<2sBBIQIQ", b"HR", form, 0, number, run, slots, slot_bytes))
    socket.send_fds(connection, [b"HR"], [] if fd is None else [fd])
    if fd is not None:
        os.close(fd)


@pytest.mark.parametrize(
    ("made", "announced", "words"),
    [
        (lambda: memory(6 * 64), {"number": 4}, "channel 4"),
        (lambda: memory(6 * 64), {"run": RUN + 1}, "run 4f"),
        (lambda: memory(6 * 64), {"form": 9}, "format 9"),
        (lambda: memory(6 * 64 - 1), {}, "383 bytes"),
        (lambda: memory(6 * 64), {"slot_bytes": 128}, "384 bytes"),
        (lambda: memory(6 * 60), {"slot_bytes": 60}, "slots of 60"),
        (lambda: memory(7 * 64), {"slots": 7}, "7 slots"),
        (lambda: memory(0), {"slots": 0}, "0 slots"),
        (lambda: memory(0), {"slots": 2**31, "slot_bytes": 2**62}, "slots of"),
        (lambda: memory(6 * 64, fcntl.F_SEAL_GROW), {}, "seals 0x4"),
        (lambda: os.open("/dev/null", os.O_RDWR), {}, "cannot be mapped"),
        (lambda: None, {}, "without a descriptor"),
    ],
)
def test_memory_of_a_stranger_is_refused(stranger, made, announced, words):
    """Shrinkable memory above all: to read it after it was cut off would kill the process."""
    receiver, connection = stranger
    offer(connection, made(), **announced)
    assert words in refused(receiver)


@pytest.mark.parametrize(
    ("slot", "floats", "ring"), [(6, 16, True), (2**32 - 1, 16, True), (0, 17, True), (0, 1, False)]
)
def test_a_slot_that_is_not_there_is_refused(stranger, slot, floats, ring):
    receiver, connection = stranger
    if ring:
        offer(connection, memory(6 * 64))
    packer = Packer(RUN, CHANNEL)
    made = signal(0, floats)
    connection.send(packer.header(made, packer.form(made.payload), slot))
    assert f"no slot {slot}" in refused(receiver, kept=ring)


def test_the_last_slot_is_read_whole(stranger):
    receiver, connection = stranger
    fd = memory(6 * 64)
    os.pwrite(fd, bytes(torch.arange(16.0).numpy()), 5 * 64)
    offer(connection, fd)
    packer = Packer(RUN, CHANNEL)
    made = signal(0, 16)
    connection.send(packer.header(made, packer.form(made.payload), 5))
    assert torch.equal(receiver.receive(Stamp(0, 0, 0)).payload, torch.arange(16.0))


@pytest.mark.parametrize("credit", [b"x", b"", struct.pack("<I", 0), struct.pack("<I", 7)])
def test_room_that_was_never_taken_is_not_given_back(leaves_no_socket, credit):
    folder = socket_folder(RUN)
    folder.mkdir(mode=0o700)
    line = EndpointContext(RUN, threading.Event())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(folder / "5"))
            listener.listen()
            sender = SharedSender(line, CHANNEL, f"{SCHEME}{folder}/5")
            connection, _ = listener.accept()
            with connection:
                for n in range(6):
                    sender.send([signal(n, 1)])
                connection.send(credit or b"12345")
                with pytest.raises(WireError, match="no number of signals"):
                    sender.send([signal(6, 1)])
            sender.close()
    finally:
        (folder / "5").unlink()
        folder.rmdir()


def test_another_users_process_is_refused(stranger, monkeypatch):
    """The folder keeps others out; should it fail to, the kernel still tells who has connected."""
    receiver, _ = stranger
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    with pytest.raises(WireError, match="another user"):
        receiver.receive(Stamp(0, 0, 0))


def test_ctypes_takes_bytes_for_their_address():
    """What unpacking a payload out of a message relies on."""
    taken = ctypes.create_string_buffer(4)
    ctypes.memmove(taken, b"abcdef"[1:5], 4)
    assert taken.raw == b"bcde"
