"""Strangers at the tcp sockets of a run: they get nothing and do no harm. Oracle: what the holders
of keys send arrives, all of it and nothing else; the in-process engine."""

from __future__ import annotations

import socket
import threading

import psutil
import pytest
import torch
import zmq
from runtime.engines.test_engines_equal import assert_equal
from runtime.networks import CLASSES, PortableStream, batches, chain, skip_graph
from runtime.transport.strangers import (
    ATTACKS,
    message,
    peer,
    send_bytes,
    turned_away,
    without_a_key,
)

from hamdist.config import EngineSettings, Settings
from hamdist.dynamics.schedule.events import Kind, Stamp
from hamdist.errors import ClusterError, WireError
from hamdist.runtime.advice.advice import open_endpoints
from hamdist.runtime.plan.derived import message_bytes
from hamdist.runtime.plan.plan import make_plan
from hamdist.runtime.signals.signal import Aborted, Channel, Signal
from hamdist.runtime.train.train import train
from hamdist.runtime.transport.encryption import Keys, new_keys, split_key
from hamdist.runtime.transport.transport import Endpoints
from hamdist.streams import from_iterable

RUN = 78
CHANNEL = Channel(3, Kind.STATE, "a", "b", "a->b", 4)
LIMIT = 2**16

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def ends():
    """Makes ends of CHANNEL with their keys; closes them."""
    opened = []

    def make():
        keys = new_keys()
        opened.append((Endpoints(RUN, threading.Event(), keys=keys), keys))
        return opened[-1]

    yield make
    for endpoints, _ in opened:
        endpoints.close()


@pytest.fixture
def pair(ends):
    """A sender and a receiver that know each other's keys, and the receiver's address."""
    (sender, known), (receiver, _) = ends(), ends()
    address = receiver.bind(CHANNEL, f"tcp://127.0.0.1 {known.public}", LIMIT)
    sender.connect(CHANNEL, address, LIMIT)
    return sender, receiver, address


def signal(n, size=4):
    return Signal(Stamp(n, n, 0), torch.full((size,), float(n)))


def exchange(sender, receiver, first, number=20, size=4):
    """Sends signals and finds them at the other end, and no others."""
    for n in range(first, first + number):
        sender.send(CHANNEL, signal(n, size))
        came = receiver.receive(CHANNEL, Stamp(n, n, 0))
        assert came.stamp == Stamp(n, n, 0)
        assert torch.equal(came.payload, torch.full((size,), float(n)))


def nothing_waits(receiver):
    """Whether nobody has delivered anything: a receiver told to give up finds nothing."""
    receiver._context.abort.set()
    with pytest.raises(Aborted):
        receiver.receive(CHANNEL, Stamp(0, 0, 0))


def port_of(address):
    bare, _ = split_key(address)
    return int(bare.rpartition(":")[2])


@pytest.mark.parametrize("attack", ATTACKS)
def test_strangers_are_turned_away_while_signals_flow(pair, attack):
    sender, receiver, address = pair
    exchange(sender, receiver, 0)
    ATTACKS[attack]("127.0.0.1", port_of(address))
    exchange(sender, receiver, 20)
    nothing_waits(receiver)


def test_who_has_read_along_cannot_send(pair):
    """Well-formed signals, replayed and out of order, by somebody with a key of their own."""
    sender, receiver, address = pair
    bare, server = split_key(address)
    exchange(sender, receiver, 0)
    with peer(zmq.PUSH, bare, new_keys(), server) as (own, monitor):
        for tick in (0, 5, 20, 3):
            own.send(message(RUN, CHANNEL, tick))
        assert turned_away(monitor)
    without_a_key("127.0.0.1", port_of(address), message(RUN, CHANNEL, 20))
    exchange(sender, receiver, 20)
    nothing_waits(receiver)


