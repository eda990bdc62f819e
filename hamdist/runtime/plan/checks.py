"""Checks of a plan: settings, graph and stream that do not fit each other are refused; the rules of
a run: which blocks have one, and what a rule or a block does not allow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from hamdist.config import (
    Compensation,
    Compress,
    Credit,
    Memory,
    MetricsSettings,
    Moves,
    Order,
    Reset,
    Settings,
    TargetOf,
)
from hamdist.dynamics.graph.graph import Graph, ShapeMap
from hamdist.dynamics.graph.patterns import check_patterns, fitting
from hamdist.dynamics.graph.spec import BlockSpec
from hamdist.dynamics.objective.losses import CrossEntropy, class_axis, mse
from hamdist.dynamics.rules.rule import Rule
from hamdist.dynamics.schedule.events import Schedule
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.levels import Locality
from hamdist.dynamics.updates.constants import Dynamics
from hamdist.errors import GraphError, LevelError, SettingsError
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
        name: dataclasses.replace(target, classes=classes_of(target, {name} & set(graph.readouts)))
        for name, target in spec.targets.items()
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
        own = getattr(block.loss, "ignore_index", ignore_index)  # (torch has such losses, too)
        if isinstance(own, int) and own != ignore_index:
            raise GraphError(
                f"readout {name!r} leaves out targets of {own}, ignore_index is {ignore_index}, by "
                "which scores go: give both one number"
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
                    f"targets are {target.shape}; predict one row of classes for every target "
                    "(of one-hot targets give y.argmax(1), of a column of classes y.squeeze(1))"
                )
        elif isinstance(block.loss, CrossEntropy) and shape != target.shape:
            raise GraphError(
                f"readout {name!r} has the loss cross-entropy, but the stream's targets "
                f"{target.shape} are no classes; say how many classes there are, or use mse"
            )
        elif isinstance(block.loss, CrossEntropy) and not target.dtype.is_floating_point:
            raise GraphError(
                f"readout {name!r} has the loss cross-entropy, but the stream's targets "
                f"{target.shape} are whole numbers in the place of probabilities; give the numbers "
                "of the classes, y.argmax(1), or y.float()"
            )


# -- rules -----------------------------------------------------------------------------------------


# By presentation of a rule that of the levels at which it runs.
PRESENTED = {"pulse": "pulse", "hold": "hold", "sequence": "pulse"}


def with_rules(graph: Graph, rules: Mapping[str, Rule]) -> Graph:
    """Return `graph` whose blocks have the rules that `rules` gives by name or pattern.

    A pattern passes over readouts where the rule is none for them, and a rule of sequences over
    blocks that do not read themselves. Raises SettingsError for a pattern that fits no block, or
    none that can have its rule, and for a block that is named and cannot have it.
    """
    check_patterns("rules", rules, graph.blocks, "block")
    blocks, reasons = [], dict[str, str]()
    for name, block in graph.blocks.items():
        pattern = fitting(name, rules)
        rule = block.rule if pattern is None else rules[pattern]
        reason = None if rule is None else _no_place(block, rule)
        if reason is not None:
            if pattern == name or pattern is None:
                raise SettingsError(f"rules.{name}: {type(rule).__name__} is no rule of {reason}")
            text = f"{type(rule).__name__} fits none of its blocks, as {name!r} is {reason}"
            reasons.setdefault(pattern, text)
            rule = block.rule
        blocks.append(replace(block, rule=rule))
    for pattern, reason in reasons.items():
        if not any(block.rule is rules[pattern] for block in blocks):
            raise SettingsError(f"rules.{pattern}: {reason}")
    return graph.over(blocks)


def _no_place(block: BlockSpec, rule: Rule) -> str | None:
    """Return why the block cannot have the rule, if so."""
    if block.loss is not None and not rule.on_readout:
        remedy = "leave it out there, and it learns by its own error"
        return f"a readout (on_readout is False): {remedy}"
    if rule.presentation == "sequence" and block.name not in block.parents:
        return "a block that does not read itself: give the block its own name as a parent"
    return None


def own_states(graph: Graph, knobs: Locality) -> Graph:
    """Return the graph without the edges from blocks to themselves whose rule carries the state.

    Raises LevelError for a rule of sequences whose block has no such edge.
    """
    blocks = dict(graph.blocks)
    for name, rule in rules_by_block(graph).items():
        if rule.presentation == "sequence" and knobs.pulse:
            if reason := _no_place(blocks[name], rule):
                raise LevelError(f"block {name!r}: {type(rule).__name__} is no rule of {reason}")
            others = tuple(parent for parent in blocks[name].parents if parent != name)
            place = blocks[name].parents.index(name)
            blocks[name] = replace(blocks[name], parents=others, own=place)
    changed = any(block is not graph.blocks[name] for name, block in blocks.items())
    return graph.over(blocks.values()) if changed else graph


def carries(graph: Graph) -> bool:
    """Return True if rules of a plan's graph carry states from token to token."""
    return any(block.own is not None for block in graph.blocks.values())


def rules_by_block(graph: Graph) -> dict[str, Rule]:
    """Return the rules by block that has one."""
    return {name: block.rule for name, block in graph.blocks.items() if block.rule is not None}


