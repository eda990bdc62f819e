"""A Ray cluster of this machine alone: `hamdist cluster start` and `stop`.

All its files are in one folder (mode 0700): the token, Ray's log, `cluster.yaml` for `--cluster`,
`head.json`, which identifies its process, and `storage`, with the results and snapshots of its
runs, which stay when it ends. Ray stays in the foreground of that process (`--block`), so that
ending it ends its children and no other processes; `ray stop` would end every Ray of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import yaml

from hamdist.errors import ClusterError, SettingsError
from hamdist.launch.cluster_file import FILE
from hamdist.launch.jobs_api import need_extras
from hamdist.runtime.ray_engine import auth_token
from hamdist.runtime.ray_engine.local_ray import (
    OBJECT_STORE_BYTES,
    RAY_SETTINGS,
    end_processes,
    short_folder,
)

HEAD = "head.json"
LOG = "ray.log"
TOKEN = "token"
STORAGE = "storage"
HERE = "127.0.0.1"
UP_SECONDS = 90.0
END_SECONDS = 20.0
ASK_SECONDS = 0.3
# What Ray's processes get before it starts on a host. A host that is silent for period * threshold
# + timeout = 8 s counts as dead (Ray's own values: 64 s); one that is cut off ends by itself some
# seconds later. A link that is cut for 5 s costs no host, and hosts under heavy load are not given
# up wrongly.
HEALTH = RAY_SETTINGS | {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "6",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
    "RAY_raylet_liveness_self_check_interval_ms": "2000",
}


@dataclass(frozen=True)
class LocalHead:
    """The head's process, by id and start in seconds since 1970, and Ray's folder."""

    pid: int
    born: float
    folder: str

    def process(self) -> psutil.Process | None:
        """Return the process, if it is still there: its id alone may belong to another by now."""
        try:
            process = psutil.Process(self.pid)
            return process if abs(process.create_time() - self.born) < 1 else None
        except psutil.NoSuchProcess:
            return None


def start(folder: Path, *, port: int, jobs_port: int, cpus: int | None) -> Path:
    """Start a head, wait until its Jobs API answers, and return the cluster file.

    Raises:
        ClusterError: one runs already, a port is taken, or Ray does not start (it is ended then).
        SettingsError: `folder` cannot be written.
    """
    need_extras()
    running = _read(folder)
    if running is not None and running.process() is not None:
        raise ClusterError(f"it runs already (process {running.pid}): hamdist cluster stop ends it")
    for number, option in ((port, "--port"), (jobs_port, "--jobs-port")):
        _check_free(number, option)
    token = _prepare(folder)
    ray_folder = tempfile.mkdtemp(
        prefix="hdhead-", dir=short_folder()
    )  # (it outlives this process)
    command = _command(ray_folder, port, jobs_port, cpus)
    with (folder / LOG).open("w") as log:
        process = subprocess.Popen(
            command,
            env=_environment(os.environ, token),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    head = LocalHead(process.pid, psutil.Process(process.pid).create_time(), ray_folder)
    (folder / HEAD).write_text(json.dumps(asdict(head)))
    try:
        _wait(process, f"http://{HERE}:{jobs_port}", folder / LOG)
    except BaseException:  # an interrupt, too: nothing stays half started
        stop(folder)
        raise
    where = {"jobs": f"http://{HERE}:{jobs_port}", "address": f"{HERE}:{port}"}
    where["storage"] = str(folder / STORAGE)
    python = {"python": sys.executable} if " " not in sys.executable else {}
    text = yaml.safe_dump({**where, "token": str(token), **python}, sort_keys=False)
    (folder / FILE).write_text(text)
    return folder / FILE


def stop(folder: Path) -> bool:
    """End the head of `start`, with its processes and files; False if there is none."""
    head = _read(folder)
    if head is None:
        return False
    process = head.process()
    if process is not None:
        family = [process, *process.children(recursive=True)]
        process.terminate()
        end_processes(family, END_SECONDS)
    shutil.rmtree(head.folder, ignore_errors=True)
    for name in (HEAD, FILE, TOKEN):
        (folder / name).unlink(missing_ok=True)
    return process is not None


def _read(folder: Path) -> LocalHead | None:
    try:
        return LocalHead(**json.loads((folder / HEAD).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(
            f"{str(folder / HEAD)!r} does not say which process it is ({error}); look for it (ps), "
            "end it, and remove the file"
        ) from None


def _prepare(folder: Path) -> Path:
    """Make the folder, accessible to its user alone, with a new token in it."""
    token = folder / TOKEN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        (folder / STORAGE).mkdir(mode=0o700, exist_ok=True)
        token.unlink(missing_ok=True)
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except OSError as error:
        raise SettingsError(f"--folder {str(folder)!r}: {error.strerror or error}") from None
    return token


def _command(ray_folder: str, port: int, jobs_port: int, cpus: int | None) -> list[str]:
    more = [] if cpus is None else [f"--num-cpus={cpus}"]
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        f"--port={port}",
        *(f"--dashboard-host={HERE}", f"--dashboard-port={jobs_port}", "--include-dashboard=true"),
        *("--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0"),
        *(f"--ray-client-server-port={_any_port()}", "--disable-usage-stats"),
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={ray_folder}/r",
        *more,
    ]


def _environment(inherited: Mapping[str, str], token: Path) -> dict[str, str]:
    """Return the environment of Ray's processes: this Python first in the path, for the jobs."""
    other = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", auth_token.TOKEN}
    rest = {name: value for name, value in inherited.items() if name not in other}
    path = os.pathsep.join([str(Path(sys.executable).parent), rest.get("PATH", os.defpath)])
    mine = {"PATH": path, auth_token.MODE: "token", auth_token.FILE: str(token.resolve())}
    return {**HEALTH, **rest, **mine}


def _check_free(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HERE, port))
        except OSError as error:
            raise ClusterError(
                f"port {port} is not free ({error.strerror}): another Ray may run here; choose "
                f"another one ({option})"
            ) from None


def _any_port() -> int:
    """Return a free port, for services that are not used."""
    with socket.socket() as probe:
        probe.bind((HERE, 0))
        number: int = probe.getsockname()[1]
        return number


def _wait(process: subprocess.Popen[bytes], jobs: str, log: Path) -> None:
    """Wait until the Jobs API answers, with whatever status."""
    host, _, port = jobs.removeprefix("http://").rpartition(":")
    end = time.monotonic() + UP_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ClusterError(f"Ray did not start:\n{_tail(log)}")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), ASK_SECONDS):
            return
        time.sleep(ASK_SECONDS)
    raise ClusterError(f"Ray's Jobs API did not answer within {UP_SECONDS:.0f} s:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
