"""A process of its own that makes several runs on Ray; run by test_session.py. Prints one line."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from torch import nn

import hamdist
from hamdist.config import EngineSettings
from hamdist.runtime.ray_engine import session as cluster

ITEMS = [(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))] * 5


def run(**engine):
    began = time.perf_counter()
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    settings = {"kind": "ray", "actors": 2, "balance": "parameters", **engine}
    result = hamdist.train(model, ITEMS, classes=4, level="trace", engine=settings)
    return {"seconds": time.perf_counter() - began, "samples": result.samples, **raylets()}


def raylets():
    """The processes of the local Ray, and their sessions in the sense of POSIX."""
    found = [p for p in psutil.Process().children(recursive=True) if "raylet" in p.name()]
    workers = [p for p in psutil.Process().children(recursive=True) if "ray::Worker" in p.name()]
    return {
        "raylet": [p.pid for p in found],
        "workers": sorted(p.pid for p in workers),
        "own_session": all(os.getsid(p.pid) != os.getsid(0) for p in found),
    }


def folders():
    return [p.name for p in Path(tempfile.gettempdir()).glob("hdray-*")]


def mine(_number, _frame):
    raise SystemExit(3)


def native_handler():
    """The address (first in a sigaction) of one of those that Ray's C++ has of its own."""
    action = (ctypes.c_void_p * 32)()
    ctypes.CDLL(None).sigaction(signal.SIGTRAP, None, action)  # (Python's own has no other part)
    return action[0]


def main():
    signal.signal(signal.SIGTERM, mine)
    environment, native = dict(os.environ), native_handler()
    report = {}
    with hamdist.session(actors=2):
        report["inside"] = [run(), run()]
    report["after"] = raylets()["raylet"] == [] and folders() == []
    with cluster.ray_session(EngineSettings(kind="ray", actors=2, idle_seconds=0.1)):
        pass
    give_up = time.monotonic() + 60
    while cluster._standing is not None and time.monotonic() < give_up:
        time.sleep(0.05)
    report["timed_out"] = cluster._standing is None
    report["runs"] = [run(), run()]
    report["environment"] = os.environ == environment
    report["handler"] = signal.getsignal(signal.SIGTERM) is mine
    report["native"] = native_handler() == native
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
    # (the Ray of the last runs still waits)
