"""The rules of a run: which blocks have one, and what a rule or a block does not allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from hamdist.config import Compensation, Credit, Memory, MetricsSettings, Moves, Order
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.patterns import check_patterns, fitting
from hamdist.dynamics.rules.rule import BACK, PRESENTATIONS, Rule
from hamdist.dynamics.schedule.levels import Locality
from hamdist.dynamics.updates.constants import Dynamics
from hamdist.errors import LevelError, SettingsError


def with_rules(graph: Graph, rules: Mapping[str, Rule]) -> Graph:
    """Return `graph` whose blocks have the rules that `rules` gives by name or pattern.

    A pattern passes over readouts where the rule is none for them. Raises SettingsError for a
    pattern that fits no block, and for a readout that is named and cannot have its rule.
    """
    check_patterns("rules", rules, graph.blocks, "block")
    blocks = []
    for name, block in graph.blocks.items():
        pattern = fitting(name, rules)
        rule = block.rule if pattern is None else rules[pattern]
        if block.loss is not None and rule is not None and not rule.on_readout:
            if pattern == name or pattern is None:
                raise SettingsError(
                    f"rules.{name}: {type(rule).__name__} is no rule of a readout (on_readout is "
                    "False): leave it out there, and it learns by its own error"
                )
            rule = block.rule
        blocks.append(replace(block, rule=rule))
    return graph.over(blocks)


def ruled(graph: Graph) -> dict[str, Rule]:
    """Return the rules by block that has one."""
    return {name: block.rule for name, block in graph.blocks.items() if block.rule is not None}


def check_rules(
    graph: Graph, knobs: Locality, dynamics: Dynamics, metrics: MetricsSettings
) -> None:
    """Raise SettingsError or LevelError for rules that cannot run in this graph at this level."""
    for name, rule in ruled(graph).items():
        for reason in _against_class(rule):
            raise SettingsError(f"rule {type(rule).__name__}: {reason}")
        for reason in _against(graph, name, rule, knobs, dynamics, metrics):
            raise LevelError(f"block {name!r} with rule {type(rule).__name__}: {reason}")
    mute = {n for n, b in graph.blocks.items() if b.back != "message"} - {*graph.readouts}
    for name, block in graph.blocks.items():
        children = [edge.child for edge in graph.out_of[name]]
        trained = any(p.requires_grad for p in block.module.parameters())
        waits = trained and children and block.back == "message"
        if waits and knobs.credit is Credit.MESSAGES and mute.issuperset(children):
            raise LevelError(
                f"block {name!r} waits for messages, but the rules of its children "
                f"({', '.join(children)}) send none, so it would never learn: give it such a rule "
                "as well, or freeze its weights"
            )


def _against_class(rule: Rule) -> Iterator[str]:
    """Yield what a rule lacks of that which it asks for."""
    signals, own = rule.signals, rule.overrides
    if rule.presentation not in PRESENTATIONS:
        yield f"presentation {rule.presentation!r}: give one of {', '.join(PRESENTATIONS)}"
    if signals.back not in BACK:
        yield f"signals.back {signals.back!r}: give one of {', '.join(BACK)}"
    if rule.presentation == "hold":
        if not own("relax"):
            yield "presentation 'hold' needs a method relax(block, inputs, message)"
        if signals.label or signals.back != "message" or rule.on_readout:
            yield (
                "presentation 'hold' knows messages alone: no label, no error, no rule on a readout"
            )
        return
    if signals.back != "none" and not own("backward"):
        yield f"signals.back {signals.back!r} needs a method backward(block, kept, message)"
    if (signals.back == "none" or signals.label) and not own("learn"):
        yield (
            f"signals.back {signals.back!r} with label {signals.label} needs a method "
            "learn(block, kept, label)"
        )
    if rule.on_readout and (signals.back == "none" or own("learn")):
        yield "on_readout: an output net learns in `backward`, from its own error, and only there"


def _against(
    graph: Graph,
    name: str,
    rule: Rule,
    knobs: Locality,
    dynamics: Dynamics,
    metrics: MetricsSettings,
) -> Iterator[str]:
    """Yield why a block of this run cannot have a rule."""
    here = knobs.presentation.value
    fits = {"pulse": "trace, backprop or heads", "hold": "local or group"}
    if rule.presentation != here:
        yield (
            f"it is of presentation {rule.presentation!r}, the level of {here!r}; use level "
            f"{fits[rule.presentation]}"
        )
    if knobs.credit is Credit.HEADS and rule.signals.back != "none":
        yield f"it asks for {rule.signals.back!r}, but level 'heads' sends none; use 'trace'"
    if knobs.pulse and knobs.memory not in (Memory.TRACE, Memory.NONE):
        yield (f"memory {knobs.memory.value!r} keeps what a rule keeps itself; use memory 'trace'")
    if knobs.microbatches != 1:
        yield "a batch in micro-batches; use level 'backprop' instead of 'pipeline'"
    if knobs.accumulate != 1:
        yield "locality.accumulate, whose gradients are those of messages; leave it out"
    if knobs.hold and (knobs.order is not Order.OMEGA_FIRST or knobs.moves is not Moves.ALL):
        yield "a held rule needs order 'omega-first' and moves 'all'"
    others = [one.value for one in knobs.compensation if one is not Compensation.DELAY_SCALED]
    if others:
        yield f"compensation {others[0]!r} changes the level's own rule; leave it out"
    if knobs.hold and metrics.record is not None:
        yield "metrics.record: its energy is not that of Hamilton's equations; leave it out"
    if dynamics.of(name).inputs is not None:
        yield "learning.inputs takes gradients in factors; switch it off for this block"
    if graph.sliced is not None and graph.sliced.origin[name] != name:
        yield "it is a slice of a layer (partition.slices); leave that layer whole"
    if any(name in (tie.owner, tie.user) for tie in graph.ties):
        yield "it shares a weight with another block; have both layers in one block"
    if graph.blocks[name].state or graph.blocks[name].output is not None:
        yield "a readout with a state learns by Hamilton's equations"
