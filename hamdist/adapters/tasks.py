"""Tasks one after the other: what is kept of earlier ones, and what helps later ones.

R_ij is the accuracy on task j (1 ... T) behind task i, b_j = R_0j before the first one:

    average             1/T     sum_j      R_Tj
    backward transfer   1/(T-1) sum_j<T  (R_Tj - R_jj)      = - mean forgetting
    forward transfer    1/(T-1) sum_j>1  (R_(j-1)j - b_j)

(Lopez-Paz and Ranzato 2017, eq. 2 to 4; forgetting R_jj - R_Tj as in Avalanche.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from hamdist.dynamics.graph.inputs import NetworkInputs
from hamdist.errors import SettingsError
from hamdist.runtime.live.run import LiveRun


@dataclass(frozen=True)
class Task:
    """A task: its samples, (u, y) with the batch in front, and held-out x (N, ...), y (N,)."""

    name: str
    samples: Iterable[Any]
    x: NetworkInputs
    y: Tensor


@dataclass(frozen=True)
class TaskScores:
    """The scores of T tasks, by name. accuracy: R, (T + 1, T), row 0 before the first task."""

    names: tuple[str, ...]
    accuracy: Tensor

    @property
    def average(self) -> float:
        """Return the mean accuracy over all tasks behind the last one."""
        return float(self.accuracy[-1].mean())

    @property
    def forgetting(self) -> Tensor:
        """Return what was lost of each task but the last one since it was learned, (T - 1,)."""
        return (self.accuracy[1:].diagonal() - self.accuracy[-1])[:-1]

    @property
    def backward_transfer(self) -> float:
        """Return how much later tasks have helped earlier ones, on average; NaN for one task."""
        return float(-self.forgetting.mean())

    @property
    def forward_transfer(self) -> float:
        """Return how much earlier tasks have helped later ones, on average; NaN for one task."""
        return float((self.accuracy[1:-1].diagonal(1) - self.accuracy[0, 1:]).mean())


def learn_tasks(run: LiveRun, tasks: Sequence[Task]) -> TaskScores:
    """Feed tasks to a run one after the other, and score all of them before and behind each.

    Raises SettingsError for no tasks, or for targets that are no classes.
    """
    if not tasks:
        raise SettingsError("learn_tasks: there is no task; give at least one")
    rows = [_scores(run, tasks)]
    for task in tasks:
        for u, y in task.samples:
            run.feed(u, y)
        run.settle()
        rows.append(_scores(run, tasks))
    return TaskScores(tuple(task.name for task in tasks), torch.tensor(rows, dtype=torch.float64))


def _scores(run: LiveRun, tasks: Sequence[Task]) -> list[float]:
    scores = [run.evaluate(task.x, task.y).accuracy for task in tasks]
    finite = [score for score in scores if score is not None]
    if len(finite) < len(tasks):
        raise SettingsError("learn_tasks: accuracy of targets that are no classes")
    return finite


def from_benchmark(benchmark: Any, batch: int, seed: int = 0) -> Iterator[Task]:
    """Yield the experiences of a benchmark of Avalanche's as tasks, their rows in a seeded order.

    Args:
        benchmark: has `train_stream` and `test_stream`, of experiences whose `dataset` yields
            (x, y, ...), as `nc_benchmark` and the like make it.
        batch: rows of a sample; a shorter last one is left out.
        seed: of the order.
    """
    for learned, scored in zip(benchmark.train_stream, benchmark.test_stream, strict=True):
        order = torch.Generator().manual_seed(seed)
        loader: DataLoader[Any] = DataLoader(
            learned.dataset, batch, shuffle=True, generator=order, collate_fn=_pairs, drop_last=True
        )
        x, y = _pairs([scored.dataset[k] for k in range(len(scored.dataset))])
        yield Task(str(learned.current_experience), loader, x, y)


def _pairs(rows: Sequence[Any]) -> Any:
    return default_collate([(row[0], int(row[1])) for row in rows])