def check_rules(
    graph: Graph, knobs: Locality, dynamics: Dynamics, metrics: MetricsSettings, *, weighted: bool
) -> None:
    """Raise LevelError for rules that cannot run in this graph at this level.

    weighted: rows of samples have weights.
    """
    for name, rule in rules_by_block(graph).items():
        levels = _against(graph, name, rule, knobs, dynamics, metrics)
        if weighted and rule.signals.label:
            raise LevelError(
                f"the rule of block {name!r} takes labels by a loss of its own, which has no place "
                "for the weights of rows: leave the name 'weight' out, or use another rule"
            )
        for wrong, reason in (*_against_class(rule), *levels):
            if wrong:
                raise LevelError(f"block {name!r} with rule {type(rule).__name__}: {reason}")
    mute = {n for n, b in graph.blocks.items() if b.back != "message"} - {*graph.readouts}
    for name, block in graph.blocks.items():
        children = [edge.child for edge in graph.out_of[name]]
        waits = block.back == "message" and knobs.credit is Credit.MESSAGES and children
        trained = any(p.requires_grad for p in block.module.parameters())
        if waits and trained and mute.issuperset(children):
            raise LevelError(
                f"block {name!r} waits for messages, but the rules of its children "
                f"({', '.join(children)}) send none, so it would never learn: give it such a rule "
                "as well, or freeze its weights"
            )


def _against_class(rule: Rule) -> Iterator[tuple[object, str]]:
    """Yield (it is wrong, what is wrong) for each way in which a rule contradicts itself."""
    back, label, overrides = rule.signals.back, rule.signals.label, rule.overrides
    presentation, held = rule.presentation, rule.presentation == "hold"
    allowed = PRESENTED, ("message", "error", "none")
    wrong = f"presentation {presentation!r}: give one of {', '.join(allowed[0])}"
    yield presentation not in allowed[0], wrong
    carried = presentation == "sequence" and rule.on_readout
    yield carried, "on_readout: a rule of sequences is of blocks with a state"
    yield back not in allowed[1], f"signals.back {back!r}: give one of {', '.join(allowed[1])}"
    asks = f"presentation {presentation!r}, signals.back {back!r}, label {label}: needs a method"
    yield held and not overrides("relax"), f"{asks} relax(block, inputs, message)"
    only = f"{asks.partition(': ')[0]}, on_readout {rule.on_readout}: a held rule gets the sum of "
    only += "its children's messages, which it may leave unused: signals Signals(), on no readout"
    yield held and (label or back != "message" or rule.on_readout), only
    listens = not held and back != "none"
    yield listens and not overrides("backward"), f"{asks} backward(block, kept, message)"
    learns = not held and (back == "none" or label)
    yield learns and not overrides("learn"), f"{asks} learn(block, kept, label)"
    yield (
        rule.on_readout and (back == "none" or overrides("learn")),
        "on_readout: an output net learns in `backward`, from its own error, and only there",
    )


def _against(
    graph: Graph,
    name: str,
    rule: Rule,
    knobs: Locality,
    dynamics: Dynamics,
    metrics: MetricsSettings,
) -> Iterator[tuple[object, str]]:
    """Yield why a block of this run may not have a rule."""
    here, its, block = knobs.presentation.value, rule.presentation, graph.blocks[name]
    fits = {"pulse": "trace, backprop or heads", "hold": "local or group"}.get(
        its, "trace or backprop: it carries its state on, token by token, and nothing goes back"
    )
    yield (
        here != PRESENTED.get(its),
        f"it is of presentation {its!r}, the level of {here!r}; use level {fits}",
    )
    probed = block.own is not None and metrics.alignment is not None
    yield probed, "metrics.alignment compares with gradients of single samples; leave it out"
    alone = knobs.credit is Credit.HEADS and block.back != "none"
    yield alone, f"it asks for {block.back!r}, but level 'heads' sends none; use 'trace'"
    memory = knobs.memory.value
    keeps = knobs.memory in (Memory.TRACE_WEIGHTS, Memory.REVERSIBLE)
    yield keeps, f"memory {memory!r} keeps what a rule keeps itself; use memory 'trace'"
    parts = knobs.microbatches != 1
    yield parts, "a batch in micro-batches; use level 'backprop' instead of 'pipeline'"
    yield knobs.accumulate != 1, "locality.accumulate sums gradients of messages; leave it out"
    orders = knobs.order is not Order.OMEGA_FIRST or knobs.moves is not Moves.ALL
    yield knobs.hold and orders, "a held rule needs order 'omega-first' and moves 'all'"
    others = [c.value for c in knobs.compensation if c is not Compensation.DELAY_SCALED]
    yield others, f"compensation {others[:1]} changes the level's own rule; leave it out"
    energy = knobs.hold and metrics.record is not None
    yield energy, "metrics.record: its energy is not that of Hamilton's equations; leave it out"
    watched = dynamics.of(name).inputs is not None
    yield watched, "learning.inputs takes gradients in factors; switch it off for this block"
    sliced = graph.sliced is not None and graph.sliced.origin[name] != name
    yield sliced, "it is a slice of a layer (partition.slices); leave that layer whole"
    tied = any(name in (tie.owner, tie.user) for tie in graph.ties)
    yield tied, "it shares a weight with another block; have both layers in one block"
    state = block.state or block.output is not None
    yield state, "a readout with a state learns by Hamilton's equations"
