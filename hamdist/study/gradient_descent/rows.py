"""The rows of the table, worked out in processes of their own: a row is plain arithmetic on one
thread, so as many run at a time as there are cores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from functools import cache

from hamdist.config import FirstStep
from hamdist.errors import SettingsError
from hamdist.runtime.process.threads import cores
from hamdist.study.gradient_descent.data import Paths
from hamdist.study.gradient_descent.models import MODELS
from hamdist.study.gradient_descent.scenarios import SCENARIOS, ScenarioJob, ScenarioRow, run_row
from hamdist.study.shared.processes import Processes

# The long ones first, so that the processes end at about the same time.
COSTS = {"lstm": 6, "rnn": 3, "resnet": 3, "vit": 2}


def jobs(
    models: Sequence[str] = tuple(MODELS),
    *,
    epochs: int | None = None,
    steps: int | None = None,
    first_step: FirstStep = FirstStep.UNDAMPENED,
    paths: Paths | None = None,
) -> list[ScenarioJob]:
    """Return the rows of `models` in all scenarios; `epochs` None: those of the paper.

    Raises SettingsError for an unknown model.
    """
    wrong = [name for name in models if name not in MODELS]
    if wrong or not models:
        raise SettingsError(
            f"--models: {', '.join(wrong) or 'nothing'} is no model of the table; models: "
            f"{', '.join(MODELS)}"
        )
    return [
        ScenarioJob(model, scenario, epochs, steps, first_step, paths or Paths())
        for model in dict.fromkeys(models)
        for scenario in SCENARIOS
    ]


class RowWorkers:
    """Computes rows in as many processes as there are cores; with one process, in this one.

    As a context it ends the processes at its end, whatever they are doing.
    """

    def __init__(self, jobs: Sequence[ScenarioJob], processes: int | None = None) -> None:
        self._jobs = list(jobs)
        self._here = cache(run_row)
        self._pool: Processes | None = None
        self._futures: dict[ScenarioJob, Future[ScenarioRow]] = {}
        number = min(processes or cores(), len(jobs))
        if number > 1:
            self._pool = Processes(number)
            longest_first = sorted(jobs, key=lambda job: -COSTS.get(job.model, 1))
            self._futures = {job: self._pool.submit(run_row, job) for job in longest_first}

    def __enter__(self) -> RowWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def row(self, job: ScenarioJob) -> ScenarioRow:
        """Return one row; raises the error of its computation."""
        return self._futures[job].result() if self._futures else self._here(job)

    def finished(self) -> Iterator[ScenarioRow]:
        """Yield all rows, as they are finished."""
        if not self._futures:
            yield from map(self.row, self._jobs)
        for future in as_completed(self._futures.values()):
            yield future.result()
