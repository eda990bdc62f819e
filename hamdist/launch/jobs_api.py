"""Ray's Jobs API, over HTTP: submit, list, follow, stop. The one way to the cluster that `launch`
needs, so a tunnel to one port is enough."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hamdist.errors import ClusterError, SettingsError
from hamdist.launch.cluster_file import JOBS_PORT, ClusterSettings
from hamdist.runtime.placement.assign_hosts import HostInfo, described
from hamdist.runtime.ray_engine import auth_token
from hamdist.runtime.ray_engine.cluster_hosts import check_listening

# A log that says nothing for so long: is the job still there?
QUIET_SECONDS = 10.0
# Without contact for so long, the terminal gives up (the run does not).
PATIENCE_SECONDS = 60.0
AGAIN_SECONDS = 1.0
NODES_SECONDS = 10
OURS = "hamdist"
NEEDED = ("aiohttp", "requests", "opencensus", "prometheus_client")  # of ray[default]
_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,199}$")
_TALKERS = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
# Both win over the address that Ray's client is given.
_ELSEWHERE = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_NO_PROXY = "no_proxy"


def missing_extras() -> list[str]:
    """Return the packages of `ray[default]` that are not installed here."""
    return [name for name in NEEDED if find_spec(name) is None]


def need_extras() -> None:
    """Raise ClusterError if Ray's Jobs API cannot be used."""
    missing = missing_extras()
    if missing:
        raise ClusterError(
            f"Ray's Jobs API needs packages that are not installed here ({', '.join(missing)}): "
            "pip install 'hamdist[cluster]' (or 'ray[default]')"
        )


@dataclass(frozen=True)
class RayJob:
    """A job of hamdist on the cluster.

    Attributes:
        state: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        began, ended: seconds since 1970, None where it has not.
    """

    id: str
    state: str
    message: str
    began: float | None
    ended: float | None
    metadata: Mapping[str, str]

    @property
    def over(self) -> bool:
        """Return True if the job has ended."""
        return self.state in ("STOPPED", "SUCCEEDED", "FAILED")

    def unfinished(self) -> str:
        """Return the message for a job that ended without an event of hamdist."""
        text = f"{self.id} ended without a result ({self.state}): {self.message.strip()}"
        if self.state == "STOPPED":
            text += " It was stopped before it began, or took longer to end than stop_seconds"
        if any(sign in self.message for sign in ("No module named", "not found", "No such file")):
            text += (
                "\nIs hamdist installed for the Python that runs there? Name it in the cluster "
                "file (python: /path/to/python); hamdist doctor --cluster looks at all hosts"
            )
        return text


