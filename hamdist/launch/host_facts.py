"""Facts of a host for `hamdist doctor`. Runs on that host, and does not use Ray."""

from __future__ import annotations

import os
import platform
import resource
import secrets
import shutil
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from hamdist.dynamics.native import rows
from hamdist.runtime.process.arithmetic import Arithmetic, arithmetic
from hamdist.runtime.process.threads import cores

SHARED = Path("/dev/shm")
PACKAGES = ("hamdist", "torch", "ray", "pyzmq", "numpy")


class HostFacts(BaseModel):
    """Facts of a host.

    Attributes:
        versions: by package, and of Python.
        processors: that this process may use; promised: CPUs that Ray schedules there.
        threads: torch's default.
        memory, free, shared: bytes of the host, of its free memory, of /dev/shm (None: missing).
        files: that a process may open.
        token: Ray's token is required there.
        storage: the fault of the shared storage; empty: none, None: there is no storage.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    address: str = ""
    platform: str
    versions: dict[str, str]
    processors: int
    promised: float = 0.0
    threads: int
    memory: int
    free: int
    shared: int | None
    files: int
    native: bool
    arithmetic: Arithmetic
    gpus: list[str]
    token: bool
    storage: str | None = None


def host_facts(storage: str | None = None, mark: str | None = None) -> HostFacts:
    """Return the facts of this host; `mark` is a file that another host has put into `storage`."""
    memory = psutil.virtual_memory()
    return HostFacts(
        name=socket.gethostname(),
        platform=f"{platform.system()} {platform.machine()}",
        versions={"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        processors=cores(),
        threads=torch.get_num_threads(),
        memory=memory.total,
        free=memory.available,
        shared=shutil.disk_usage(SHARED).free if SHARED.is_dir() else None,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        native=rows.built(),
        arithmetic=arithmetic(1, native=rows.built()),
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        token=os.environ.get("RAY_AUTH_MODE") == "token",
        storage=None if storage is None else storage_fault(Path(storage), mark),
    )


def storage_fault(folder: Path, mark: str | None) -> str:
    """Return why `folder` is no storage for this host; empty if it is one."""
    if mark is not None and not (folder / mark).is_file():
        return f"{folder} is not the same folder as on the head" if folder.is_dir() else "missing"
    probe = folder / f".hamdist-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"here")
        probe.unlink()
    except OSError as error:
        return f"cannot be written: {error.strerror or error}"
    return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none" if package not in sys.modules else "unknown"
