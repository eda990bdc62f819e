"""The arguments of `hamdist.train` and `hamdist.start`, checked, as a call of the runtime."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from hamdist.config import Loss, Settings, lay_over, settings_with
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.inputs import arguments_of
from hamdist.dynamics.modules.prenorm import stabilised
from hamdist.dynamics.objective.losses import LossFunction, make_loss, model_loss
from hamdist.dynamics.schedule.rounds import OwnLevel
from hamdist.errors import ChoiceWarning, SettingsError
from hamdist.runtime.placement.step_costs import example_inputs
from hamdist.runtime.results.result import RunResult
from hamdist.runtime.train.prepare import level_fields
from hamdist.runtime.train.train import train as train_settings
from hamdist.streams import Stream, from_iterable, from_loader
from hamdist.streams.batch_names import Names
from hamdist.streams.sample import SampleSpec


def functions_of(model: object, settings: object, fields: dict[str, Any]) -> dict[str, Any]:
    """Remove from `fields` what are no settings, and return it. Raises SettingsError."""
    functions = {name: fields.pop(name, None) for name in _FUNCTIONS}
    check_arguments(model, settings, functions, None)
    return {**functions, "rules": fields.pop("rules", None)}


def prepared(
    model: nn.Module | Graph,
    stream: Stream | Iterable[Any],
    settings: Settings | None,
    loss: LossFunction | str | Mapping[str, LossFunction | str] | None,
    classes: int | Mapping[str, int] | None,
    names: Names | None,
    functions: Mapping[str, Any],
    fields: dict[str, Any],
) -> tuple[partial[RunResult], Any]:
    """Return the call that runs, and the stream: what `train` and `start` have in common.

    Args:
        model, stream, settings, loss, classes, names: as in `train`.
        functions: its other arguments that are no settings (`functions_of`).
        fields: sections of settings given as arguments, which go over `settings`.
    """
    rules = functions["rules"]
    if rules is not None and not isinstance(rules, Mapping):
        raise SettingsError(f"rules is {rules!r}; give a dict by block or pattern: {{'*': ...}}")
    if isinstance(loss, str):
        fields["loss"], loss = loss, None
    policy = fields.pop("partition") if callable(fields.get("partition")) else None
    level = fields.get("level")
    if isinstance(level, (OwnLevel, type)) or (isinstance(level, str) and ":" in level):
        fields = lay_over(fields, level_fields("level", level))  # type: ignore[arg-type]
    merged = settings_with(settings, fields)
    at_level = merged.for_level(merged.level)
    ignored = at_level.ignore_index
    losses = (
        {name: _loss(of_output, ignored) for name, of_output in loss.items()}
        if isinstance(loss, Mapping)
        else None
        if loss is None
        else _loss(loss, ignored)
    )
    if isinstance(model, Graph):
        _check_graph(at_level, fields, loss, policy)
    key_names = at_level.stream.names if names is None else names
    own_loss = at_level.model_loss if loss is None else _model_loss(losses)
    stream = _as_stream(stream, classes, key_names, arguments_of(model), own_loss)
    if at_level.model.stabilise:
        model = _stabilised(model, stream.spec)
    options = {"loss": losses, "policy": policy, **functions}
    if isinstance(level, OwnLevel):
        options["level"] = level
    return partial(train_settings, model, settings=at_level, **options), stream


def _model_loss(losses: object) -> str | None:
    """Return the output whose loss the model computes itself, if `losses` (by output) has one."""
    by_output = losses if isinstance(losses, Mapping) else {}
    return next((name for name, function in by_output.items() if function is model_loss), None)


def _stabilised(model: nn.Module | Graph, spec: SampleSpec) -> nn.Module:
    if isinstance(model, Graph):
        raise SettingsError(
            "model.stabilise has no effect on a Graph, which brings its own blocks: make them of "
            "hamdist.PreNorm, and leave it out here"
        )
    wrapped, notes = stabilised(model, example_inputs(spec))
    for text in notes:
        warnings.warn(ChoiceWarning(text), stacklevel=3)
    return wrapped


_FUNCTIONS = {
    "phi": "function of the tick, or a number as dynamics={'phi': ...}",
    "optimizer": (
        "function of the parameters, lambda params: torch.optim.AdamW(params, lr=1e-3), or a name "
        "as learning={'optimizer': 'adamw'}"
    ),
    "scheduler": "function of an optimiser, or use learning.decay and learning.warmup",
}


def check_arguments(
    model: object, settings: object, functions: Mapping[str, object], on_progress: object
) -> None:
    """Raise SettingsError for an argument of the wrong type."""
    if not isinstance(model, (nn.Module, Graph)):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise SettingsError(f"model is {kind}; give an nn.Module, made, or a hamdist.Graph")
    if settings is not None and not isinstance(settings, Settings):
        raise SettingsError(
            f"settings is a {type(settings).__name__}; give hamdist.Settings(...), or its fields "
            "by name: train(model, stream, level='trace', steps=2000)"
        )
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise SettingsError(f"{name} is {function!r}; give a {_FUNCTIONS[name]}")
    if on_progress is not None and not callable(on_progress):
        raise SettingsError(f"on_progress is {on_progress!r}; give a function of a Progress")


def _loss(loss: LossFunction | str, ignore_index: int) -> LossFunction:
    """Return the loss function; raise SettingsError for an unknown name or type."""
    if isinstance(loss, type):
        raise SettingsError(f"loss is the class {loss.__name__}; give one of it, {loss.__name__}()")
    if callable(loss):
        return loss
    losses = [name.value for name in Loss]
    if not isinstance(loss, str):
        raise SettingsError(
            f"loss is {loss!r}; give a function (prediction, target) -> scalar, or one of "
            f"{', '.join(losses)}"
        )
    if loss not in losses:
        raise SettingsError(f"loss {loss!r} is unknown; known: {', '.join(losses)}")
    return make_loss(Loss(loss), ignore_index)


def _check_graph(
    settings: Settings, fields: Mapping[str, Any], loss: object, policy: object
) -> None:
    """Raise SettingsError for settings that have no effect on a graph, which brings its blocks."""
    arguments = {
        "loss": loss is not None or "loss" in fields,
        "partition": policy is not None or bool(settings.partition.model_fields_set),
        "locality.readout": settings.locality.readout is not None,
        "locality.grouping": settings.locality.grouping is not None,
    }
    for name, is_given in arguments.items():
        if is_given:
            raise SettingsError(
                f"{name} has no effect on a Graph, which brings its own blocks and losses: say it "
                "in its BlockSpecs, and leave it out here"
            )


def _as_stream(
    stream: Stream | Iterable[Any],
    classes: int | Mapping[str, int] | None,
    names: Names | None,
    arguments: Sequence[str] | None,
    model_loss: str | None,
) -> Stream:
    if isinstance(stream, Stream):
        if names is not None:
            raise SettingsError(
                f"names has no effect on a {type(stream).__name__}, whose samples are made: say it "
                "to hamdist.streams.from_loader or from_iterable"
            )
        return stream
    reading: dict[str, Any] = {"names": names, "arguments": arguments, "model_loss": model_loss}
    if isinstance(stream, (DataLoader, IterableDataset)):
        return from_loader(stream, classes=classes, **reading)
    return from_iterable(stream, classes=classes, **reading)
