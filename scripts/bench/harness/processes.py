"""A side in a process of its own: it waits on a pipe while the others are timed.

All are forked from one server that has imported what they need and has done nothing else: it has
one thread when it forks. A call is one JSON message, `["role.method", arguments]` with a role of
serve.py, and so is its result. A process ends with its pipe, so it never outlives the benchmark.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from harness import serve

HERE = Path(__file__).resolve().parent.parent
END_SECONDS = 10.0
_FORKED = multiprocessing.get_context("forkserver")


class RemoteError(RuntimeError):
    """A side's process ended before it answered; its own message stands above, on stderr."""


def start_server() -> None:
    """Begins to start the fork server, which imports on its own; does nothing where it is there."""
    _FORKED.set_forkserver_preload(["harness.preloaded"])
    # (OpenBLAS starts threads as soon as numpy is imported, where it may)
    more = {"PYTHONPATH": _path(), "GLOO_SOCKET_IFNAME": "lo", "OPENBLAS_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, more):
        forkserver.ensure_running()


class Remote:
    """Another process, and what it serves.

    threads: of torch there, where it is not told otherwise; None: as many as torch likes.
    """

    def __init__(self, threads: int | None = 1) -> None:
        self._last = "it"
        start_server()
        self._calls, theirs = _FORKED.Pipe()
        sys.stderr.flush()
        with theirs, Connection(os.dup(2), readable=False) as stderr:
            given = theirs, stderr, threads
            self._process = _FORKED.Process(target=serve.serve, args=given, daemon=True)
            self._process.start()

    def ask(self, method: str, **arguments: Any) -> None:
        """Begins a call; its result is the next `answer`."""
        self._last = method
        try:
            self._calls.send_bytes(json.dumps([method, arguments]).encode())
        except OSError:
            raise self._ended() from None

    def answer(self) -> Any:
        try:
            return json.loads(self._calls.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise self._ended() from None

    def call(self, method: str, **arguments: Any) -> Any:
        self.ask(method, **arguments)
        return self.answer()

    def _ended(self) -> RemoteError:
        return RemoteError(f"{self._last} failed, and its process has ended; why, stands above")

    def hang_up(self) -> None:
        """The process ends when it has done what it was asked to."""
        self._calls.close()

    def close(self) -> None:
        """Outlasts the process."""
        self.hang_up()
        self._process.join(END_SECONDS)
        if not self.ended:
            self._process.kill()
            self._process.join()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.exitcode is not None


def _path() -> str:
    """PYTHONPATH with the benchmarks and the checkout in front."""
    known = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(HERE), str(HERE.parent.parent), *([known] if known else [])])


def together(remotes: list[Remote], method: str, arguments: list[dict[str, Any]]) -> list[Any]:
    """The same call of all at once."""
    for remote, own in zip(remotes, arguments, strict=True):
        remote.ask(method, **own)
    return [remote.answer() for remote in remotes]
