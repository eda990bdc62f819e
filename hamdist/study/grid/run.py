"""A study, from its settings to its results: tuning runs, the choice, final runs.

Every candidate of every cell is run on the validation part, with seeds that no final run has; the
best one (highest mean accuracy; lowest loss where there is none) is run on the test part with every
seed. Runs that are on disk already are not made again.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hamdist.config import EngineKind, EngineSettings, Split
from hamdist.display.windows import joined
from hamdist.dynamics.objective.prequential import merge_windows
from hamdist.errors import ClusterError, DivergedError, SettingsError
from hamdist.runtime.process.threads import cores, torch_threads
from hamdist.runtime.ray_engine.session import ray_tasks
from hamdist.runtime.results.events import RunEvent, UpdatesAligned
from hamdist.runtime.results.result import Progress
from hamdist.runtime.results.run_events import ProgressEvents
from hamdist.study.grid.points import Candidate, GridCell, GridJob, cells, final_jobs, tuning_jobs
from hamdist.study.grid.settings import StudySettings, Trains
from hamdist.study.report.blocks import BlockFacts, block_facts
from hamdist.study.report.files import to_json
from hamdist.study.run.comparison import with_alignment
from hamdist.study.run.run import Run, run_level
from hamdist.study.shared.machine import Processes
from hamdist.study.shared.result_folder import RUNS, Store

POINTS = 60  # of a curve
PROBES = 20  # of the alignment in a final run


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The record of a run; JSON on disk.

    Attributes:
        accuracy, loss: of the part that it was scored on; None if the run left the finite range
            (`failure`), accuracy None for real-valued targets as well. Of a signal, of which
            nothing is held out, the loss is that of the whole run, prequential.
        prequential: accuracy over the whole run.
        rows: that it learned from.
        curve: prequential, per window (rows so far, seconds, accuracy, loss).
        drifts: (sample, accuracy before, lowest, samples until it was back).
        settings: in full.
        cpu_seconds, joules: as of a `Run`; joules of runs that were made alone.
        blocks: by block the fields of `BlockFacts`; of tuning runs nothing.
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
    cpu_seconds: float | None = None
    joules: float | None = None
    blocks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def work(job: GridJob) -> RunRecord:
    """Run a job, on one thread, and return its record, also if it leaves the finite range.

    Raises HamdistError for wrong settings, KeyboardInterrupt if it was ended early (Ctrl-C,
    SIGTERM): half a run is no record.
    """
    with torch_threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run keeps them
        try:
            run, facts = _run(job)
        except DivergedError as error:
            return RunRecord(**_head(job), failure=str(error))
    if run.interrupted:
        raise KeyboardInterrupt
    if run.held_out is not None and not math.isfinite(run.held_out.loss):
        failure = f"the held-out loss is {run.held_out.loss}: use a smaller learning.lr"
        return RunRecord(**_head(job), failure=failure)
    return _record(job, run, facts)


def _run(job: GridJob) -> tuple[Run, dict[str, BlockFacts]]:
    """Run a job; of a final run of a level its blocks are measured as well."""
    if job.trains is not Trains.LEVEL:
        return run_level(job.settings, baseline=job.trains.value)[0], {}
    if job.settings.stream.evaluate is not Split.TEST:
        return run_level(job.settings)[0], {}
    events, seen = ProgressEvents(), list[RunEvent]()

    def note(progress: Progress) -> None:
        new = [event for event in events(progress) if isinstance(event, UpdatesAligned)]
        blocks = [] if progress.phase is not None else [events.blocks(progress)]
        seen[:] = [*(e for e in seen if isinstance(e, UpdatesAligned)), *new, *blocks]

    run, _ = run_level(with_alignment(job.settings, PROBES), on_progress=note)
    return run, block_facts(seen, run.block_memory)


def _record(job: GridJob, run: Run, facts: Mapping[str, BlockFacts]) -> RunRecord:
    at = {w.last: s for w, s in zip(run.windows, run.window_seconds, strict=True)}
    curve = [
        ((w.last + 1) * run.batch, at[w.last], w.accuracy, w.mean_loss)
        for w in joined(run.windows, POINTS)
    ]
    whole = merge_windows(run.windows) if run.windows else None
    loss = None if run.held_out is None else run.held_out.loss
    if run.held_out is None and whole is not None and whole.accuracy is None:
        loss = whole.mean_loss  # of a signal
    same = ("rows", "seconds", "smoothness", "staleness", "failure", "cpu_seconds", "joules")
    return RunRecord(
        **_head(job),
        **{name: getattr(run, name) for name in same},
        accuracy=None if run.held_out is None else run.held_out.accuracy,
        loss=loss,
        prequential=None if whole is None else whole.accuracy,
        warnings=tuple(run.warnings),
        curve=curve,
        drifts=[dataclasses.astuple(recovery) for recovery in run.drifts],
        blocks={name: dataclasses.asdict(values) for name, values in facts.items()},
    )


def _head(job: GridJob) -> dict[str, Any]:
    """Return the fields that a record has of its job, whatever became of it."""
    settings = job.settings.model_dump(mode="json", exclude_unset=True)
    head = {"key": job.key, "trains": job.trains.value, "seed": job.settings.seed}
    return {**head, "settings": settings}


# -- all runs --------------------------------------------------------------------------------------

# (runs done, runs in this phase, the run's record)
OnRecord = Callable[[str, int, int, RunRecord], None]


@dataclass(frozen=True, slots=True)
class TuningResult:
    """The result of a cell's tuning.

    Attributes:
        score: mean validation accuracy (or minus the loss) of `chosen`; None without tuning.
        edge: settings whose chosen value is the lowest or highest of three and more.
        diverged: every candidate left the finite range; none is chosen, and none is run.
    """

    chosen: Candidate
    score: float | None
    edge: tuple[str, ...] = ()
    diverged: bool = False


@dataclass(frozen=True, slots=True)
class StudyOutcome:
    """A cell, its chosen values, and its final runs, one a seed; none if its tuning diverged."""

    cell: GridCell
    choice: TuningResult
    records: Sequence[RunRecord]


def check(study: StudySettings, *, chosen: bool) -> list[GridCell]:
    """Return the cells of a study, after a check of all settings. Raises SettingsError.

    `chosen`: tune nothing, take `best`.
    """
    all_cells = cells(study)
    for cell in all_cells:
        if chosen:
            _best(study, cell)
        else:
            tuning_jobs(study, cell)
    return all_cells


def run_study(
    study: StudySettings, folder: Path, *, chosen: bool = False, on_record: OnRecord | None = None
) -> list[StudyOutcome]:
    """Run a study, and return all outcomes, cell by cell.

    Raises SettingsError before anything runs, HamdistError if a run fails.

    Args:
        study: its settings.
        folder: where `runs/` is, or will be.
        chosen: tune nothing, take each side's `best`.
        on_record: called for each run with the phase's name and the counts.
    """
    all_cells = check(study, chosen=chosen)
    store = Store(folder / RUNS, lambda values: RunRecord(**values))
    with _Runs(study, store, on_record) as runs:
        if chosen:
            choices = [TuningResult(_best(study, cell), None) for cell in all_cells]
        else:
            choices = _tuned(study, all_cells, runs)
        finals = [
            [] if choice.diverged else final_jobs(study, cell, choice.chosen)
            for cell, choice in zip(all_cells, choices, strict=True)
        ]
        records = runs.make("final", [job for jobs in finals for job in jobs])
    return [
        StudyOutcome(cell, choice, [records[job.key] for job in jobs])
        for cell, choice, jobs in zip(all_cells, choices, finals, strict=True)
    ]


def _best(study: StudySettings, cell: GridCell) -> Candidate:
    """Return the side's `best` values. Raises SettingsError if they are not those that it tunes."""
    side = cell.side
    if set(side.best) != set(side.tune):
        raise SettingsError(
            f"sides.{cell.name}.best: names {', '.join(side.best) or 'nothing'}, but 'tune' has "
            f"{', '.join(side.tune) or 'nothing'}: to run without tuning, give a value for each"
        )
    final_jobs(study, cell, side.best)
    return side.best


