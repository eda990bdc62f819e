"""Starts a worker of a local Ray: run as a script in place of Ray's setup_worker.py.

Ray's own script imports all of Ray, for about half a second, only to start Python once more. This
one has the worker forked (forked_workers.py), or becomes it. A worker with a runtime environment
(an actor with environment variables of its own) is left to Ray's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys

LANGUAGE = "--language=PYTHON"
FLAGS = ("-s", "-S")  # of Python, which Ray puts before the script if its driver has them
ENVIRONMENT = "--serialized-runtime-env-context"
ADDRESS = "HAMDIST_FORKED_WORKERS"  # environment variable: of the process that forks
FORKED = b"forked"


def main() -> None:
    """Replace this process by the worker that the arguments describe."""
    arguments = sys.argv[1:]
    if LANGUAGE not in arguments or any(a.startswith(ENVIRONMENT) for a in arguments):
        from ray._private.workers import setup_worker

        script = [setup_worker.__file__, *arguments]
    else:
        script = [a for a in arguments if a != LANGUAGE]
        if ADDRESS in os.environ and _is_forked([a for a in script if a not in FLAGS]):
            return
    os.execv(sys.executable, [sys.executable, *script])


def _is_forked(script: list[str]) -> bool:
    """Ask for a fork that runs a script in this process's place; return True if there is one."""
    order = json.dumps((script, dict(os.environ), os.getcwd())).encode()
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as asking:
        asking.connect(os.environ[ADDRESS])
        socket.send_fds(asking, [b"f"], [0, 1, 2])
        asking.sendall(order)
        asking.shutdown(socket.SHUT_WR)
        return asking.recv(len(FORKED)) == FORKED
    return False


if __name__ == "__main__":
    main()
