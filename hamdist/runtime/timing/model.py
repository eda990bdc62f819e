"""The one model of a run's time: what placement, delays, advice and simulations go by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hamdist.dynamics.graph.graph import INPUT
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.timing.cluster_model import ClusterModel
from hamdist.runtime.timing.step_graph import TOKENS, StepGraph, step_graph
from hamdist.runtime.timing.timed_graph import Period, StepSeconds, TimedGraph, TimedSteps


@dataclass(frozen=True)
class TimingModel:
    """The steps of a plan with their seconds.

    Attributes:
        plan: of the run.
        seconds: by node ('u': the stream) and phase, for one sample, at speed 1.
        source: the block whose actor draws the stream; None: the driver does.
        tokens: of a sequence.
    """

    plan: Plan
    seconds: StepSeconds
    source: str | None = None
    tokens: int = TOKENS

    @cached_property
    def steps(self) -> StepGraph:
        """Return the graph of the steps of a run."""
        return step_graph(self.plan, self.tokens)

    def timed(
        self,
        placement: Sequence[Sequence[str]],
        hosts: Sequence[int] | None = None,
        cluster: ClusterModel | None = None,
    ) -> TimedGraph:
        """Return the activities of the run; without `hosts` all actors are on the first one."""
        actors = [[*((INPUT,) if self.source in blocks else ()), *blocks] for blocks in placement]
        where = [*(hosts or [0] * len(actors))]
        if self.source is None:
            actors.append([INPUT])
            where.append(0)
        cluster = cluster or ClusterModel()  # (of one host that has a core for each actor)
        return TimedSteps(self.plan, self.steps, self.seconds, actors, where, cluster).timed

    def period(self, placement: Sequence[Sequence[str]]) -> Period:
        """Return the steady period of actors on one host with a core for each."""
        return self.timed(placement).period()

    def sample_seconds(self, placement: Sequence[Sequence[str]]) -> float:
        """Return the seconds a sample of actors on one host with a core for each."""
        return self.period(placement).seconds / self.steps.samples
