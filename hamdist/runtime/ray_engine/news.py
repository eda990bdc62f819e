"""Fetches what the blocks of a live run have for the driver: answers, and states of a cut."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from hamdist.runtime.ray_engine.worker_group import WorkerGroup

WAIT_SECONDS = 1.0  # of a call, which returns as soon as there is news
PAUSE_SECONDS = 0.1  # until an actor that was lost is asked again


@contextmanager
def news_fetched(worker_group: WorkerGroup) -> Iterator[None]:
    """Keep a call at every actor inside, and fetch the last news at the end.

    An actor that was replaced tells again what it told since the snapshot; the receiver knows it by
    its number.
    """
    live, over = worker_group.live, threading.Event()

    def fetch(index: int) -> None:
        last = False
        while live is not None and not last:
            last = over.is_set()
            call = worker_group.actors[index].handle.news
            try:
                for one in ray.get(call.remote(worker_group.plan.run, 0 if last else WAIT_SECONDS)):
                    live.send(one)
            except RayError:  # it is replaced, or the run ends
                over.wait(PAUSE_SECONDS)

    numbers = range(len(worker_group.actors) if live is not None else 0)
    threads = [threading.Thread(target=fetch, args=(i,), daemon=True) for i in numbers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(10 * WAIT_SECONDS)
