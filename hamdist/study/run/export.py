"""The model and plan that a run of settings begins with, its picture, and a snapshot's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from hamdist.config import EngineKind, Level, Settings
from hamdist.display.network import NetworkActor, PlacedNetwork
from hamdist.errors import SettingsError
from hamdist.models.build import ModelFactory
from hamdist.runtime.placement.assign_blocks import place
from hamdist.runtime.plan.derived import network_of
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.threads import cores
from hamdist.runtime.results.events import NetworkPlaced, read_events
from hamdist.runtime.snapshots.resume import earlier
from hamdist.runtime.storage.snapshot_files import Snapshot, latest
from hamdist.runtime.train.prepare import settings_at
from hamdist.runtime.train.train import plan_of, snapshot_model
from hamdist.streams.sample import Stream
from hamdist.study.run.own_data import NO_FUNCTIONS, OwnFunctions
from hamdist.study.run.run import build, stream_of, torch_dtype


def exported(
    where: str, factory: ModelFactory | None, say: Callable[[str], None]
) -> tuple[dict[str, Tensor], str]:
    """Return the `state_dict` at the latest snapshot of a folder (or at one snapshot), and its
    name.

    `factory` makes the model, if the run had one of the user's. Raises SnapshotError.
    """
    snapshot = latest(where, say)
    settings = earlier(snapshot)
    model, stream = _model_and_stream(settings, OwnFunctions(factory))
    learned = snapshot_model(snapshot, model, stream.spec, settings)
    state = {k: v.detach().clone().contiguous() for k, v in learned.state_dict().items()}
    return state, str(snapshot)


def initial_model(settings: Settings, factory: ModelFactory | None, weights: str | None) -> Any:
    """Return the model that a live run of `settings` begins with, a sample, and its classes.

    weights: a snapshot's, instead of those that the model is made with.
    """
    if settings.model.stabilise:
        raise SettingsError("model.stabilise: give a model that has its normalisation, by --model")
    model, stream = _model_and_stream(settings, OwnFunctions(factory))
    if weights is not None:
        model.load_state_dict(exported(weights, factory, lambda _: None)[0])
    return model, next(iter(stream.samples())), stream.spec.classes


def starting_plan(
    settings: Settings, own: OwnFunctions, snapshot: Snapshot | None = None
) -> tuple[Plan, Stream]:
    """Return the plan with which a run of `settings` would begin, and its stream; with a snapshot,
    that of a run that goes on from there and takes no further ones."""
    model, stream = _model_and_stream(settings, own)
    return plan_of(model, settings, stream.spec, snapshot), stream


def _model_and_stream(settings: Settings, own: OwnFunctions) -> tuple[Any, Stream]:
    dtype = torch_dtype(settings.dtype)
    stream = stream_of(settings, own.data and own.data(settings.seed).in_dtype(dtype))
    return build(settings, stream.spec, own.model, dtype), stream


# -- pictures --------------------------------------------------------------------------------------


def at_one_level(settings: Settings, level: Level | str) -> Settings:
    """Return the settings of one level. Raises SettingsError for level 'auto'."""
    if level is Level.AUTO:
        raise SettingsError("level 'auto' is chosen when a run starts; name one: --level trace")
    return settings_at(settings, level)


def network_of_settings(
    settings: Settings, own: OwnFunctions = NO_FUNCTIONS
) -> tuple[PlacedNetwork, str]:
    """Return the network and its title; blocks are placed by `engine.placement` or parameters.

    Raises HamdistError, as a run before it starts.
    """
    at_level = at_one_level(settings, settings.level)
    plan, _ = starting_plan(at_level, own)
    groups = [list(plan.graph.blocks)]
    if at_level.engine.kind is EngineKind.RAY:
        groups = place(plan.graph, at_level.engine, cores())
    actors = [NetworkActor(f"actor {i}", "", blocks) for i, blocks in enumerate(groups)]
    return network_of(plan, actors), f"{at_level.name}, {at_level.level_name}"


def network_of_folder(events: Path) -> tuple[PlacedNetwork, str]:
    """Return the network of the latest run in a file of events, as it was placed, and its title.

    Raises SettingsError if no run got so far.
    """
    with events.open(encoding="utf-8") as file:
        placed = [event for event in read_events(file) if isinstance(event, NetworkPlaced)]
    if not placed:
        raise SettingsError(f"{events}: no run has placed its network there yet")
    return placed[-1], f"{events.parent.name}, {placed[-1].level}"
