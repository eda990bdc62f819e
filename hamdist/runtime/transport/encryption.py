"""Encryption and mutual authentication of tcp sockets (CurveZMQ).

Each process makes a key pair of its own for each run; the secret never leaves it, the public keys
travel with the addresses, which Ray hands over. The receiving end of a channel is CURVE's server:

    receiver -> driver -> sender    address and the receiver's public key, 'tcp://HOST:PORT KEY'
    sender -> driver -> receiver    the sender's public key, in 'tcp://HOST KEY', before the bind

A receiver admits holders of an allowed key, a sender talks only to the holder of the key in the
address. Without a handler of ZeroMQ's authentication protocol (ZAP, RFC 27) libzmq accepts ANY
client that has the server's key: `KeyGate` is that handler, and sockets request it
(ZAP_ENFORCE_DOMAIN). libzmq does not retry a refused key, so a key has to be allowed before its
holder connects.
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
    """Key pair of one process in one run, in the text form of ZeroMQ (Z85, 40 characters)."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"Keys(public={self.public!r})"


def new_keys() -> Keys:
    """Make a key pair. Raises ClusterError if ZeroMQ was built without encryption."""
    if not zmq.has("curve"):
        raise ClusterError(
            "engine.encryption: this libzmq was built without CURVE; install pyzmq's own wheel "
            "(pip install --force-reinstall pyzmq), or set engine.encryption 'off' in a network "
            "that you trust"
        )
    public, secret = zmq.curve_keypair()
    return Keys(public.decode(), secret.decode())


def split_key(address: str) -> tuple[str, str | None]:
    """Split an address (or the name of a transport) from the key behind it."""
    bare, _, key = address.partition(" ")
    return bare, key or None


class KeyGate:
    """Allow-list of the sockets that it guards: only peers with an allowed key can connect.

    It has a thread of its own, which sleeps until a peer connects. `allow` and `withdraw` may be
    called from any thread, while signals flow.

    Attributes:
        public: the public key of this process, which peers connect to.
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
        """Allow the holder of this public key to connect from now on."""
        self._allowed |= {key}

    def withdraw(self, key: str) -> None:
        """Refuse new connections of this key; a connection that stands is not cut."""
        self._allowed -= {key}

    def callback(self, domain: str, key: bytes) -> bool:
        """Return True if the key is allowed; called by the authenticator, in its thread."""
        return domain == DOMAIN and key.decode("ascii") in self._allowed

    def guard(self, socket: zmq.Socket[Any]) -> None:
        """Make `socket`, which is not bound yet, admit allowed peers only."""
        socket.setsockopt_string(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt_string(zmq.CURVE_SECRETKEY, self._keys.secret)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)

    def close(self) -> None:
        self._authenticator.stop()


def authenticate(socket: zmq.Socket[Any], keys: Keys, server: str) -> None:
    """Make `socket`, not yet connected, present `keys` and talk only to the holder of `server`.

    Raises ClusterError if `server` is no key.
    """
    try:
        socket.setsockopt_string(zmq.CURVE_SERVERKEY, server)
    except zmq.ZMQError:
        raise ClusterError(f"{server!r} is no public key of ZeroMQ") from None
    socket.setsockopt_string(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, keys.secret)


def _room_for_knocks() -> None:
    """Raise the limit of open files: an unauthenticated connection holds one for a while."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # not every system takes its own limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
