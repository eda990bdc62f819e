"""The settings file of a study: a grid of runs, and the sides that are compared on it.

name: fashion-depth
rows: 120000                         # rows that each run learns from, whatever its batch
seeds: 3
run:                                 # what all runs have: settings as of `hamdist run`
  model: {kind: residual-mlp, width: 128}
  stream: {source: fashion-mnist, batch: 32}
axes: {depth: [5, 10, 20]}           # and speed, smoothness, batch
sides:
  centralised:
    tune: {learning.lr: [0.1, 0.2, 0.4]}
  trace:
    set: {locality: {compensation: delay-scaled, delay_power: 0.25}}
    tune: {learning.lr: [0.1, 0.3, 0.5]}
    best: {learning.lr: 0.3}         # what an earlier tuning chose: used with --chosen
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from itertools import product
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from hamdist.config import Level, Positive, Section, Speed, checked, mapping, merge, read_yaml
from hamdist.study.shared.recipes import ShippedFiles

STUDIES = ShippedFiles("recipes/studies", "study")


class Axis(str, Enum):
    """Subject of a study, beside the levels: layers, hops per sample, samples that a
    sample takes to fade into the next one, rows of a sample."""

    DEPTH = "depth"
    SPEED = "speed"
    SMOOTHNESS = "smoothness"
    BATCH = "batch"


class Trains(str, Enum):
    """Training of a side: as a level of hamdist, with centralised backpropagation, or with it on
    the last block alone, the hidden blocks frozen."""

    LEVEL = "level"
    CENTRALISED = "centralised"
    FROZEN = "frozen"


AxisValues = Annotated[tuple[Any, ...], Field(min_length=1)]


class AxesSettings(Section):
    """The values of each axis; an axis without values is as `run` says."""

    depth: tuple[Positive, ...] = ()
    """Layers (`model.depth`)."""
    speed: tuple[Speed, ...] = ()
    """Hops between two samples (`locality.speed`)."""
    smoothness: tuple[Positive, ...] = ()
    """Samples that each takes to fade into the next (`stream.smooth.frames`)."""
    batch: tuple[Positive, ...] = ()
    """Rows of a sample."""

    @model_validator(mode="after")
    def _none_twice(self) -> AxesSettings:
        for axis in Axis:
            values = self.of(axis)
            if len(set(values)) < len(values):
                raise ValueError(f"'{axis.value}' has a value twice: {list(values)}")
        return self

    def of(self, axis: Axis) -> tuple[Any, ...]:
        """Return the values of an axis."""
        return tuple(getattr(self, axis.value))


class PublishedSettings(Section):
    """A published figure, shown beside a side's own."""

    accuracy: Annotated[float, Field(ge=0, le=100)]
    """Held-out accuracy in per cent."""
    source: str
    """Where it stands, and of which network."""


class SideSettings(Section):
    """One side of a study."""

    level: Level | Literal["centralised", "frozen"] | None = None
    """A level, `centralised` or `frozen`; not given: the side's own name."""
    set: dict[str, Any] = {}
    """What it has otherwise than `run`."""
    tune: dict[str, AxisValues] = {}
    """By setting (`learning.lr`), the values to choose from; of several every combination is a
    candidate."""
    best: dict[str, Any] = {}
    """The values that an earlier tuning chose, used with `--chosen`."""
    published: PublishedSettings | None = None
    """What others report of the same method."""

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """Return all combinations of the values in `tune`; without any, one that sets nothing."""
        return [dict(zip(self.tune, c, strict=True)) for c in product(*self.tune.values())]


class TuneSettings(Section):
    """Tuning of sides."""

    seeds: Positive = 1
    """Runs of each candidate, with seeds that no final run has."""
    rows: Positive | None = None
    """Rows that they learn from; not given: the study's."""


class StudySettings(Section):
    """A study: a grid of runs, and the sides that are compared on it."""

    name: str = "study"
    """Name of the study; its results go to a folder of that name."""
    rows: Positive
    """Rows that each run learns from, whatever its batch."""
    seeds: Positive = 3
    """Final runs of each side at each point."""
    first_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the first of them."""
    run: dict[str, Any] = {}
    """What all runs have: settings as of `hamdist run`."""
    goal: Annotated[float, Field(gt=0, le=1)] | None = None
    """Prequential accuracy (a share) of which the tables say how many rows it took."""
    axes: AxesSettings = AxesSettings()
    """What the grid varies."""
    sides: Annotated[dict[str, SideSettings], Field(min_length=1)]
    """The sides, by name; one is `centralised`."""
    tune: TuneSettings = TuneSettings()
    """How sides are tuned."""
    parallel: Literal["processes", "ray"] = "processes"
    """In processes of this machine, or as tasks of Ray."""
    address: str | None = None
    """Ray cluster of the tasks, HOST:PORT; not given: a local Ray."""
    workers: Positive | None = None
    """Runs at a time; not given: one for each core."""

    @model_validator(mode="after")
    def _fair(self) -> StudySettings:
        budgets = {name: math.prod(map(len, s.tune.values())) for name, s in self.sides.items()}
        if len(set(budgets.values())) > 1:
            counts = ", ".join(f"{name} {budget}" for name, budget in budgets.items())
            raise ValueError(
                f"'sides': every side is tuned with the same budget, but the candidates in 'tune' "
                f"are {counts}: give each as many"
            )
        for name, side in self.sides.items():
            _known_side(name, side)
        if not any(trains_of(n, s)[0] is Trains.CENTRALISED for n, s in self.sides.items()):
            raise ValueError(
                "'sides': none is 'centralised', which the gaps are measured from: add "
                "'centralised: {tune: ...}'"
            )
        if self.address is not None and self.parallel != "ray":
            raise ValueError("'address' belongs to 'parallel: ray'")
        return self


def trains_of(name: str, side: SideSettings) -> tuple[Trains, Level | None]:
    """Return how a side trains, and its level."""
    level = side.level if side.level is not None else name
    if level in (Trains.CENTRALISED.value, Trains.FROZEN.value):
        return Trains(level), None
    return Trains.LEVEL, Level(level)


def _known_side(name: str, side: SideSettings) -> None:
    """Raise ValueError if a side's level is unknown."""
    levels = [level.value for level in Level] + ["centralised", "frozen"]
    if side.level is None and name not in levels:
        raise ValueError(
            f"'sides.{name}': the name is no level, so say which one it is "
            f"('level: trace'); levels: {', '.join(levels)}"
        )


def load_study(source: str, overrides: Sequence[Mapping[str, Any]] = ()) -> StudySettings:
    """Load the shipped study `source`, or the file of that path, with `overrides` laid over it.

    Raises SettingsError if there is none, or its content is wrong.
    """
    return read_study(*STUDIES.text(source), overrides)


def read_study(
    text: str, origin: str, overrides: Sequence[Mapping[str, Any]] = ()
) -> StudySettings:
    """Read a study from YAML. Raises SettingsError naming `origin` and the line or the field."""
    raw = mapping(read_yaml(text, origin), origin, "a study's settings")
    for override in overrides:
        raw = merge(raw, override)
    return checked(StudySettings, raw, origin)


def study_yaml(study: StudySettings) -> str:
    """Return the study in full, readable by `read_study`."""
    text: str = yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text