def _tuned(study: StudySettings, all_cells: Sequence[GridCell], runs: _Runs) -> list[TuningResult]:
    candidates = [tuning_jobs(study, cell) for cell in all_cells]
    several = [of_cell for of_cell in candidates if len(of_cell) > 1]
    records = runs.make("tuning", [job for cs in several for _, jobs in cs for job in jobs])
    pairs = zip(all_cells, candidates, strict=True)
    return [_choose(cell, of_cell, records) for cell, of_cell in pairs]


def _choose(
    cell: GridCell,
    candidates: Sequence[tuple[Candidate, Sequence[GridJob]]],
    records: dict[str, RunRecord],
) -> TuningResult:
    if len(candidates) == 1:
        return TuningResult(candidates[0][0], None)
    scores = [score([records[job.key] for job in jobs]) for _, jobs in candidates]
    best = max(range(len(scores)), key=scores.__getitem__)
    if not math.isfinite(scores[best]):
        return TuningResult({}, None, diverged=True)
    chosen = candidates[best][0]
    return TuningResult(chosen, scores[best], _at_edge(cell, chosen))


def score(records: Sequence[RunRecord]) -> float:
    """Return the mean accuracy over seeds, or minus the mean loss; -inf if a run failed."""
    values = [-r.loss if r.accuracy is None and r.loss is not None else r.accuracy for r in records]
    finite = [v for v in values if v is not None and math.isfinite(v)]
    return statistics.fmean(finite) if len(finite) == len(values) else -math.inf


