"""The start of a run: a model as a graph, in the dtype of the settings; rules by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hamdist.config import EngineKind, Level, Readout, Settings, did_you_mean
from hamdist.dynamics.graph.checks import check_parameters, check_shared_modules
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.inputs import by_parent
from hamdist.dynamics.objective.losses import Losses
from hamdist.dynamics.partition.apply_settings import arranged
from hamdist.dynamics.partition.split import Policy, check_made, split_module
from hamdist.dynamics.rules.names import HOMES, built_in
from hamdist.dynamics.rules.rule import Rule
from hamdist.dynamics.schedule.levels import Locality, make_locality
from hamdist.dynamics.schedule.rounds import OwnLevel
from hamdist.dynamics.user_modules.copies import copied, in_type, unwrapped
from hamdist.dynamics.user_modules.hooks import check_hooks
from hamdist.dynamics.vjp.seeding import random_parts
from hamdist.errors import SettingsError
from hamdist.loading import call_function, check_call, load_function
from hamdist.runtime.nodes.weight_ports import against_ties
from hamdist.runtime.placement.step_costs import example_inputs
from hamdist.runtime.plan.checks import with_rules
from hamdist.streams.sample import SampleSpec, Stream
from hamdist.streams.wrappers.derived import in_dtype


def in_dtype_of(settings: Settings, model: nn.Module | Graph, stream: Stream) -> tuple[Any, Stream]:
    """Return model and stream in `settings.dtype`, where it was set; copies, where they were not.

    Raises SettingsError for a Graph, which brings its type, and a module without weights.
    """
    if isinstance(model, nn.Module) and next(model.parameters(), None) is None:
        raise SettingsError("the model has no weights: there is nothing to learn")
    if "dtype" not in settings.model_fields_set:
        return model, stream
    dtype = getattr(torch, settings.dtype.value)
    tensors = [t for m in modules_of(model) for t in (*m.parameters(), *m.buffers())]
    kinds = {t.dtype for t in tensors if t.is_floating_point() or t.is_complex()}
    if not kinds <= {dtype, dtype.to_complex()}:
        if isinstance(model, Graph):
            raise SettingsError(
                f"dtype {settings.dtype.value!r}: the Graph has weights of another type; make its "
                "modules in that type, or leave dtype out"
            )
        model = in_type(copied(model), dtype)
    return model, in_dtype(stream, dtype)


def modules_of(model: nn.Module | Graph) -> list[nn.Module]:
    """Return the modules of a model or of a graph's blocks."""
    if isinstance(model, nn.Module):
        return [model]
    return [m for b in model.blocks.values() for m in (b.module, b.output) if m is not None]


def graph_in_blocks(
    model: nn.Module | Graph,
    spec: SampleSpec,
    loss: Losses,
    policy: Policy | None,
    settings: Settings,
    rules: Mapping[str, Rule] | None = None,
) -> Graph:
    """Return the graph of blocks, with its slices, delays and rules.

    Args:
        model: of the user; a graph has its blocks already.
        spec: of the stream's samples.
        loss: by output, or one for all.
        policy: places the cuts, instead of `settings.partition`.
        settings: of one level.
        rules: by block or pattern; None: the level's own.
    """
    graph = as_graph(model, settings, spec, loss, policy)
    knobs = make_locality(settings.level, settings.locality)
    in_blocks = arranged(graph, settings.partition, knobs, spec.u_shape, spec.u_dtype, spec.parents)
    return with_rules(in_blocks, rules) if rules else in_blocks


def as_graph(
    model: nn.Module | Graph,
    settings: Settings,
    spec: SampleSpec,
    loss: Losses,
    policy: Policy | None = None,
) -> Graph:
    """Return a graph over copies of the model's modules, cut as `policy`, or else `settings`, say.

    Raises GraphError for a model that cannot be cut in that way.
    """
    check_hooks(modules_of(model))
    knobs = make_locality(settings.level, settings.locality)
    together = against_ties(settings.level.value, knobs, settings.learning)
    graph = _graph(model, settings, knobs, together, spec, loss, policy)
    check_parameters(graph.blocks, together)
    return graph.apart()


