"""The address of a cluster and the way into it: a small YAML file, or an address alone.

jobs: http://127.0.0.1:8265     # Ray's Jobs API: the dashboard, or the near end of a tunnel
address: 10.0.0.1:6379          # of Ray's head, as its hosts see it
token: ~/.hamdist/token         # Ray's token, readable by its owner alone
storage: /mnt/shared/hamdist    # a folder that all hosts see: results stay there as well
python: /opt/hamdist/bin/python # how Python is called there
env: {FASHION_MNIST: /mnt/data} # for every process of the run
stop_seconds: 60                # that `hamdist stop` leaves a run to end by itself
fetch_mib: 512                  # larger files do not travel back; they stay where they are
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints

from hamdist.config import Positive, Section, checked, read_mapping
from hamdist.errors import SettingsError

VARIABLE = "HAMDIST_CLUSTER"
JOBS_PORT = 8265
HOME = Path("~/.hamdist/cluster")  # of `hamdist cluster start`
FILE = "cluster.yaml"


def _url(value: str) -> str:
    """Return an http address with its port; raises ValueError for anything else."""
    text = value if "://" in value else f"http://{value}"
    try:
        parts = urlsplit(text)
        port = parts.port or JOBS_PORT
    except ValueError as error:
        raise ValueError(f"write it as http://HOST:PORT ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("write it as http://HOST:PORT")
    if parts.path.strip("/") or parts.query or parts.username:
        raise ValueError("write it as http://HOST:PORT, with nothing behind it")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port}"


def _endpoint(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16 or "/" in host:
        raise ValueError("write it as HOST:PORT (Ray's own port, 6379 if nothing else was said)")
    return value


def _folder(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("write the whole path: hosts have other current folders")
    return value


class ClusterSettings(Section):
    """One cluster; see the top of this file."""

    jobs: Annotated[str, AfterValidator(_url)] = f"http://127.0.0.1:{JOBS_PORT}"
    """Ray's Jobs API as this terminal reaches it: the dashboard, or the near end of a tunnel."""
    address: Annotated[str, AfterValidator(_endpoint)] | None = None
    """Ray's head as its hosts see it, HOST:PORT."""
    token: str | None = None
    """File with Ray's token, of mode 0600."""
    storage: Annotated[str, AfterValidator(_folder)] | None = None
    """A folder that all hosts see: results stay there as well, and snapshots."""
    # Both go into a command line on the cluster.
    python: Annotated[str, StringConstraints(pattern=r"^[\w./+~-]+$")] = "python"
    """How Python is called there."""
    env: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")], str] = {}
    """Environment variables of every process of the run."""
    stop_seconds: Positive = 60
    """Seconds that `hamdist stop` leaves a run to end by itself."""
    fetch_mib: Annotated[int, Field(ge=0)] = 512
    """Largest file in MiB that travels back; larger ones stay where they are."""


def find_cluster(name: str | None) -> ClusterSettings:
    """Return the cluster that `--cluster` names. Raises SettingsError.

    Without that option it is the one of HAMDIST_CLUSTER, else the one that `hamdist cluster start`
    has started on this machine.
    """
    source = name or os.environ.get(VARIABLE)
    if source is None:
        file = HOME.expanduser() / FILE
        if not file.is_file():
            raise SettingsError(
                "which cluster? Name it (--cluster FILE|ADDRESS, or the variable "
                f"{VARIABLE}), or start one on this machine: hamdist cluster start"
            )
        source = str(file)
    if source.endswith((".yaml", ".yml")) or Path(source).is_file():
        return read_cluster(Path(source))
    return _with_token({"jobs": source}, f"--cluster {source!r}")


def read_cluster(path: Path) -> ClusterSettings:
    """Read a cluster file. Raises SettingsError naming the file, and the line or the field."""
    origin = f"--cluster {str(path)!r}"
    raw = read_mapping(path, origin)
    if "jobs" not in raw and isinstance(raw.get("address"), str):
        raw["jobs"] = f"http://{raw['address'].rpartition(':')[0]}:{JOBS_PORT}"
    return _with_token(raw, origin)


def _with_token(raw: dict[str, Any], origin: str) -> ClusterSettings:
    cluster = checked(ClusterSettings, raw, origin)
    if cluster.token is not None:
        _check_token(Path(cluster.token).expanduser(), origin)
    return cluster


def _check_token(path: Path, origin: str) -> None:
    try:
        mode = path.stat().st_mode
        empty = not path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{origin}: token: {str(path)!r} cannot be read: {error}") from None
    if not stat.S_ISREG(mode) or empty:
        raise SettingsError(f"{origin}: token: {str(path)!r} holds no token")
    if mode & 0o077:
        raise SettingsError(
            f"{origin}: token: others can read {str(path)!r} (mode {stat.S_IMODE(mode):o}); who "
            f"has it owns the cluster: chmod 600 {path}"
        )