def _at_edge(cell: GridCell, chosen: Candidate) -> tuple[str, ...]:
    edge = []
    for name, values in cell.side.tune.items():
        numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        outer = len(numbers) == len(values) > 2 and chosen[name] in (min(numbers), max(numbers))
        edge += [name] if outer else []
    return tuple(edge)


def _beside_others(record: RunRecord) -> RunRecord:
    """Return the record without joules: the machine's are not those of one of several runs."""
    return dataclasses.replace(record, joules=None)


class _Runs:
    """Makes runs, in parallel, and stores them; as a context it ends its processes."""

    def __init__(
        self, study: StudySettings, store: Store[RunRecord], on_record: OnRecord | None
    ) -> None:
        self._study = study
        self._store = store
        self._on_record = on_record
        self._processes: Processes | None = None

    def __enter__(self) -> _Runs:
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes is not None:
            self._processes.close()

    def make(self, phase: str, jobs: Sequence[GridJob]) -> dict[str, RunRecord]:
        """Return the records of `jobs` by key, running those that are not stored yet."""
        by_key = {job.key: job for job in jobs}
        stored = {key: self._store.find(key) for key in by_key}
        records = {key: record for key, record in stored.items() if record is not None}
        for record in self._run([job for key, job in by_key.items() if key not in records]):
            self._store.keep(record.key, to_json(record))
            records[record.key] = record
            if self._on_record is not None:
                self._on_record(phase, len(records), len(by_key), record)
        return records

    def _run(self, jobs: Sequence[GridJob]) -> Iterator[RunRecord]:
        if not jobs:
            return
        if self._study.parallel == "ray":
            address, actors = self._study.address, self._study.workers
            engine = EngineSettings(kind=EngineKind.RAY, address=address, actors=actors or "auto")
            yield from map(_beside_others, ray_tasks(engine, work, jobs))
            return
        number = self._study.workers or cores()
        if number == 1 or (len(jobs) == 1 and self._processes is None):
            yield from map(work, jobs)
            return
        if self._processes is None:
            self._processes = Processes(number)
        pool = self._processes
        try:
            for future in as_completed([pool.submit(work, job) for job in jobs]):
                yield _beside_others(future.result())
        except BrokenProcessPool:
            raise ClusterError(
                "a process of the study ended by itself (was it killed, for want of memory?); the "
                "runs that finished are kept: start the study again, with fewer --workers"
            ) from None
