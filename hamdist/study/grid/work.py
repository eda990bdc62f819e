"""Execution of one run of a study, in a process of its own or in this one, and its record."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hamdist.display.windows import joined
from hamdist.dynamics.objective.prequential import merge_windows
from hamdist.errors import DivergedError
from hamdist.runtime.process.threads import torch_threads
from hamdist.study.grid.points import GridJob
from hamdist.study.grid.settings import Trains
from hamdist.study.run.run import Run, run_centralised, run_level

POINTS = 60  # of a curve


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The record of a run; JSON on disk.

    Attributes:
        accuracy, loss: of the part that it was scored on; None if the run left the finite range
            (`failure`), accuracy None for real-valued targets as well.
        prequential: accuracy over the whole run.
        rows: that it learned from.
        curve: prequential, per window (rows so far, seconds, accuracy, loss).
        drifts: (item, accuracy before, lowest, samples until it was back).
        settings: in full.
    """

    key: str
    trains: str
    seed: int
    settings: Mapping[str, Any]
    rows: int = 0
    accuracy: float | None = None
    loss: float | None = None
    prequential: float | None = None
    seconds: float = 0.0
    smoothness: float | None = None
    staleness: int = 0
    failure: str | None = None
    warnings: Sequence[str] = ()
    curve: Sequence[Sequence[float | None]] = ()
    drifts: Sequence[Sequence[Any]] = ()


def work(job: GridJob) -> RunRecord:
    """Run a job, on one thread, and return its record, also if it leaves the finite range.

    Raises HamdistError for wrong settings, KeyboardInterrupt if it was ended early (Ctrl-C,
    SIGTERM): half a run is no record.
    """
    with torch_threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run keeps them
        try:
            run = _run(job)
        except DivergedError as error:
            return RunRecord(**_head(job), failure=str(error))
    if run.interrupted:
        raise KeyboardInterrupt
    return _record(job, run)


def _run(job: GridJob) -> Run:
    if job.trains is Trains.LEVEL:
        return run_level(job.settings)[0]
    return run_centralised(job.settings, frozen=job.trains is Trains.FROZEN)[0]


def _record(job: GridJob, run: Run) -> RunRecord:
    at = {w.last: s for w, s in zip(run.windows, run.window_seconds, strict=True)}
    curve = [
        ((w.last + 1) * run.batch, at[w.last], w.accuracy, w.mean_loss)
        for w in joined(run.windows, POINTS)
    ]
    return RunRecord(
        **_head(job),
        rows=run.samples * run.batch,
        accuracy=None if run.held_out is None else run.held_out.accuracy,
        loss=None if run.held_out is None else run.held_out.loss,
        prequential=merge_windows(run.windows).accuracy if run.windows else None,
        seconds=run.seconds,
        smoothness=run.smoothness,
        staleness=run.staleness,
        failure=run.failure,
        warnings=tuple(run.warnings),
        curve=curve,
        drifts=[dataclasses.astuple(recovery) for recovery in run.drifts],
    )


def _head(job: GridJob) -> dict[str, Any]:
    """Return the fields that a record has of its job, whatever became of it."""
    settings = job.settings.model_dump(mode="json", exclude_unset=True)
    head = {"key": job.key, "trains": job.trains.value, "seed": job.settings.seed}
    return {**head, "settings": settings}
