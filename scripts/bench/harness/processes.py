"""A side in a process of its own: it waits on a pipe while the others are timed.

One JSON line a call, `["role.method", arguments]` with a role of serve.py, and one a result. The
process ends with its pipe, so it never outlives the benchmark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
END_SECONDS = 10.0


class RemoteError(RuntimeError):
    """A side's process ended before it answered; its own message stands above, on stderr."""


class Remote:
    """Another process, and what it serves.

    threads: of OpenMP there, where torch is not told otherwise; None: as many as torch likes.
    """

    def __init__(self, threads: int | None = 1) -> None:
        self._last = "it"
        env = {**os.environ, "PYTHONPATH": _path(), "GLOO_SOCKET_IFNAME": "lo"}
        if threads is not None:
            env["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def ask(self, method: str, **arguments: Any) -> None:
        """Begins a call; its result is the next `answer`."""
        self._last = method
        try:
            self._stdin.write(json.dumps([method, arguments]) + "\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self) -> Any:
        line = self._stdout.readline()
        if not line:
            raise self._ended()
        return json.loads(line)

    def call(self, method: str, **arguments: Any) -> Any:
        self.ask(method, **arguments)
        return self.answer()

    def _ended(self) -> RemoteError:
        return RemoteError(f"{self._last} failed, and its process has ended; why, stands above")

    def hang_up(self) -> None:
        """The process ends when it has done what it was asked to."""
        self._stdin.close()

    def close(self) -> None:
        """Outlasts the process."""
        self.hang_up()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    @property
    def _stdout(self) -> Any:
        return self._process.stdout


def _path() -> str:
    """PYTHONPATH with the benchmarks and the checkout in front."""
    known = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(HERE), str(HERE.parent.parent), *([known] if known else [])])


def together(remotes: list[Remote], method: str, arguments: list[dict[str, Any]]) -> list[Any]:
    """The same call of all at once."""
    for remote, own in zip(remotes, arguments, strict=True):
        remote.ask(method, **own)
    return [remote.answer() for remote in remotes]
