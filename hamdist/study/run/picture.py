"""The network of a run for a picture: of settings, or of a run whose events are there."""

from __future__ import annotations

from pathlib import Path

from hamdist.config import EngineKind, Level, Settings
from hamdist.display.network import NetworkActor, PlacedNetwork
from hamdist.errors import SettingsError
from hamdist.models.build import ModelFactory
from hamdist.runtime.placement.assign_blocks import place
from hamdist.runtime.plan.network import network_of
from hamdist.runtime.process.threads import cores
from hamdist.runtime.results.events import NetworkPlaced, read_events
from hamdist.study.run.export import planned
from hamdist.study.run.run import DataFactory


def network_of_settings(
    settings: Settings, factory: ModelFactory | None = None, data: DataFactory | None = None
) -> tuple[PlacedNetwork, str]:
    """Return the network and its title; blocks are placed by `engine.placement` or parameters.

    Raises HamdistError, as a run before it starts.
    """
    if settings.level is Level.AUTO:
        raise SettingsError("level 'auto' is chosen when a run starts; name one: --level trace")
    at_level = settings.for_level(settings.level)
    plan, _ = planned(at_level, factory, data)
    groups = [list(plan.graph.blocks)]
    if at_level.engine.kind is EngineKind.RAY:
        groups = place(plan.graph, at_level.engine, cores())
    actors = [NetworkActor(f"actor {i}", "", blocks) for i, blocks in enumerate(groups)]
    return network_of(plan, actors), f"{at_level.name}, {at_level.level.value}"


def network_of_folder(events: Path) -> tuple[PlacedNetwork, str]:
    """Return the network of the latest run in a file of events, as it was placed, and its title.

    Raises SettingsError if no run got so far.
    """
    with events.open(encoding="utf-8") as file:
        placed = [event for event in read_events(file) if isinstance(event, NetworkPlaced)]
    if not placed:
        raise SettingsError(f"{events}: no run has placed its network there yet")
    return placed[-1], f"{events.parent.name}, {placed[-1].level}"
