"""Fetches what the blocks of a live run have for the driver: answers, and states of a cut."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import ray
from ray.exceptions import RayError

from hamdist.runtime.ray_engine.worker_group import WorkerGroup
from hamdist.streams.live import LiveStream

WAIT_SECONDS = 1.0  # of one call, within which an actor answers as soon as it has news
PAUSE_SECONDS = 0.1  # until an actor that was lost is asked again


class NewsFetcher:
    """A thread that has one call at every actor, which answers when there is news.

    As a context it fetches the last news at its end. An actor that was replaced tells again what
    it told since the snapshot; the receiver knows it by its number.
    """

    def __init__(self, worker_group: WorkerGroup, live: LiveStream) -> None:
        self._worker_group = worker_group
        self._live = live
        self._over = threading.Event()
        self._seen: dict[str, tuple[Any, int]] = {}  # by actor: its handle, news that we have
        self._thread = threading.Thread(target=self._run, daemon=True, name="hamdist-news")

    def _ask(self, index: int, seconds: float) -> Any:
        actor = self._worker_group.actors[index]
        handle, seen = self._seen.get(actor.name, (None, 0))
        if handle is not actor.handle:
            seen = 0
        self._seen[actor.name] = actor.handle, seen
        return actor.handle.news.remote(self._worker_group.plan.run, seen, seconds)

    def _take(self, index: int, call: Any) -> None:
        name = self._worker_group.actors[index].name
        seen, news = ray.get(call)
        self._seen[name] = self._seen[name][0], seen
        for one in news:
            self._live.send(one)

    def _run(self) -> None:
        numbers = range(len(self._worker_group.actors))
        calls = {self._ask(i, WAIT_SECONDS): i for i in numbers}
        while not self._over.is_set():
            done, _ = ray.wait(list(calls), num_returns=1, timeout=WAIT_SECONDS)
            for call in done:
                index = calls.pop(call)
                try:
                    self._take(index, call)
                except RayError:  # it was lost, and is replaced or ends the run
                    self._over.wait(PAUSE_SECONDS)
                calls[self._ask(index, WAIT_SECONDS)] = index
        ray.wait(list(calls), num_returns=len(calls), timeout=2 * WAIT_SECONDS)
        for index in numbers:
            with contextlib.suppress(RayError):
                self._take(index, self._ask(index, 0.0))

    def __enter__(self) -> NewsFetcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10 * WAIT_SECONDS)