def _graph(
    model: nn.Module | Graph,
    settings: Settings,
    knobs: Locality,
    together: str | None,
    spec: SampleSpec,
    loss: Losses,
    policy: Policy | None,
) -> Graph:
    """Make the graph of `as_graph`, in which blocks may share weights."""
    if isinstance(model, Graph):
        check_shared_modules(model.blocks)
        return model.copy()
    model, notes = unwrapped(model)
    notes += _evaluated(model)
    check_made(model, sent=settings.engine.kind is not EngineKind.INPROCESS)
    model_copy = copied(model)
    state = knobs.readout is Readout.STATE
    example = example_inputs(spec)
    graph = split_module(
        model_copy,
        loss,
        settings.partition,
        knobs.grouping,
        example=example,
        targets=spec.targets,
        policy=policy,
        state_readout=state,
        together=together,
        ragged=spec.ragged and knobs.pulse,
    )
    graph.original = model  # what its forward has left behind stays with the blocks
    graph.example = by_parent(example)
    graph.notes[:0] = notes
    return graph


def _evaluated(model: nn.Module) -> list[str]:
    """Return a note about layers that do something else in training than as the model is set."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    parts = [part for part in (*random_parts(model), *norms) if getattr(part, "p", 1)]
    kinds = sorted({type(part).__name__ for part in parts if not part.training})
    if model.training or not kinds:
        return []
    return [
        f"the model is in evaluation mode, so its {', '.join(kinds)} learn as they are there: call "
        "model.train() before, and eval() of those parts alone that are to stay so"
    ]


def make_level(field: str, named: OwnLevel | str) -> OwnLevel:
    """Return the level of one's own that `named` is or names; raise SettingsError if it is none."""
    level: object = named
    if isinstance(named, str):
        function = load_function(field, named)
        check_call(field, named, function)
        level = call_function(field, function)
    if not isinstance(level, OwnLevel):
        raise SettingsError(f"{field} {named!r}: give a hamdist.OwnLevel, or FILE.py:NAME of one")
    return level


def level_fields(field: str, named: OwnLevel | str) -> dict[str, Any]:
    """Return the fields of settings by which a run is at a level of one's own."""
    level = make_level(field, named)
    kind, bases = type(level), ("trace", "heads", "backprop", "reversible")
    if level.base not in bases:
        raise SettingsError(
            f"{field} {named!r}: base {level.base!r}; give one of {', '.join(bases)}"
        )
    name = named if isinstance(named, str) else f"{kind.__module__}:{kind.__qualname__}"
    return {"level": level.base, "locality": {"level": name}}


def settings_at(settings: Settings, level: Level | str) -> Settings:
    """Return the settings at a level, which may be one's own, by name. Raises SettingsError."""
    if isinstance(level, Level):
        return settings.for_level(level)
    fields = level_fields("level", level)
    merged = settings.for_level(Level(fields["level"]))
    return merged.changed(locality={**fields["locality"], "speed": None})


NamedRule: TypeAlias = "Rule | str | Mapping[str, Any]"


def make_rule(field: str, named: NamedRule) -> Rule:
    """Return the rule that `named` is or names; raise SettingsError, naming `field`, if it is none.

    named: a mapping has `name` and the arguments of the class.
    """
    arguments = dict(named) if isinstance(named, Mapping) else {"name": named}
    rule_name: object = arguments.pop("name", "")
    name = str(rule_name)
    if rule_name in HOMES:
        rule_name = built_in(name)
    elif isinstance(rule_name, str):
        if ":" not in rule_name:
            raise SettingsError(
                f"{field} {name!r} is no rule; built in: {', '.join(HOMES)}; your own: FILE.py:NAME"
                f"{did_you_mean(name, list(HOMES))}"
            )
        rule_name = load_function(field, rule_name)
    if callable(rule_name):
        check_call(field, name, rule_name, *arguments)
        rule_name = call_function(field, rule_name, **arguments)
    if not isinstance(rule_name, Rule):
        raise SettingsError(f"{field} {name!r}: give a hamdist.Rule, or the name of one")
    return rule_name
