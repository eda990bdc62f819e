"""A run, worked out: everything that an engine needs and that all processes must agree on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from hamdist.config import Compensation, Decay, EngineSettings, Settings
from hamdist.dynamics.graph import INPUT, Graph, ShapeMap
from hamdist.dynamics.locality import Dynamics, Locality, make_dynamics, make_locality
from hamdist.dynamics.schedule import Schedule, make_schedule
from hamdist.errors import LevelError
from hamdist.runtime.signal import Channels, make_channels
from hamdist.streams.sample import SampleSpec


@dataclass(frozen=True)
class Plan:
    """graph: with modules of its own (a run moves their weights). shapes: of every h, batch in
    front. steps: samples after which the stream ends, or None. run: a number that marks the
    signals of this run. ticks: ticks after which every block stops, or None."""

    graph: Graph
    knobs: Locality
    dynamics: Dynamics
    schedule: Schedule
    channels: Channels
    shapes: ShapeMap
    spec: SampleSpec
    engine: EngineSettings
    seed: int
    run: int
    steps: int | None
    decay: Decay
    window: int

    def scale(self, block: str, sample: int) -> float:
        """The factor of beta for the update of `block` on `sample`."""
        factor = 1.0
        if self.knobs.compensation is Compensation.DELAY_SCALED:
            factor = float((1 + self.schedule.delay(block)) ** -self.knobs.delay_power)
        if self.decay is Decay.LINEAR and self.steps is not None:
            factor *= max(0.0, 1 - sample / self.steps)
        return factor

    def only(self, blocks: Iterable[str]) -> Plan:
        """The plan for the process that hosts `blocks`: without the other blocks' weights."""
        mine = set(blocks)
        specs = [
            b if b.name in mine else dataclasses.replace(b, module=nn.Identity(), output=None)
            for b in self.graph.blocks.values()
        ]
        return dataclasses.replace(self, graph=Graph(specs))


def make_plan(graph: Graph, settings: Settings, spec: SampleSpec) -> Plan:
    """The plan of `settings` (already those of one level) for `graph` on a stream of `spec`.

    Raises GraphError and LevelError for whatever cannot run.
    """
    knobs = make_locality(settings.level, settings.locality)
    dynamics = make_dynamics(settings.dynamics, settings.learning, knobs)
    shapes = graph.shapes(spec.u_shape, spec.u_dtype)
    schedule = make_schedule(graph, knobs)
    if settings.learning.decay is Decay.LINEAR and settings.steps is None:
        raise LevelError(
            "learning.decay 'linear' falls to zero over the run, so the run needs 'steps'"
        )
    return Plan(
        graph=graph,
        knobs=knobs,
        dynamics=dynamics,
        schedule=schedule,
        channels=make_channels(graph, schedule, settings.engine.queue),
        shapes=shapes,
        spec=spec,
        engine=settings.engine,
        seed=settings.seed,
        run=int.from_bytes(os.urandom(8), "little"),
        steps=settings.steps,
        decay=settings.learning.decay,
        window=settings.metrics.window,
    )


def node_names(plan: Plan) -> list[str]:
    return [INPUT, *plan.graph.blocks]
