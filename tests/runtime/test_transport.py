"""Sockets: bounded queues hold a sender back, blocked calls can be called off, files go away."""

from __future__ import annotations

import stat
import threading

import pytest
import torch
import zmq

from hamdist.dynamics.schedule import Kind, Stamp
from hamdist.errors import WireError
from hamdist.runtime.loop import Aborted
from hamdist.runtime.signal import Channel, Signal
from hamdist.runtime.transport import ZmqTransport, socket_folder

RUN = 77
CHANNEL = Channel(3, Kind.STATE, "a", "b", "a->b", 4)

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(params=[None, "127.0.0.1"], ids=["ipc", "tcp"])
def pair(request, leaves_no_socket):
    """A sending and a receiving transport, joined by CHANNEL."""
    aborts = threading.Event(), threading.Event()
    sender, receiver = (ZmqTransport(RUN, abort) for abort in aborts)
    address = receiver.bind(CHANNEL, request.param)
    sender.connect(CHANNEL, address)
    yield sender, receiver, aborts, address
    sender.close()
    receiver.close()


def signal(n, size=4):
    return Signal(Stamp(n, n, 0), torch.full((size,), float(n)))


def test_signals_arrive_in_order_and_whole(pair):
    sender, receiver, _, _ = pair

    def send():
        for n in range(50):
            sender.send(CHANNEL, signal(n, 20_000))

    thread = threading.Thread(target=send)
    thread.start()
    for n in range(50):
        got = receiver.receive(CHANNEL, Stamp(n, n, 0))
        assert got.stamp == Stamp(n, n, 0)
        assert torch.equal(got.payload, torch.full((20_000,), float(n)))
    thread.join()


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
    context = zmq.Context()
    stranger = context.socket(zmq.PUSH)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(address)
    stranger.send_multipart(frames)
    with pytest.raises(WireError):
        receiver.receive(CHANNEL, Stamp(0, 0, 0))
    stranger.close()
    context.term()


def test_the_socket_folder_is_private_and_goes_away(leaves_no_socket):
    transport = ZmqTransport(RUN, threading.Event())
    address = transport.bind(CHANNEL, None)
    folder = socket_folder(RUN)
    assert address == f"ipc://{folder}/3"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    transport.close()
    assert not folder.exists()
