"""What the process of a side runs: calls that come through a pipe.

An error ends the process, with its traceback on stderr.
"""

from __future__ import annotations

import importlib
import json
import os
from multiprocessing.connection import Connection
from typing import Any

import torch

READY = "ready"  # the call that does nothing
ROLES = {
    "centralised": "Centralised",
    "pipelining": "Stage",
    "exchange": "Peer",
    "arithmetic": "Arithmetic",
    "inprocess": "InProcess",
}


def serve(calls: Connection, stderr: Connection, threads: int | None) -> None:
    """Answers calls until the pipe ends. stderr: the one of who asks, who may have another one than
    the fork server. threads: of torch, where a role does not say otherwise; None: as torch likes.
    """
    os.dup2(stderr.fileno(), 2)
    os.dup2(2, 1)  # whatever a library prints is no answer
    if threads is not None:
        torch.set_num_threads(threads)
    served: dict[str, Any] = {}
    while True:
        try:
            name, arguments = json.loads(calls.recv_bytes())
        except EOFError:
            return
        role, _, method = name.partition(".")
        if role not in served:
            served[role] = getattr(importlib.import_module(f"harness.{role}"), ROLES[role])()
        result = None if method == READY else getattr(served[role], method)(**arguments)
        calls.send_bytes(json.dumps(result).encode())