def relay(address, kept):
    """An address before `address`; what goes through from there is added to `kept`."""
    listener = socket.create_server(("127.0.0.1", 0))

    def carry(source, sink, keep):
        with source, sink:
            try:
                while data := source.recv(65536):
                    kept.extend(data if keep else b"")
                    sink.sendall(data)
            except OSError:  # either end has hung up
                return

    def accept():
        with listener:
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", port_of(address)))
            threading.Thread(target=carry, args=(far, near, False), daemon=True).start()
            carry(near, far, True)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    return f"tcp://127.0.0.1:{listener.getsockname()[1]}", thread


@pytest.mark.parametrize("encrypted", [True, False])
def test_what_crosses_cannot_be_read_or_played_again(ends, encrypted):
    (sender, known), (receiver, _) = ends(), ends()
    way = f"tcp://127.0.0.1 {known.public}" if encrypted else "tcp://127.0.0.1"
    address = receiver.bind(CHANNEL, way, LIMIT)
    _, server = split_key(address)
    kept = bytearray()
    through, thread = relay(address, kept)
    sender.connect(CHANNEL, through if server is None else f"{through} {server}", LIMIT)
    exchange(sender, receiver, 0, 5, size=100)
    sender.close()
    thread.join(10)
    secret = torch.full((100,), 4.0).numpy().tobytes()
    assert (secret in kept) is not encrypted
    assert len(kept) > 5 * len(secret)
    if encrypted:
        send_bytes("127.0.0.1", port_of(address), bytes(kept))
        nothing_waits(receiver)


def test_a_sender_talks_to_nobody_but_its_receiver(ends):
    """Somebody has taken the receiver's place, and lets everybody in."""
    sender, _ = ends()
    with zmq.Context() as context, context.socket(zmq.PULL) as impostor:
        public, secret = zmq.curve_keypair()
        impostor.curve_publickey, impostor.curve_secretkey = public, secret
        impostor.curve_server = True
        monitor = impostor.get_monitor_socket(zmq.EVENT_ALL)
        monitor.setsockopt(zmq.RCVTIMEO, 15_000)
        port = impostor.bind_to_random_port("tcp://127.0.0.1")
        sender.connect(CHANNEL, f"tcp://127.0.0.1:{port} {new_keys().public}")
        assert turned_away_there(monitor)
        sender._context.abort.set()
        with pytest.raises(Aborted):
            sender.send(CHANNEL, signal(0))
        impostor.disable_monitor()
        monitor.close()


def turned_away_there(monitor):
    """Whether a server ended a handshake, before one succeeded."""
    from zmq.utils.monitor import recv_monitor_message

    failed = (
        zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_DISCONNECTED
    )
    while True:
        event = recv_monitor_message(monitor)["event"]
        if event & (failed | zmq.EVENT_HANDSHAKE_SUCCEEDED):
            return event & failed != 0


def test_a_new_key_is_let_in_while_the_old_one_is_not_any_more(ends):
    """As when an actor is started again: same channel, new keys."""
    (old, known), (new, fresh), (receiver, _) = ends(), ends(), ends()
    address = receiver.bind(CHANNEL, f"tcp://127.0.0.1 {known.public}", LIMIT)
    bare, server = split_key(address)
    old.connect(CHANNEL, address)
    exchange(old, receiver, 0)
    receiver.allow(fresh.public)
    receiver.withdraw(known.public)
    new.connect(CHANNEL, address)
    exchange(new, receiver, 20)
    with peer(zmq.PUSH, bare, known, server) as (_, monitor):
        assert turned_away(monitor)
    exchange(new, receiver, 40)


