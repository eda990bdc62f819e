"""A folder of snapshots belongs to one run at a time: the second one is refused.

The claim is a file, `run.json`, made exclusively at the start and removed at the end. The claim of
a killed run is taken over: on its own host once its process is gone, on another one once the claim
has not been renewed for a while (the clocks of the hosts should agree to that).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import Any

import psutil

from hamdist.errors import SnapshotError
from hamdist.runtime.storage.store import Storage, storage

NAME = "run.json"
RENEWAL_SECONDS = 20.0
STALE_SECONDS = 90.0


@contextmanager
def claimed(where: str | None, run: int) -> Iterator[None]:
    """Hold the claim of run number `run` on a folder of snapshots inside, if there is one.

    Raises SnapshotError if a run that goes on has claimed it, with which, where and since when.
    """
    if where is None:
        yield
        return
    store = storage(where)
    mine = {
        "run": f"{run:016x}",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
        "since": now(),
    }
    _take(store, mine)
    over = threading.Event()
    renewal = threading.Thread(target=_renew, args=(store, mine, over), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        over.set()
        renewal.join(RENEWAL_SECONDS)
        store.delete(NAME)


def now() -> str:
    """Return the time as text, in UTC and to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _dumped(claim: dict[str, Any]) -> bytes:
    return json.dumps({**claim, "renewed": time.time()}).encode()


def _take(store: Storage, mine: dict[str, Any]) -> None:
    if store.create(NAME, _dumped(mine)):
        return
    other = _read(store)
    if other is not None and _goes_on(other, mine["host"]):
        raise SnapshotError(
            f"snapshots.path {store.where!r}: run {other['run']} writes there (process "
            f"{other['pid']} on {other['host']}, since {other['since']}); give another folder, or "
            f"wait for its end (if it has ended, remove {NAME} there)"
        )
    store.write(NAME, _dumped(mine))


def _read(store: Storage) -> dict[str, Any] | None:
    """Return the claim in the folder, if there is a valid one."""
    try:
        claim = json.loads(store.read(NAME))
        kinds = {"run": str, "host": str, "pid": int, "born": float, "since": str, "renewed": float}
        return claim if all(isinstance(claim[k], kind) for k, kind in kinds.items()) else None
    except (SnapshotError, ValueError, KeyError, TypeError):
        return None


def _goes_on(claim: dict[str, Any], host: str) -> bool:
    if claim["host"] != host:
        return bool(time.time() - claim["renewed"] < STALE_SECONDS)
    try:
        return bool(abs(psutil.Process(claim["pid"]).create_time() - claim["born"]) < 1)
    except psutil.NoSuchProcess:
        return False


def _renew(store: Storage, mine: dict[str, Any], over: threading.Event) -> None:
    while not over.wait(RENEWAL_SECONDS):
        with suppress(SnapshotError):  # (a disk that fails is said elsewhere)
            store.write(NAME, _dumped(mine))
