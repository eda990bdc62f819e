"""The settings of a run: what the YAML files hold, checked by pydantic.

Every name of a level, a knob, a loss, an engine or a transport is an enum here. Shapes and the
graph are checked later, by `dynamics`; what can be checked without them is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hamdist.errors import SettingsError


class Level(str, Enum):
    """A named preset of the knobs of locality (the presets: dynamics/locality.py)."""

    LOCAL = "local"
    GROUP = "group"
    DELAY_FREE = "delay-free"
    TRACE = "trace"
    BACKPROP = "backprop"


class Grouping(str, Enum):
    """What one block holds when neither `blocks` nor `cuts` says so."""

    LAYER = "layer"
    GROUP = "group"
    NETWORK = "network"


class Presentation(str, Enum):
    """How a sample is shown: held at the input for c ticks, or entering once and travelling."""

    HOLD = "hold"
    PULSE = "pulse"


class Moves(str, Enum):
    """Which states move in a tick of `hold`: all, or one depth after the other (HL Eq. 10)."""

    ALL = "all"
    LAYER_BY_LAYER = "layer-by-layer"


class Memory(str, Enum):
    """What a block keeps of the past: nothing, its activations, or the weights used on them too."""

    NONE = "none"
    TRACE = "trace"
    TRACE_WEIGHTS = "trace+weights"


class Update(str, Enum):
    """When weights move: in every tick, in a sample's last tick, when a message arrives."""

    TICK = "tick"
    LAST = "last-tick"
    ARRIVAL = "arrival"


class Compensation(str, Enum):
    """What a block does about the delay of its messages."""

    NONE = "none"
    DELAY_SCALED = "delay-scaled"


class Order(str, Enum):
    """The order of the updates inside a tick (equations.md; HL Algorithm 1 and Appendix D)."""

    SIMULTANEOUS = "simultaneous"
    OMEGA_FIRST = "omega-first"
    SEQUENTIAL = "sequential"


class TargetOf(str, Enum):
    """Which target a readout of `hold` compares with: its own sample's, or the current one."""

    SAMPLE = "sample"
    CURRENT = "current"


class Readout(str, Enum):
    """The last block as output net (HL Eq. 4), or as a state that is its own output."""

    OUTPUT = "output"
    STATE = "state"


class Balance(str, Enum):
    """What `blocks: N` balances between blocks."""

    PARAMETERS = "parameters"
    TIME = "time"


class Decay(str, Enum):
    """How the step size falls over the run."""

    NONE = "none"
    LINEAR = "linear"


class Loss(str, Enum):
    """Cross-entropy of class targets, or 1/2 the squared error; both are means over the batch."""

    CROSS_ENTROPY = "cross-entropy"
    MSE = "mse"


class EngineKind(str, Enum):
    """One process, or Ray actors."""

    INPROCESS = "inprocess"
    RAY = "ray"


class TransportKind(str, Enum):
    """How signals cross between actors; auto: ipc on one host, tcp between hosts."""

    AUTO = "auto"
    IPC = "ipc"
    TCP = "tcp"


class Source(str, Enum):
    """The streams that settings can name."""

    DIGITS = "digits"
    FASHION_MNIST = "fashion-mnist"
    DRIFT = "drift"


class Motion(str, Enum):
    """What a smooth stream does between two samples."""

    FADE = "fade"
    SHIFT = "shift"
    ROTATE = "rotate"


class ModelKind(str, Enum):
    """Models that settings can name; `--model package.module:function` and the API take any."""

    MLP = "mlp"
    RESIDUAL_MLP = "residual-mlp"


class DType(str, Enum):
    FLOAT32 = "float32"
    FLOAT64 = "float64"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Speed = Positive | Literal["inf", "depth"]


class ModelSettings(_Section):
    """kind, width of the hidden layers, depth: number of layers that have weights."""

    kind: ModelKind = ModelKind.MLP
    width: Positive = 128
    depth: Positive = 5


class SmoothSettings(_Section):
    """Turns a stream into one that changes slowly: each sample takes `frames` items."""

    frames: Positive = 20
    motion: Motion = Motion.FADE


class DriftSettings(_Section):
    """The synthetic drifting stream: Gaussian classes that jump every `period` items."""

    features: Positive = 16
    classes: Annotated[int, Field(ge=2)] = 4
    period: Positive = 500
    noise: Rate = 0.5


class StreamSettings(_Section):
    """path: the folder of the IDX files. missing: share of items whose target is withheld."""

    source: Source = Source.DIGITS
    batch: Positive = 32
    path: Path | None = None
    smooth: SmoothSettings | None = None
    drift: DriftSettings = DriftSettings()
    missing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class PartitionSettings(_Section):
    """How the model is cut into blocks: a number of blocks, or the names of the modules that begin
    a block; without either the level's grouping decides. delay: ticks per edge."""

    blocks: Positive | None = None
    cuts: tuple[str, ...] | None = None
    balance: Balance = Balance.PARAMETERS
    delay: Positive = 1

    @model_validator(mode="after")
    def _one_way(self) -> PartitionSettings:
        if self.blocks is not None and self.cuts is not None:
            raise ValueError("give 'blocks' or 'cuts', not both")
        return self


class LocalityOverrides(_Section):
    """Knobs of locality; what is not given keeps the level's preset."""

    grouping: Grouping | None = None
    speed: Speed | None = None
    presentation: Presentation | None = None
    moves: Moves | None = None
    memory: Memory | None = None
    update: Update | None = None
    compensation: Compensation | None = None
    delay_power: Rate | None = None
    order: Order | None = None
    target: TargetOf | None = None
    readout: Readout | None = None


