"""A run, worked out: everything that an engine needs and that all processes must agree on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from hamdist.config import Compensation, Decay, EngineSettings, Settings
from hamdist.dynamics.graph import Graph, ShapeMap
from hamdist.dynamics.locality import Dynamics, Locality, make_dynamics, make_locality
from hamdist.dynamics.losses import cross_entropy, mse
from hamdist.dynamics.schedule import Schedule, make_schedule
from hamdist.errors import GraphError, LevelError
from hamdist.runtime.signal import Channels, make_channels
from hamdist.streams.sample import SampleSpec


@dataclass(frozen=True)
class Plan:
    """graph: with modules of its own (a run moves their weights). shapes: of every h, batch in
    front. steps: samples after which the stream ends, or None. run: a number that marks the
    signals of this run. default_dtype: torch's, of the driver."""

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
    default_dtype: torch.dtype

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
    _check_predictions(graph, shapes, spec)
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
        default_dtype=torch.get_default_dtype(),
    )


def _check_predictions(graph: Graph, shapes: ShapeMap, spec: SampleSpec) -> None:
    """Raises GraphError where a readout's prediction cannot be compared with the targets."""
    for name in graph.readouts:
        block = graph.blocks[name]
        shape = shapes[name][0]
        if block.output is not None:  # its own shape was not derived
            continue
        if block.loss is mse and shape != spec.y_shape:
            raise GraphError(
                f"readout {name!r} predicts {shape}, but the targets are {spec.y_shape}; give it "
                "as many outputs, or choose another loss"
            )
        classes = spec.classes
        if block.loss is cross_entropy and classes is not None:
            if len(shape) < 2 or shape[1] < classes:
                raise GraphError(
                    f"readout {name!r} predicts {shape}, but the stream has {classes} classes; "
                    f"give it {classes} outputs"
                )
        elif block.loss is cross_entropy and shape != spec.y_shape:
            raise GraphError(
                f"readout {name!r} has the loss cross-entropy, but the stream's targets "
                f"{spec.y_shape} are no classes; say how many classes there are, or use mse"
            )
