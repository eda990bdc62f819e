"""Who may send: encryption and mutual authentication of tcp sockets (CurveZMQ).

Each process makes a key pair of its own for each run; the secret never leaves it, the public keys
travel with the addresses, which Ray hands over. The receiving end of a channel is CURVE's server:

    receiver -> driver -> sender    address and the receiver's public key, 'tcp://HOST:PORT KEY'
    sender -> driver -> receiver    the sender's public key, in 'tcp://HOST KEY', before the bind

A receiver lets in who holds an allowed key, a sender talks to nobody but the holder of the key it
was told. Without a handler of ZeroMQ's authentication protocol (ZAP, RFC 27) libzmq takes ANY
client that knows the server's key: `KeyGate` is that handler, and sockets request it
(ZAP_ENFORCE_DOMAIN). libzmq does not ask again with a refused key, so a key has to be allowed
before its holder connects.
"""

from __future__ import annotations

import contextlib
import resource
from typing import Any, NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator

from hamdist.errors import ClusterError

DOMAIN = "hamdist"
# A connection that has not shown its key by then is closed. (libzmq: 30 s; strangers hold files.)
HANDSHAKE_MS = 10_000


class Keys(NamedTuple):
    """Of one process in one run, in the text form of ZeroMQ (Z85, 40 characters)."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"Keys(public={self.public!r})"


def new_keys() -> Keys:
    """Raises ClusterError where ZeroMQ was built without encryption."""
    if not zmq.has("curve"):
        raise ClusterError(
            "engine.encryption: this libzmq was built without CURVE; install pyzmq's own wheel "
            "(pip install --force-reinstall pyzmq), or set engine.encryption 'off' in a network "
            "that you trust"
        )
    public, secret = zmq.curve_keypair()
    return Keys(public.decode(), secret.decode())


def split_key(address: str) -> tuple[str, str | None]:
    """An address or a way, and the key that it carries."""
    bare, _, key = address.partition(" ")
    return bare, key or None


class KeyGate:
    """Lets peers into the sockets that it guards: those alone whose keys are allowed. public: the
    key by which they know it.

    Has a thread of its own, which sleeps unless somebody knocks. `allow` and `withdraw` may be
    called from any thread, while signals flow.
    """

    def __init__(self, context: zmq.Context[Any], keys: Keys) -> None:
        self._keys = keys
        self.public = keys.public
        self._allowed: frozenset[str] = frozenset()
        _room_for_knocks()
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.configure_curve_callback(DOMAIN, self)
        self._authenticator.start()

    def allow(self, key: str) -> None:
        """From now on the holder of this public key may connect."""
        self._allowed |= {key}

    def withdraw(self, key: str) -> None:
        """From now on it may not; a connection that stands is not cut by this."""
        self._allowed -= {key}

    def callback(self, domain: str, key: bytes) -> bool:
        """What the authenticator asks, in its thread."""
        return domain == DOMAIN and key.decode("ascii") in self._allowed

    def guard(self, socket: zmq.Socket[Any]) -> None:
        """`socket`, not yet bound, will let in who is allowed and nobody else."""
        socket.setsockopt_string(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt_string(zmq.CURVE_SECRETKEY, self._keys.secret)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)

    def close(self) -> None:
        self._authenticator.stop()


def authenticate(socket: zmq.Socket[Any], keys: Keys, server: str) -> None:
    """`socket`, not yet connected, will show these keys and talk to the holder of `server` alone.

    Raises ClusterError if `server` is no key.
    """
    try:
        socket.setsockopt_string(zmq.CURVE_SERVERKEY, server)
    except zmq.ZMQError:
        raise ClusterError(f"{server!r} is no public key of ZeroMQ") from None
    socket.setsockopt_string(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, keys.secret)


def _room_for_knocks() -> None:
    """As many open files as the system grants: strangers who connect and say nothing hold one each,
    until their time is up."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # not every system takes its own limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