class DynamicsSettings(_Section):
    """Hamilton's equations (equations.md). tau in seconds, c in 1/seconds (default 1/tau), eta in
    1/seconds (one for both costates, or eta_z and eta_omega). What is not given follows from
    `learning`: beta = lr/tau, phi = (1 - dampening)/tau, eta_omega = (1 - momentum)/tau, eta_z = 0.
    """

    tau: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    c: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    eta: Rate | None = None
    eta_z: Rate | None = None
    eta_omega: Rate | None = None
    beta: Rate | None = None
    phi: Rate | None = None
    sign: Literal[-1, 1] = -1


class LearningSettings(_Section):
    """The step size and its course, in the words of gradient descent (HL Appendix E)."""

    lr: Rate = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dampening: Annotated[float, Field(ge=0, lt=1)] = 0.0
    decay: Decay = Decay.NONE


class EngineSettings(_Section):
    """actors: how many processes, or auto. placement: the blocks of each actor, by name.
    threads: of each process. address: of a Ray cluster (none: a local Ray is started).
    queue: signals that may wait on an edge beyond those that the schedule keeps in flight.
    stall_warning, stall_limit: seconds without progress until the watchdog speaks, and gives up.
    """

    kind: EngineKind = EngineKind.INPROCESS
    actors: Positive | Literal["auto"] = "auto"
    placement: tuple[tuple[str, ...], ...] | None = None
    threads: Positive = 1
    address: str | None = None
    transport: TransportKind = TransportKind.AUTO
    queue: Positive = 4
    stall_warning: Annotated[float, Field(gt=0)] = 10.0
    stall_limit: Annotated[float, Field(gt=0)] = 300.0


class MetricsSettings(_Section):
    """window: items that one prequential window covers."""

    window: Positive = 50


class CompareSettings(_Section):
    """What `hamdist compare` runs beside centralised backpropagation, and how many seeds."""

    levels: tuple[Level, ...] = (Level.BACKPROP, Level.TRACE, Level.LOCAL)
    seeds: Positive = 1


class LevelOverrides(_Section):
    """What a level changes in the rest of the settings."""

    partition: dict[str, Any] = {}
    locality: dict[str, Any] = {}
    dynamics: dict[str, Any] = {}
    learning: dict[str, Any] = {}


class Settings(_Section):
    """One run, or one comparison. `levels` holds what applies to a level only."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: DType = DType.FLOAT32
    steps: Positive | None = None
    level: Level = Level.TRACE
    loss: Loss = Loss.CROSS_ENTROPY
    model: ModelSettings = ModelSettings()
    stream: StreamSettings = StreamSettings()
    partition: PartitionSettings = PartitionSettings()
    locality: LocalityOverrides = LocalityOverrides()
    dynamics: DynamicsSettings = DynamicsSettings()
    learning: LearningSettings = LearningSettings()
    engine: EngineSettings = EngineSettings()
    metrics: MetricsSettings = MetricsSettings()
    compare: CompareSettings = CompareSettings()
    levels: dict[Level, LevelOverrides] = {}

    @model_validator(mode="after")
    def _levels_are_settings(self) -> Settings:
        for level in self.levels:
            _merged(self, level)
        return self

    def for_level(self, level: Level) -> Settings:
        """These settings at `level`, with what `levels` says about it merged in."""
        return _merged(self, level)


def _merged(settings: Settings, level: Level) -> Settings:
    raw = settings.model_dump(mode="json", exclude={"levels"}, exclude_unset=True)
    overrides = settings.levels.get(level, LevelOverrides()).model_dump(exclude_unset=True)
    try:
        return Settings.model_validate(merge(raw, {**overrides, "level": level.value}))
    except ValidationError as error:
        raise ValueError(f"in 'levels.{level.value}': {describe(error)}") from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `over` laid over it, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return result


LEVEL_SECTIONS = frozenset(LevelOverrides.model_fields)


def lay_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`merge`, for overrides that a user gives: what they say holds at every level, also where
    `levels` says otherwise, unless they speak of `levels` themselves."""
    merged = merge(base, over)
    sections = {k: v for k, v in over.items() if k in LEVEL_SECTIONS and isinstance(v, Mapping)}
    levels = merged.get("levels")
    if sections and isinstance(levels, Mapping):
        merged["levels"] = {
            level: merge(own, sections) if isinstance(own, Mapping) else own
            for level, own in levels.items()
        }
        merged = merge(merged, {k: v for k, v in over.items() if k == "levels"})
    return merged


def describe(error: ValidationError) -> str:
    """One line per wrong field: its path, what is wrong, the value received."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "settings"
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: no such setting")
            continue
        given = "" if isinstance(item["input"], Mapping) else f" (received {item['input']!r})"
        lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{given}")
    return "\n".join(lines)


def parse_override(text: str) -> dict[str, Any]:
    """`stream.batch=8` as {'stream': {'batch': 8}}; the value is read as YAML.

    Raises SettingsError where there is no '=' or the value is no YAML.
    """
    key, found, value = text.partition("=")
    if not found or not key:
        raise SettingsError(f"--set {text!r}: write it as key=value, for example stream.batch=8")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {text!r}: the value is no YAML: {error}") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def read_settings(text: str, origin: str, overrides: Sequence[Mapping[str, Any]] = ()) -> Settings:
    """Settings from YAML `text`, with `overrides` laid over it in order (`lay_over`).

    Raises SettingsError naming `origin`, and the line or the field.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise SettingsError(f"{origin}{where}: no valid YAML: {problem}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise SettingsError(f"{origin}: settings are a mapping of names to values, not {raw!r}")
    for override in overrides:
        raw = lay_over(raw, override)
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(f"{origin}: {describe(error)}") from None


def to_yaml(settings: Settings) -> str:
    """The settings in full, readable by `read_settings`."""
    text: str = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    return text