class Jobs:
    """The Jobs API of one cluster.

    Raises ClusterError if it does not answer, refuses the token, or sends a malformed answer.
    """

    def __init__(self, cluster: ClusterSettings) -> None:
        need_extras()
        self.cluster = cluster
        self._check_listening()
        if cluster.token is not None:
            os.environ[auth_token.MODE] = "token"
            os.environ[auth_token.FILE] = str(Path(cluster.token).expanduser().resolve())
        from ray.job_submission import JobSubmissionClient

        for name in _TALKERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._asking():
            self._client: Any = JobSubmissionClient(cluster.jobs)

    def submit(self, command: str, folder: Path, *, name: str, metadata: Mapping[str, str]) -> str:
        """Run `command` in a copy of `folder` on the cluster's head, and return the job's id."""
        env = {**self.cluster.env, "RAY_JOB_STOP_WAIT_TIME_S": str(self.cluster.stop_seconds)}
        with self._asking():
            id_: str = self._client.submit_job(
                entrypoint=command,
                submission_id=name,
                runtime_env={"working_dir": str(folder), "env_vars": env},
                metadata={OURS: "1", **metadata},
            )
        return id_

    def find(self, name: str) -> RayJob:
        """Return a job. Raises ClusterError if the cluster has none such of hamdist."""
        if not _ID.match(name):
            raise SettingsError(f"{name!r} is no id of a run (hamdist runs lists them)")
        with self._asking(name):
            job = _job(self._client.get_job_info(name))
        if OURS not in job.metadata:
            raise ClusterError(f"job {name!r} is none of hamdist's (hamdist runs lists those)")
        return job

    def all(self) -> list[RayJob]:
        """Return hamdist's jobs, the latest first."""
        with self._asking():
            jobs = [_job(details) for details in self._client.list_jobs()]
        mine = [job for job in jobs if job.id and OURS in job.metadata]
        return sorted(mine, key=lambda job: job.began or 0.0, reverse=True)

    def stop(self, name: str) -> bool:
        """Request the end of a job (SIGTERM); False if it has ended already."""
        with self._asking(name):
            return bool(self._client.stop_job(name))

    def log(self, name: str) -> str:
        """Return what the job has written so far."""
        with self._asking(name):
            text: str = self._client.get_job_logs(name)
        return text

    def lines(self, name: str) -> Iterator[str]:
        """Yield the job's log from its start, line by line, until the job is over.

        A lost connection is opened again; ClusterError if that fails for PATIENCE_SECONDS.
        """
        printed = 0
        lost: float | None = None
        while True:
            read, rest = 0, ""
            try:
                for chunk in self._tail(name):
                    lost = None
                    *whole, rest = (rest + chunk).split("\n")
                    for line in whole:
                        read += 1
                        if read > printed:
                            printed = read
                            yield line
                if self.find(name).over:
                    if rest:
                        yield rest
                    return
            except (ClusterError, _Lost) as error:
                now = time.monotonic()
                lost = now if lost is None else lost
                if now - lost > PATIENCE_SECONDS:
                    raise ClusterError(
                        f"no contact with {self.cluster.jobs} for {PATIENCE_SECONDS:.0f} s "
                        f"({error}); the run may well go on: hamdist attach {name}"
                    ) from None
            time.sleep(AGAIN_SECONDS)

    def _tail(self, name: str) -> Iterator[str]:
        """Yield the job's output until the job ends, or the connection (_Lost)."""
        import aiohttp

        loop = asyncio.new_event_loop()
        chunks = self._client.tail_job_logs(name)
        coming: asyncio.Task[str] | None = None
        try:
            while True:
                coming = loop.create_task(chunks.__anext__())
                while not loop.run_until_complete(_soon(coming)):
                    if self.find(name).over:
                        return
                try:
                    yield coming.result()
                except StopAsyncIteration:
                    return
                except (aiohttp.ClientError, RuntimeError, OSError) as error:
                    raise _Lost(str(error) or type(error).__name__) from None
        finally:
            loop.run_until_complete(_ended(coming, chunks))
            loop.close()

    def hosts(self) -> list[HostInfo]:
        """Return the hosts of the cluster with their resources, its head first."""
        from ray.util.state import list_nodes
        from ray.util.state.exception import RayStateApiException

        with self._asking():
            try:
                nodes = list_nodes(address=self.cluster.jobs, timeout=NODES_SECONDS, detail=True)
            except RayStateApiException as error:
                raise ClusterError(f"{self.cluster.jobs}: its hosts are unknown: {error}") from None
        alive = sorted(
            (n for n in nodes if n.state == "ALIVE"), key=lambda n: (not n.is_head_node, n.node_ip)
        )
        return [
            described(n.node_id, n.node_ip, n.node_name, n.resources_total, n.labels or {})
            for n in alive
        ]

    def _check_listening(self) -> None:
        """Raise ClusterError if no process listens; Ray itself would try for minutes."""
        where = urlsplit(self.cluster.jobs)
        try:
            check_listening(f"{where.hostname}:{where.port or JOBS_PORT}")
        except OSError as error:
            raise ClusterError(
                f"{self.cluster.jobs}: no Jobs API of Ray answers there ({error}). It listens on "
                "the head's loopback, port 8265, where the dashboard is on; from another host: "
                "ssh -N -L 8265:127.0.0.1:8265 HEAD, and then --cluster http://127.0.0.1:8265"
            ) from None

    @contextmanager
    def _asking(self, name: str | None = None) -> Iterator[None]:
        """Call Ray's client inside: nothing redirects it, and its errors become a ClusterError."""
        self._check_listening()
        import requests
        from ray.exceptions import AuthenticationError

        before = {v: os.environ.pop(v) for v in (*_ELSEWHERE, _NO_PROXY) if v in os.environ}
        os.environ[_NO_PROXY] = "*"  # (`_check_listening` has reached the address without one)
        try:
            yield
        except AuthenticationError:
            raise ClusterError(
                f"{self.cluster.jobs} asks for Ray's token, and this is not it: name its file in "
                "the cluster file (token: PATH), or set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN_PATH"
            ) from None
        except (requests.RequestException, RuntimeError, ValueError, OSError) as error:
            raise ClusterError(self._said(str(error), name)) from None
        finally:
            os.environ.pop(_NO_PROXY, None)
            os.environ.update(before)

    def _said(self, text: str, name: str | None) -> str:
        if name is not None and "404" in text:
            return f"{self.cluster.jobs} knows no run {name!r} (hamdist runs lists them)"
        first = next((line for line in text.splitlines() if line.strip()), "no reason given")
        return f"{self.cluster.jobs}: {first} (is it Ray's dashboard? its port is 8265, not 6379)"


class _Lost(Exception):
    """Raised when the connection that carried a log has ended."""


async def _soon(task: asyncio.Task[Any]) -> bool:
    done, _ = await asyncio.wait({task}, timeout=QUIET_SECONDS)
    return bool(done)


async def _ended(coming: asyncio.Task[str] | None, chunks: Any) -> None:
    """Close a log that may be in the middle of a read, and ignore its errors."""
    if coming is not None:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
    await asyncio.gather(chunks.aclose(), return_exceptions=True)


def _job(details: Any) -> RayJob:
    state = getattr(details.status, "value", details.status)
    return RayJob(
        id=details.submission_id or "",
        state=str(state),
        message=details.message or "",
        began=_seconds(details.start_time),
        ended=_seconds(details.end_time),
        metadata=details.metadata or {},
    )


def _seconds(milliseconds: int | None) -> float | None:
    return None if not milliseconds else milliseconds / 1000