def test_frames_have_a_limit_at_both_ends(pair, ends):
    sender, receiver, _ = pair
    exchange(sender, receiver, 0, 2, size=LIMIT // 4 - 100)
    with pytest.raises(WireError, match="where the plan knows of 65,536 at most"):
        sender.send(CHANNEL, signal(2, LIMIT // 4))
    exchange(sender, receiver, 2)


def test_a_frame_beyond_the_limit_is_not_taken(ends):
    """Even from the holder of a key: it is cut off, and comes back with the next."""
    (sender, known), (receiver, _) = ends(), ends()
    address = receiver.bind(CHANNEL, f"tcp://127.0.0.1 {known.public}", LIMIT)
    sender.connect(CHANNEL, address)
    sender.send(CHANNEL, signal(0, LIMIT))
    bare, server = split_key(address)
    with peer(zmq.PUSH, bare, known, server) as (own, _):
        own.send(message(RUN, CHANNEL, 1))
        assert receiver.receive(CHANNEL, Stamp(1, 1, 0)).stamp == Stamp(1, 1, 0)


def test_an_end_without_keys_is_told_so(ends):
    _, known = ends()
    bare = Endpoints(RUN, threading.Event())
    with pytest.raises(ClusterError, match="this process has none"):
        bare.bind(CHANNEL, f"tcp://127.0.0.1 {known.public}")
    with pytest.raises(ClusterError, match="asks for a key, and this process has none"):
        bare.connect(CHANNEL, f"tcp://127.0.0.1:9 {known.public}")
    bare.close()
    sender, _ = ends()
    with pytest.raises(ClusterError, match="'nonsense' is no public key"):
        sender.connect(CHANNEL, "tcp://127.0.0.1:9 nonsense")


def test_a_secret_is_not_shown():
    keys = new_keys()
    assert keys.secret not in f"{keys} {keys!r} {[keys]}"
    assert Keys(*keys) == keys


def test_bounds_follow_from_the_plan():
    """Block a has 4 rows of 5 float32; a signal may have 16 times that, and a header."""
    settings = Settings.model_validate({"level": "trace"})
    plan = make_plan(skip_graph(), settings, PortableStream(8).spec)
    by_edge = {c.edge: c for c in plan.channels.messages.values()}
    for edge in ("a->b", "a->c"):
        channel = by_edge[edge]
        payload = channel.bundle * 16 * (4 * 5 * 4)
        assert payload <= message_bytes(plan, channel) <= payload + channel.bundle * 300 + 4096


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ({"transport": "tcp", "encryption": "off"}, True),
        ({"address": "h:1", "encryption": False}, True),
        ({"encryption": "off"}, False),
        ({"transport": "ipc", "address": "h:1", "encryption": "off"}, False),
        ({"transport": "tcp"}, False),
        ({"transport": "tcp", "encryption": "on"}, False),
    ],
)
def test_off_warns_where_something_is_open(engine, told):
    found = open_endpoints(EngineSettings.model_validate({"kind": "ray", **engine}))
    assert bool(found) is told
    assert not told or "engine.encryption 'off'" in found[0]


def ports_of_actors():
    """Where the actors of this process's Ray listen for signals: (address, port)."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        if "WorkerActor" in " ".join(process.cmdline()):
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN and one.laddr.ip == "127.0.0.1":
                    found.add(one.laddr.port)
    return found


@pytest.mark.ray
def test_a_run_under_attack_equals_the_undisturbed_one(session, leaves_no_socket):
    """The stream itself attacks every port of the run before its sample 100; it feeds the actors by
    tcp as well."""
    attacked = []

    def items():
        for n, batch in enumerate(batches(200)):
            if n == 100:
                for port in ports_of_actors():
                    for attack in ATTACKS.values():
                        attack("127.0.0.1", port)
                    attacked.append(port)
            yield batch

    def run(engine):
        fields = {"steps": 200, "seed": 5, "level": "trace", "engine": engine}
        source = from_iterable(items(), classes=CLASSES)
        return train(chain(), source, Settings.model_validate(fields))

    alone = run({"kind": "inprocess"})
    assert not attacked
    spread = run({"kind": "ray", "actors": 2, "transport": "tcp"})
    assert len(attacked) >= 3
    assert_equal(alone, spread)
