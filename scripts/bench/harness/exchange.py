"""The raw ZeroMQ exchange: two processes, a signal each way a tick, over PUSH and PULL on ipc."""

from __future__ import annotations

import time
from pathlib import Path

import zmq

WARM_TICKS = 50


class Peer:
    """One of the two. Its sockets lie in a folder that only the owner can enter."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._push = self._context.socket(zmq.PUSH)
        self._pull = self._context.socket(zmq.PULL)
        for socket in (self._push, self._pull):
            socket.setsockopt(zmq.LINGER, 0)

    def open(self, folder: str, me: int) -> None:
        """me: 0 or 1. Receives on a socket of its own, sends to the other's."""
        self._pull.bind(f"ipc://{Path(folder) / f'to{me}'}")
        self._push.connect(f"ipc://{Path(folder) / f'to{1 - me}'}")

    def run(self, size: int, ticks: int, copy: bool) -> float:
        """Seconds a tick: send `size` bytes, receive as many. Both sides send first, as actors do
        whose signals cross."""
        payload = bytes(size)
        push, pull = self._push, self._pull
        begun = 0.0
        for tick in range(-WARM_TICKS, ticks):
            if tick == 0:
                begun = time.perf_counter()
            push.send(payload, 0, copy)
            pull.recv(copy=copy)
        return (time.perf_counter() - begun) / ticks
