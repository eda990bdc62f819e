"""The rows of the table, worked out in processes of their own: a row is plain arithmetic on one
thread, so as many run at a time as there are cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing.process import BaseProcess

from hamdist.config import FirstStep
from hamdist.errors import SettingsError
from hamdist.runtime.threads import cores
from hamdist.study.recovery.cells import SCENARIOS, Job, Row, run_row
from hamdist.study.recovery.data import Paths
from hamdist.study.recovery.models import MODELS

# The long ones first, so that the processes end at about the same time.
COSTS = {"lstm": 6, "rnn": 3, "resnet": 3, "vit": 2}


def jobs(
    models: Sequence[str] = tuple(MODELS),
    *,
    epochs: int | None = None,
    steps: int | None = None,
    first_step: FirstStep = FirstStep.UNDAMPENED,
    paths: Paths | None = None,
) -> list[Job]:
    """The rows of `models` in all scenarios. epochs: None for the paper's.

    Raises SettingsError for an unknown model.
    """
    wrong = [name for name in models if name not in MODELS]
    if wrong or not models:
        raise SettingsError(
            f"--models: {', '.join(wrong) or 'nothing'} is no model of the table; models: "
            f"{', '.join(MODELS)}"
        )
    return [
        Job(model, scenario, epochs, steps, first_step, paths or Paths())
        for model in dict.fromkeys(models)
        for scenario in SCENARIOS
    ]


class Rows:
    """Rows that are being worked out, by as many processes as there are cores; with one process, in
    this one. `close` ends the processes; as a context it does so at the end."""

    def __init__(self, wanted: Sequence[Job], processes: int | None = None) -> None:
        self._wanted = list(wanted)
        self._processes = min(processes or cores(), len(wanted))
        self._before = set(multiprocessing.active_children())
        self._pool: ProcessPoolExecutor | None = None
        self._futures: dict[Job, Future[Row]] = {}
        self._done: dict[Job, Row] = {}

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def row(self, job: Job) -> Row:
        """One row; raises what went wrong in it."""
        if job not in self._done:
            if self._processes > 1:
                self._start()
                self._done[job] = self._futures[job].result()
            else:
                self._done[job] = run_row(job)
            if len(self._done) == len(self._wanted):
                self.close()
        return self._done[job]

    def finished(self) -> Iterator[Row]:
        """All rows, as they are finished."""
        if self._processes == 1:
            yield from (self.row(job) for job in self._wanted)
            return
        self._start()
        for future in as_completed(self._futures.values()):
            yield future.result()

    def _start(self) -> None:
        if self._pool is not None:
            return
        self._pool = ProcessPoolExecutor(
            self._processes, multiprocessing.get_context("spawn"), initializer=_end_together
        )
        longest_first = sorted(self._wanted, key=lambda job: -COSTS.get(job.model, 1))
        self._futures = {job: self._pool.submit(run_row, job) for job in longest_first}

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        if self._pool is None:
            return
        unfinished = not all(future.done() for future in self._futures.values())
        self._pool.shutdown(wait=not unfinished, cancel_futures=True)
        if unfinished:
            for process in self._mine():
                process.terminate()
                process.join()
        self._pool = None

    def _mine(self) -> set[BaseProcess]:
        return set(multiprocessing.active_children()) - self._before


def _end_together() -> None:
    """In a worker: Ctrl-C ends it without a word, and so does the end of the process for which it
    works, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
