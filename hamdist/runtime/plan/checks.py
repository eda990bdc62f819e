"""Checks of a plan: settings, graph and stream that do not fit each other are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from fnmatch import fnmatchcase

from hamdist.config import Compress, Reset, Settings, TargetOf
from hamdist.dynamics.graph.graph import Graph, ShapeMap
from hamdist.dynamics.objective.losses import CrossEntropy, class_axis, mse
from hamdist.dynamics.schedule.events import Schedule
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.levels import Locality
from hamdist.dynamics.updates.constants import Dynamics
from hamdist.errors import GraphError, LevelError
from hamdist.streams.sample import SampleSpec, TargetSpec

PAGE = 4096


def why_one_length(
    graph: Graph, spec: SampleSpec, knobs: Locality, settings: Settings
) -> str | None:
    """Return why all samples must have the lengths of the first one; None if they need not."""
    if not spec.ragged:
        return (
            "where samples have lengths of their own, say ragged=True to "
            "hamdist.streams.from_loader or from_iterable"
        )
    if not knobs.pulse:
        return (
            f"presentation {knobs.presentation.value!r} carries states from one sample to the "
            "next; pad all of them to one length, or use a level of presentation 'pulse'"
        )
    for name, applies in (
        ("partition.slices", bool(settings.partition.slices)),
        ("engine.compress", settings.engine.compress is not Compress.NONE),
    ):
        if applies:
            return f"{name} is laid out for one length; pad all samples to it, or leave {name} out"
    if graph.one_length is None:
        return None
    return f"the model was followed with one length ({graph.one_length}); pad all samples to it"


def least_bytes(graph: Graph, settings: Settings) -> int:
    """Return the least bytes of a snapshot of `graph`.

    Those are its weights, their costates and averages, and a page of the disk for each file.
    """
    learning = settings.learning
    copies = 2 + (learning.adaptive is not None) + (learning.average != "off")
    modules = [m for b in graph.blocks.values() for m in (b.module, b.output) if m is not None]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return copies * sum(t.numel() * t.element_size() for t in tensors) + PAGE * (len(modules) + 2)


def check_output_nets(graph: Graph, dynamics: Dynamics) -> None:
    """Raise LevelError for constants of a state that are given to blocks without one."""
    for pattern, constants in dynamics.blocks.items():
        fitting = [b for b in graph.blocks.values() if fnmatchcase(b.name, pattern)]
        values = {"c": constants.c, "eta_z": constants.eta_z}
        if any(b.has_state for b in fitting):
            continue
        for name, value in values.items():
            if value is not None:
                raise LevelError(
                    f"dynamics.blocks.{pattern}.{name}: {fitting[0].name!r} is an output net and "
                    "has no state that it could belong to; leave it out, or give the readout a "
                    "state (locality.readout 'state')"
                )


def check_resets(graph: Graph, schedule: Schedule, dynamics: Dynamics, knobs: Locality) -> None:
    """Raise LevelError if states are cleared before a prediction can arise."""
    if dynamics.reset.h is not Reset.SAMPLE or not isinstance(schedule, HoldSchedule):
        return
    late = max(schedule.target_lag(r) for r in graph.readouts)
    if schedule.c <= late and knobs.target is TargetOf.SAMPLE:
        raise LevelError(
            f"dynamics.reset.h 'sample' with speed {schedule.c}: the states are cleared before a "
            f"sample's prediction stands at the readout, {late} ticks later; use locality.speed "
            f"{late + 1} or more, or reset.h 'never'"
        )


def with_classes(spec: SampleSpec, graph: Graph, shapes: ShapeMap) -> SampleSpec:
    """Set the number of classes to that of the model, if the stream does not give it."""

    def classes_of(target: TargetSpec | None, readouts: Iterable[str]) -> int | None:
        if target is None or target.classes is not None or target.dtype.is_floating_point:
            return None if target is None else target.classes
        predicted = [
            shapes[name][0]
            for name in readouts
            if isinstance(graph.blocks[name].loss, CrossEntropy)
            and len(shapes[name][0]) == len(target.shape) + 1
        ]
        try:
            return min(
                (sizes[class_axis(sizes, target.shape)] for sizes in predicted), default=None
            )
        except ValueError:  # (`check_predictions` says it)
            return None

    if spec.targets is None:
        return dataclasses.replace(spec, classes=classes_of(spec.target(""), graph.readouts))
    targets = {
        name: dataclasses.replace(one, classes=classes_of(one, {name} & set(graph.readouts)))
        for name, one in spec.targets.items()
    }
    first = next(iter(targets.values()))
    return dataclasses.replace(spec, targets=targets, classes=first.classes)


def check_predictions(graph: Graph, shapes: ShapeMap, spec: SampleSpec, ignore_index: int) -> None:
    """Raise GraphError if a readout's prediction cannot be compared with the targets."""
    unknown = sorted(set(spec.targets or ()) - set(graph.readouts))
    if unknown:
        raise GraphError(
            f"the stream has targets for {unknown[0]!r}, which is no readout; readouts: "
            f"{', '.join(map(repr, graph.readouts))}"
        )
    for name in graph.readouts:
        block = graph.blocks[name]
        shape = shapes[name][0]
        target = spec.target(name)
        if target is None:
            raise GraphError(
                f"readout {name!r} has no targets in the stream, which has some for "
                f"{', '.join(map(repr, spec.targets or ()))}; give it targets, or take its loss off"
            )
        if isinstance(block.loss, CrossEntropy) and block.loss.ignore_index != ignore_index:
            raise GraphError(
                f"readout {name!r} leaves out targets of {block.loss.ignore_index}, ignore_index "
                f"is {ignore_index}: give its BlockSpec loss=CrossEntropy({ignore_index})"
            )
        if block.output is not None:  # its own shape was not derived
            continue
        if block.loss is mse and not target.dtype.is_floating_point:
            raise GraphError(
                f"readout {name!r} has the loss mse, but the targets have dtype {target.dtype}: "
                "convert real-valued ones to a floating-point dtype, or choose cross-entropy"
            )
        if block.loss is mse and shape != target.shape:
            raise GraphError(
                f"readout {name!r} predicts {shape}, but the targets are {target.shape}; give it "
                "as many outputs, or choose another loss"
            )
        classes = target.classes
        if isinstance(block.loss, CrossEntropy) and classes is not None:
            try:
                axis = class_axis(shape, target.shape)
            except ValueError as error:
                raise GraphError(f"readout {name!r}: {error}") from None
            if len(shape) < 2 or shape[axis] < classes:
                raise GraphError(
                    f"readout {name!r} predicts {shape}, but the stream has {classes} classes; "
                    f"give it {classes} outputs"
                )
            shared = spec.targets is None and graph.unsliced.was_cut
            if shared and len(graph.readouts) > 1 and shape[axis] != classes:
                raise GraphError(
                    f"output {name!r} of the model is {shape}, but the one target of the stream "
                    f"has {classes} classes: outputs that are not learned are left out by naming "
                    "the losses of the others, loss={'NAME': 'cross-entropy'}; outputs: "
                    f"{', '.join(map(repr, graph.readouts))}"
                )
            rows = (*shape[:axis], *shape[axis + 1 :])
            if rows != target.shape:
                raise GraphError(
                    f"readout {name!r} predicts {shape}, that is classes of {rows}, but the "
                    f"targets are {target.shape}; predict one row of classes for every target"
                )
        elif isinstance(block.loss, CrossEntropy) and shape != target.shape:
            raise GraphError(
                f"readout {name!r} has the loss cross-entropy, but the stream's targets "
                f"{target.shape} are no classes; say how many classes there are, or use mse"
            )
