"""Processes that a local Ray starts: fewer than Ray's own default, and workers at once.

Ray has no settings for it. Where its internals differ from those expected here, it starts as usual.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker_process.py")
PARAMETERS = {
    "no_monitor": True,  # of the autoscaler: there is one host
    "include_log_monitor": False,  # what the workers print is not shown
    "setup_worker_path": str(WORKER),
}


@contextmanager
def of_a_program() -> Iterator[None]:
    """Start a Ray inside with the processes that a single program needs."""
    with _in_a_session_of_its_own(), _few_processes():
        yield


@contextmanager
def _in_a_session_of_its_own() -> Iterator[None]:
    """Start Ray's processes in a POSIX session of their own inside. A signal to the group of this
    process, as batch systems send it, then reaches this process alone, which ends the run in order.
    (Ray has no setting for it; Popen has.)"""
    from ray._private import services

    popen = getattr(services, "ConsolePopen", None)
    if popen is None or os.name != "posix":
        yield
        return
    services.ConsolePopen = partial(popen, start_new_session=True)  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        services.ConsolePopen = popen  # type: ignore[misc]


@contextmanager
def _few_processes() -> Iterator[None]:
    """Start a Ray inside without the processes that a single program does not use. Left out are the
    autoscaler's monitor, the monitor of the logs and the server of the dashboard: each is a process
    that imports Ray. WORKER starts the workers."""
    from ray._private import node, parameter

    parameters: Any = parameter.RayParams
    head: Any = node.Node
    start, server = parameters.__init__, getattr(head, "start_api_server", None)
    if server is None or not inspect.signature(start).parameters.keys() >= PARAMETERS.keys():
        yield
        return
    parameters.__init__ = partialmethod(start, **PARAMETERS)
    head.start_api_server = lambda *_, **__: None
    try:
        yield
    finally:
        parameters.__init__ = start
        head.start_api_server = server
