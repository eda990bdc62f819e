"""What disturbs the steady course of a run: links that vary, snapshots, failures. Drawn by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hamdist.runtime.timing.cluster_model import Link
from hamdist.runtime.timing.cycle_ratio import Reals
from hamdist.runtime.timing.timed_graph import TimedArc, TimedGraph

COPY_BYTES_PER_SECOND = 1e9  # at which a step waits for its actor's state to be copied


@dataclass(frozen=True, slots=True)
class SnapshotModel:
    """Snapshots of a run.

    Attributes:
        every: periods between two.
        seconds: that each takes an actor, by actor.
    """

    every: int
    seconds: Sequence[float]


@dataclass
class Disturbances:
    """Draws the disturbances of one simulated run, and counts the time that they cost.

    Attributes:
        timed: the activities.
        seed: of what is drawn.
        snapshots: None without any.
        failures: so far.
        lost_seconds: of all actors, by cause.
    """

    timed: TimedGraph
    seed: int = 0
    snapshots: SnapshotModel | None = None
    failures: int = 0
    lost_seconds: dict[str, float] = field(
        default_factory=lambda: {"snapshots": 0.0, "failures": 0.0}
    )

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._actors = [i for i, r in enumerate(self.timed.resources) if r.host >= 0]
        self._next = np.full(len(self.timed.resources), math.inf)
        self._next[self._actors] = [self._draw_failure() for _ in self._actors]
        self._fails = self.timed.cluster.failures.per_hour > 0

    def _draw_failure(self) -> float:
        rate = self.timed.cluster.failures.per_hour
        return math.inf if not rate else float(self._random.exponential(3600 / rate))

    def delays(self, arcs: Sequence[TimedArc]) -> Callable[[int], Reals] | None:
        """Return a function that draws the seconds of the arcs, (rows, arcs).

        None if no arc varies. exp(sigma g - sigma^2 / 2) has the mean 1.
        """
        if not any(_varies(arc) for arc in arcs):
            return None
        links = [(arc.link or Link(), arc.nbytes) for arc in arcs]
        means = np.array([arc.seconds for arc in arcs])
        mean, sigma, share, again = np.array(
            [(link.seconds, link.sigma, link.lost(n), link.again) for link, n in links], np.float32
        ).T

        def draw(rows: int) -> Reals:
            more = self._random.standard_normal((rows, len(arcs)), np.float32)
            more *= sigma
            more -= sigma**2 / 2
            np.exp(more, out=more)
            more -= 1
            more *= mean
            if share.any():
                more += again * ((self._random.random(more.shape, np.float32) < share) - share)
            seconds: Reals = more + means
            return seconds

        return draw

    def lost(self, period: int, ends: Reals | None) -> Reals | None:
        """Return the seconds that each resource loses before a period; None if none does.

        ends: when each has done its part of the period before.
        """
        snapshot = self.snapshots is not None and period and period % self.snapshots.every == 0
        failed = () if ends is None or not self._fails else np.flatnonzero(ends > self._next)
        if not snapshot and not len(failed):
            return None
        seconds = np.zeros(len(self.timed.resources))
        for i in self._actors if snapshot else failed:
            seconds[i] = self.lost_by(int(i), period, 0.0 if ends is None else float(ends[i]))
        return seconds

    def lost_by(self, actor: int, period: int, now: float) -> float:
        """Return the seconds that an actor loses before a period that it could begin now.

        An actor that fails begins again at the latest snapshot, and does its steps since then once
        more; the others wait for it.
        """
        snapshots, seconds = self.snapshots, 0.0
        if snapshots is not None and period and period % snapshots.every == 0:
            seconds = snapshots.seconds[actor]
            self.lost_seconds["snapshots"] += seconds
        if now > self._next[actor]:
            model = self.timed.cluster.failures
            since = period if snapshots is None else period % snapshots.every
            again = model.detection + model.startup + since * self.timed.busy[actor]
            self.failures += 1
            self.lost_seconds["failures"] += again
            self._next[actor] = now + again + self._draw_failure()
            seconds += again
        return seconds


def _varies(arc: TimedArc) -> bool:
    return arc.link is not None and bool(arc.link.sigma * arc.link.seconds or arc.link.loss)
