"""From a study's settings to its cells and runs.

A cell is a side at a point of the grid. Its candidates are run on the validation part, the best one
on the test part. A run's key is a hash of all that its result depends on, so two cells that ask for
the same run (centralised training does not depend on c) share it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from pydantic import ValidationError

from hamdist.config import (
    EngineKind,
    Level,
    Memory,
    Reset,
    Settings,
    Source,
    Split,
    describe,
    merge,
    nested,
)
from hamdist.dynamics.schedule.levels import make_locality
from hamdist.errors import SettingsError
from hamdist.study.grid.settings import Axis, SideSettings, StudySettings, Trains, trains_of
from hamdist.study.shared.named_code import code_of

FROZEN = "frozen"
TUNING_SEEDS = 1_000_000  # the first seed of tuning runs: far from those of final ones
KEY_LENGTH = 20
_AXES = {
    Axis.DEPTH: ("model", "depth"),
    Axis.SPEED: ("locality", "speed"),
    Axis.SMOOTHNESS: ("stream", "smooth", "frames"),
    Axis.BATCH: ("stream", "batch"),
}
# What a result does not depend on: names, what other levels have, how a comparison is made.
_NO_MATTER = frozenset({"name", "compare", "levels"})
# ... and of centralised training: it knows neither blocks nor ticks.
_LEVELS_ALONE = frozenset({"level", "partition", "locality", "dynamics"})
_BASELINES = ("accumulate", "truncation")  # of `locality`, what centralised training follows, too

Point = tuple[tuple[Axis, Any], ...]
Candidate = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GridJob:
    """A run; `settings` are of one level, with seed, steps and the part it is scored on."""

    trains: Trains
    settings: Settings

    @property
    def key(self) -> str:
        """Return a hash of everything that the result depends on.

        Settings that have their default are left out, so that a key survives new settings. The
        user's code that they name is part of it.
        """
        left_out = _NO_MATTER if self.trains is Trains.LEVEL else _NO_MATTER | _LEVELS_ALONE
        raw = self.settings.model_dump(mode="json", exclude_defaults=True, exclude=set(left_out))
        if self.trains is not Trains.LEVEL:
            locality, reset = self.settings.locality, self.settings.dynamics.reset.h
            known = {name: getattr(locality, name) for name in _BASELINES}
            known |= {"reset": reset.value} if reset is Reset.NEVER else {}
            raw |= {name: value for name, value in known.items() if value is not None}
        code = [code] if (code := code_of(self.settings)) else []
        text = json.dumps([self.trains.value, raw, *code], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True, slots=True)
class GridCell:
    """A side at a point of the grid; `point` has the value by axis of the study."""

    name: str
    side: SideSettings
    trains: Trains
    level: Level | None
    point: Point
    memoryless: bool

    @property
    def label(self) -> str:
        """Return a label for messages: `trace, depth 5`."""
        return label_of(self.name, self.point)


def label_of(side: str, point: Point) -> str:
    """Return a label of a side at a point: `trace, depth 5`."""
    return ", ".join([side, *(f"{axis.value} {value}" for axis, value in point)])


def cells(study: StudySettings) -> list[GridCell]:
    """Return all cells of a study, point by point.

    If a side keeps nothing of the past, the side `frozen` is added: training the last block alone
    is the bound that such a level must exceed. Raises SettingsError for invalid settings of any
    run.
    """
    axes = [axis for axis in Axis if study.axes.of(axis)]
    points = product(*(study.axes.of(axis) for axis in axes))
    sides = _with_frozen(study)
    return [
        _cell(study, name, side, tuple(zip(axes, values, strict=True)))
        for values in points
        for name, side in sides.items()
    ]


def _cell(study: StudySettings, name: str, side: SideSettings, point: Point) -> GridCell:
    """Return a cell, after a check of the settings of all its candidates."""
    trains, level = trains_of(name, side)
    cell = GridCell(name, side, trains, level, point, memoryless=False)
    first, *_ = [_settings(study, cell, candidate) for candidate in side.candidates]
    memory = make_locality(first.level, first.locality).memory if trains is Trains.LEVEL else None
    return replace(cell, memoryless=memory is Memory.NONE)


def _with_frozen(study: StudySettings) -> dict[str, SideSettings]:
    sides = dict(study.sides)
    kinds = {name: trains_of(name, side) for name, side in sides.items()}
    if any(trains is Trains.FROZEN for trains, _ in kinds.values()):
        return sides
    if not any(_cell(study, name, side, ()).memoryless for name, side in sides.items()):
        return sides
    if FROZEN in sides:
        raise SettingsError(
            f"sides.{FROZEN}: the name is that of the side which trains the last block alone, and "
            "which a level without memory is compared with: give this side another one"
        )
    central = next(n for n, (trains, _) in kinds.items() if trains is Trains.CENTRALISED)
    sides[FROZEN] = SideSettings(set=sides[central].set, tune=sides[central].tune)
    return sides


def tuning_jobs(study: StudySettings, cell: GridCell) -> list[tuple[Candidate, list[GridJob]]]:
    """Return the runs on the validation part, by candidate."""
    rows = study.tune.rows or study.rows
    seeds = range(TUNING_SEEDS, TUNING_SEEDS + study.tune.seeds)
    return [
        (candidate, [_job(study, cell, candidate, seed, Split.VALIDATION, rows) for seed in seeds])
        for candidate in cell.side.candidates
    ]


def final_jobs(study: StudySettings, cell: GridCell, chosen: Candidate) -> list[GridJob]:
    """Return the runs on the test part, one a seed."""
    seeds = range(study.first_seed, study.first_seed + study.seeds)
    return [_job(study, cell, chosen, seed, Split.TEST, study.rows) for seed in seeds]


def _job(
    study: StudySettings, cell: GridCell, candidate: Candidate, seed: int, part: Split, rows: int
) -> GridJob:
    settings = _settings(study, cell, candidate)
    steps = rows // settings.stream.batch
    if steps < 1:
        raise SettingsError(
            f"rows is {rows}, less than a batch of {settings.stream.batch} ({cell.label})"
        )
    of_signal = settings.stream.source is Source.SIGNAL  # of which nothing is held out
    evaluate = {} if of_signal else {"evaluate": part}
    scored = settings.changed(seed=seed, steps=steps, stream=evaluate)
    return GridJob(cell.trains, scored)


def _settings(study: StudySettings, cell: GridCell, candidate: Candidate) -> Settings:
    """Merge `run`, the point, the side's `set` and the candidate, in this order."""
    raw: dict[str, Any] = {"name": study.name, "engine": {"kind": "inprocess", "actors": 1}}
    layers = [study.run, *(nested(_AXES[axis], value) for axis, value in cell.point)]
    layers += [cell.side.set, *(nested(key.split("."), value) for key, value in candidate.items())]
    for layer in layers:
        raw = merge(raw, layer)
    for field in ("seed", "steps", "level", "levels", "compare"):
        if field in raw:
            raise SettingsError(
                f"run.{field}: a study sets it itself (seeds, rows, sides); leave it out"
            )
    raw["level"] = (cell.level or Level.BACKPROP).value
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        _check_run(study)
        raise SettingsError(f"{cell.label}: {describe(error)}") from None
    if settings.engine.kind is not EngineKind.INPROCESS:
        raise SettingsError(
            "run.engine.kind: the runs of a study are in-process, which gives the same numbers, "
            "and parallel to each other (parallel: processes or ray); leave it out"
        )
    return settings


def _check_run(study: StudySettings) -> None:
    """Raise SettingsError if `run` itself is wrong, not the values that a side lays over it."""
    try:
        Settings.model_validate(study.run)
    except ValidationError as error:
        raise SettingsError(f"in 'run': {describe(error)}") from None
