"""A live run of another process, on this machine or another one (`hamdist.attach`)."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

import torch
from safetensors.torch import load
from torch import Tensor

from hamdist.errors import ClusterError, SettingsError, SnapshotError, StreamError
from hamdist.runtime.live.callbacks import ADDRESS, SAFETENSORS, Answer, LiveStatus
from hamdist.runtime.live.journal import named_tensors, packed, read_named
from hamdist.runtime.results.scores import Scores

AGAIN_SECONDS = 0.02  # after a refusal: the network is slower than its clients
LOOK_SECONDS = 0.5


def attach(
    where: str | Path,
    token: str | None = None,
    *,
    cluster: str | None = None,
    timeout: float = 60.0,
) -> AttachedRun:
    """Attach to a live run that is served: `hamdist serve`, or `hamdist launch --live`.

    Args:
        where: the folder that it has as `out`, on this machine; its address, http://HOST:PORT; or
            the id of a launched run.
        token: of an address.
        cluster: of a launched run: see `hamdist attach`.
        timeout: seconds in which a launched run has to begin, and a call to be answered.

    Returns:
        The run, with the methods of `start`'s.

    Raises:
        SettingsError: no run is served there, or the token is another one.
        ClusterError: nobody answers.
    """
    text = str(where)
    if "://" not in text and not Path(where).is_dir():
        return _launched(text, cluster, timeout)
    if "://" not in text:
        try:
            facts = json.loads((Path(where) / ADDRESS).read_text("utf-8"))
            text, token = facts["address"], facts["token"]
        except (OSError, ValueError, KeyError, TypeError):
            why = f"has no readable {ADDRESS}: its run is not served, or is over"
            raise SettingsError(f"attach: {text!r} {why}") from None
    if token is None:
        raise SettingsError(f"attach: {text} needs a token, which the server has printed")
    return AttachedRun(text, token, timeout)


def _launched(id_: str, cluster: str | None, timeout: float) -> AttachedRun:
    """Attach to a launched run by what its log says, of its latest driver."""
    from hamdist.launch.cluster_file import find_cluster
    from hamdist.launch.events import Listening, from_line
    from hamdist.launch.jobs_api import Jobs

    jobs, end = Jobs(find_cluster(cluster)), time.monotonic() + timeout
    why: object = "it serves nobody: was it launched with --live?"
    while time.monotonic() < end:
        if jobs.find(id_).over:
            raise SettingsError(f"attach: run {id_} is over")
        events = (from_line(line)[1] for line in reversed(jobs.log(id_).splitlines()))
        there = next((event for event in events if isinstance(event, Listening)), None)
        try:
            if there is not None:
                return AttachedRun(there.address, there.token, timeout)
        except ClusterError as error:  # (a driver that was lost, and has a successor soon)
            why = error
        time.sleep(LOOK_SECONDS)
    raise ClusterError(f"attach: run {id_}: {why}")


class AttachedRun:
    """The calls of `LiveRun` to a run of another process; several of them may talk to one run.

    A call raises what it would there, and ClusterError where nobody answers: what it said may then
    have been accepted, or not (`status` tells).
    """

    def __init__(self, address: str, token: str, timeout: float) -> None:
        if not address.startswith(("http://", "https://")):
            raise SettingsError(f"attach: {address!r} is no address; give http://HOST:PORT")
        self.address, self._token, self._timeout = address.rstrip("/"), token, timeout
        # (no proxy: the token is for that host alone)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.status()

    def feed(self, u: Any, y: Any = None, *, end: bool = False, wait: bool = True) -> int:
        """Feed a sample; return its number."""
        tensors = {**named_tensors("u", u), **named_tensors("y", y)}
        return int(self._facts("learn", tensors, wait=wait, end=end or "")["number"])

    def predict(self, u: Any, *, end: bool = False, wait: bool = True) -> Answer:
        """Feed a sample without a label, and return its prediction."""
        data = self._say("predict", named_tensors("u", u), wait=wait, end=end or "")
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts, y = json.loads(header["__metadata__"]["answer"]), read_named("y", load(data))
        return Answer(facts["number"], cast("Tensor", y), lambda: facts["versions"])

    def teach(self, number: int, y: Any, *, wait: bool = True) -> None:
        """Give the label of an earlier sample."""
        self._say("learn", named_tensors("y", y), wait=wait, number=number)

    def set(self, *, learning: Mapping[str, float]) -> None:
        """Change the learning rate from the next sample on."""
        self._facts("set", json.dumps({"learning": dict(learning)}).encode())

    def pause(self) -> None:
        """Hold the network."""
        self._facts("pause")

    def go_on(self) -> None:
        """End a pause."""
        self._facts("go_on")

    def settle(self) -> None:
        """Emit idle ticks until all that is under way has come to its end."""
        self._facts("settle")

    def weights(self) -> dict[str, Tensor]:
        """Return the `state_dict` of the run's model, of one emission."""
        return load(self._say("weights", None))

    def evaluate(self, x: Any, y: Any) -> Scores:
        """Return the scores of the run's model on x (N, ...) with targets y; nothing is learned."""
        facts = self._facts("evaluate", {**named_tensors("u", x), **named_tensors("y", y)})
        outputs = {name: Scores(**scores) for name, scores in facts.pop("outputs").items()}
        return Scores(**facts, outputs=outputs)

    def snapshot(self) -> str:
        """Take a snapshot; return its place, there."""
        return str(self._facts("snapshot")["snapshot"])

    def status(self) -> LiveStatus:
        """Return where the run stands, without the engine's report."""
        facts = self._facts("status", None)
        fed, answered, waiting = (facts[name] for name in ("fed", "answered", "waiting"))
        return LiveStatus(fed, answered, waiting, bool(facts["paused"]), None)

    def stop(self) -> None:
        """Ask the server to end the run in order; it does so behind what was fed."""
        self._facts("stop")

    def _facts(self, name: str, body: Any = b"", **query: Any) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self._say(name, body, **query))
        return facts

    def _say(self, name: str, body: Any, *, wait: bool = True, **query: Any) -> bytes:
        """Return the reply to a request. body: tensors, or JSON as bytes; None: GET."""
        headers = {"Authorization": f"Bearer {self._token}", "Accept": SAFETENSORS}
        if isinstance(body, Mapping):
            headers["Content-Type"] = SAFETENSORS
            try:
                tensors = {n: torch.as_tensor(t).cpu() for n, t in body.items() if t is not None}
            except (TypeError, ValueError, RuntimeError) as error:
                raise StreamError(f"{name}: {', '.join(body)}: no tensor: {error}") from None
            body = packed(tensors)
        url = f"{self.address}/{name}?{urlencode(query)}"
        while True:
            try:
                request = urllib.request.Request(url, body, headers)
                with self._opener.open(request, timeout=self._timeout) as reply:
                    data: bytes = reply.read()
                    return data
            except urllib.error.HTTPError as error:
                refusal, again = _refused(error)
            except (OSError, HTTPException, ValueError) as error:
                raise ClusterError(f"{self.address} does not answer: {error}") from None
            if not wait or not again:
                raise refusal
            time.sleep(AGAIN_SECONDS)


def _refused(error: urllib.error.HTTPError) -> tuple[Exception, bool]:
    """Return the error that a refusal means, and True if there may be room soon."""
    try:
        facts = json.loads(error.read())
        text, kind = str(facts["error"]), facts["kind"]
    except (ValueError, KeyError, TypeError, OSError):
        why = f"{error.url}: {error.code} {error.reason}: is it a run of hamdist?"
        return ClusterError(why), False
    if error.code == 429:
        return BlockingIOError(text), kind != "Paused"
    if error.code == 401:
        return SettingsError(f"{error.url}: {text}"), False
    kinds = (SettingsError, SnapshotError)
    return next((c for c in kinds if c.__name__ == kind), StreamError)(text), False
