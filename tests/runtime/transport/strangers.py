"""What a peer without a key tries at a port of a run. Each is a function of (host, port) that
returns when it was turned away; Oracle of the tests: the run does not notice."""

from __future__ import annotations

import contextlib
import random
import socket
import struct

import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from hamdist.dynamics.schedule.events import Stamp
from hamdist.runtime.signals.packing import Packer
from hamdist.runtime.signals.signal import Signal

SECONDS = 15
FLOOD = 200
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
TURNED_AWAY = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
)


@contextlib.contextmanager
def peer(kind, address, keys=None, server=None):
    """A socket that is not hamdist's, and what happens to it: (socket, monitor)."""
    with zmq.Context() as context, context.socket(kind) as own:
        own.setsockopt(zmq.LINGER, 0)
        if keys is not None:
            own.curve_publickey, own.curve_secretkey = (k.encode() for k in keys)
            own.curve_serverkey = server.encode()
        monitor = own.get_monitor_socket(TURNED_AWAY | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        monitor.setsockopt(zmq.RCVTIMEO, SECONDS * 1000)
        own.connect(address)
        try:
            yield own, monitor
        finally:
            own.disable_monitor()
            monitor.close()


def turned_away(monitor):
    """Waits for what becomes of the handshake."""
    return recv_monitor_message(monitor)["event"] & TURNED_AWAY != 0


def message(run, channel, tick=0):
    """A well-formed signal, as one who has read along would make it."""
    packer = Packer(run, channel)
    made = Signal(Stamp(tick, tick, 0), torch.full((4,), 666.0))
    form = packer.form(made.payload)
    return packer.header(made, form) + bytes(form.bytes_of(made.payload)) + form.fill


def without_a_key(host, port, data=b"junk"):
    with peer(zmq.PUSH, f"tcp://{host}:{port}") as (own, monitor):
        own.send(data)
        assert turned_away(monitor)


def closed(connection):
    """Waits until the other end has hung up."""
    connection.settimeout(SECONDS)
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass


def send_bytes(host, port, data):
    with socket.create_connection((host, port), SECONDS) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        closed(connection)


def random_bytes(host, port):
    draw = random.Random(1)
    for size in (64, 999, 100_000):
        send_bytes(host, port, draw.randbytes(size))


def huge_lengths(host, port):
    """A frame that says it has 2^62 bytes, 2^63 - 1, 3 GiB: as a command, and as a message."""
    for flags in (0x06, 0x02):
        for length in (2**62, 2**63 - 1, 3 * 2**30):
            send_bytes(host, port, GREETING + struct.pack(">BQ", flags, length) + b"x" * 99)


def unfinished_handshakes(host, port):
    """Greetings with no mechanism, a wrong one, and one that goes no further than a bad hello."""
    for mechanism in (b"", b"NULL", b"PLAIN", b"\xff" * 20):
        send_bytes(host, port, GREETING[:12] + mechanism.ljust(20, b"\0") + GREETING[32:])
    hello = b"\x05HELLO" + bytes(194)
    send_bytes(host, port, GREETING + struct.pack("BB", 0x04, len(hello)) + hello)


def flood(host, port):
    """Connections that say nothing, and hang up all at once at the end."""
    with contextlib.ExitStack() as stack:
        for _ in range(FLOOD):
            stack.enter_context(socket.create_connection((host, port), SECONDS))


ATTACKS = {
    "no key": without_a_key,
    "random bytes": random_bytes,
    "huge lengths": huge_lengths,
    "unfinished handshakes": unfinished_handshakes,
    "flood": flood,
}
