"""All settings of a run: its sections, and the overrides of `levels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any, TypedDict

from pydantic import Field, ValidationError, field_validator, model_validator

from hamdist.config.merge import LevelOverrides, lay_over, merge
from hamdist.config.messages import describe
from hamdist.config.sections.dynamics import DynamicsSettings
from hamdist.config.sections.engine import EngineSettings
from hamdist.config.sections.learning import LearningSettings
from hamdist.config.sections.locality import Level, LocalityOverrides
from hamdist.config.sections.metrics import MetricsSettings, TrackerKind
from hamdist.config.sections.model import ModelSettings
from hamdist.config.sections.partition import PartitionSettings
from hamdist.config.sections.section import Positive, Section, Seed
from hamdist.config.sections.snapshots import SnapshotSettings
from hamdist.config.sections.stream import StreamSettings
from hamdist.errors import SettingsError

IGNORE_INDEX = -100  # PyTorch's: a target of this class has no loss


class DType(str, Enum):
    """The type of weights, states and messages where no block has one of its own."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


MODEL_LOSS = "loss"  # what models call the loss that they return


class Loss(str, Enum):
    """Cross-entropy of class targets, or 1/2 the squared error; both are means over the batch; or
    the loss that the model itself returns (of one output that is called `loss`, or as is named)."""

    CROSS_ENTROPY = "cross-entropy"
    MSE = "mse"
    MODEL = "model"


OwnName = Annotated[str, Field(pattern=":")]


class CompareSettings(Section):
    """Runs of `hamdist compare` beside centralised backpropagation."""

    levels: tuple[Level | OwnName, ...] = (Level.BACKPROP, Level.TRACE, Level.LOCAL)
    """The levels; those of your own as `FILE.py:NAME`."""
    rules: tuple[str, ...] = ()
    """Instead of the levels: names of levels, and of rules of learning for all blocks."""
    seeds: Positive = 1
    """Runs of each, with seeds from `seed` on."""


class Settings(Section):
    """One run, or one comparison."""

    name: str = "run"
    """Name of the run; its results go to a folder of that name."""
    seed: Seed = 0
    """Seed of everything that is drawn: weights, order of the stream, dropout."""
    dtype: DType = DType.FLOAT32
    """Type of weights, states and messages where no block has one of its own."""
    steps: Positive | None = None
    """Samples of the stream; not given: as many as it has."""
    level: Level = Level.TRACE
    """Preset of the knobs of locality; `auto` chooses one and says why."""
    loss: Loss | Annotated[dict[str, Loss], Field(min_length=1)] = Loss.CROSS_ENTROPY
    """Loss of the model's output: one for all outputs, or by output (those without one are not
    learned). `model`: what the model itself returns as its loss."""
    ignore_index: int = IGNORE_INDEX
    """Class targets of this number are left out of the loss and of every score (padding, say)."""
    model: ModelSettings = ModelSettings()
    """The shipped network, where no model is given in Python or by `--model`."""
    stream: StreamSettings = StreamSettings()
    """Where samples come from, how many rows at a time, how late, how smooth."""
    partition: PartitionSettings = PartitionSettings()
    """How the model is cut into blocks, and how long signals travel."""
    locality: LocalityOverrides = LocalityOverrides()
    """Knobs of the level; what is not given is as the level has it."""
    dynamics: DynamicsSettings = DynamicsSettings()
    """Constants of Hamilton's equations."""
    learning: LearningSettings = LearningSettings()
    """The step size and what changes a step."""
    engine: EngineSettings = EngineSettings()
    """Where blocks live, how they compute, how signals travel."""
    metrics: MetricsSettings = MetricsSettings()
    """What is measured while a run goes on."""
    trackers: tuple[TrackerKind, ...] = ()
    """Where scalars go besides the run's own files: `csv`, `tensorboard`, `mlflow`, `wandb`,
    `prometheus`."""
    snapshots: SnapshotSettings = SnapshotSettings()
    """What is kept of a run, and what is done when a part of it is lost."""
    compare: CompareSettings = CompareSettings()
    """What `hamdist compare` runs beside centralised backpropagation."""
    levels: dict[Level, LevelOverrides] = {}
    """What applies to a level only: sections `partition`, `locality`, `dynamics`, `learning`, laid
    over the others."""

    @property
    def level_name(self) -> str:
        """Return the name of the level, or that of one's own."""
        return (self.locality.level or self.level.value).rpartition("/")[2]

    @property
    def model_loss(self) -> str | None:
        """Return the name of the output that is the model's own loss, if that is learned."""
        if not isinstance(self.loss, dict):
            return MODEL_LOSS if self.loss is Loss.MODEL else None
        return next((name for name, loss in self.loss.items() if loss is Loss.MODEL), None)

    @field_validator("dtype", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        """Accept a torch.dtype, too."""
        return str(value).rpartition(".")[2] if type(value).__name__ == "dtype" else value

    @model_validator(mode="after")
    def _levels_are_settings(self) -> Settings:
        for level in self.levels:
            self.for_level(level)
        return self

    def for_level(self, level: Level) -> Settings:
        """Return these settings at a level, merged with the overrides of `levels` for it.

        Args:
            level: the level.

        Raises:
            ValueError: the overrides do not fit these settings.
        """
        raw = self.model_dump(mode="json", exclude={"levels"}, exclude_unset=True)
        overrides = self.levels.get(level, LevelOverrides()).model_dump(exclude_unset=True)
        try:
            merged = Settings.model_validate(merge(raw, {**overrides, "level": level.value}))
        except ValidationError as error:
            raise ValueError(f"in 'levels.{level.value}': {describe(error)}") from None
        others = {at: of_level for at, of_level in self.levels.items() if at is not Level.AUTO}
        if level is Level.AUTO and others:  # which level's overrides hold shows later
            return merged.model_copy(update={"levels": others})
        return merged

    def changed(self, **fields: Any) -> Settings:
        """Return these settings with other values, which are not checked.

        Args:
            **fields: by name; of a section those of its fields that change, as a mapping.
        """
        update = dict(fields)
        for name, value in fields.items():
            if isinstance(section := getattr(self, name), Section) and isinstance(value, Mapping):
                update[name] = section.model_copy(update=value)
        return self.model_copy(update=update)


def settings_with(settings: Settings | None, fields: Mapping[str, Any]) -> Settings:
    """Return `settings` (None: the defaults) with `fields` laid over them. Raises SettingsError."""
    base = {} if settings is None else settings.model_dump(mode="json", exclude_unset=True)
    try:
        return Settings.model_validate(lay_over(base, fields))
    except ValidationError as error:
        raise SettingsError(describe(error)) from None


Values = Mapping[str, Any]


class RunFields(TypedDict, total=False):
    """Keywords of `train` and `compare`: fields of `Settings` that are no arguments of theirs."""

    name: str
    seed: int
    dtype: Any
    steps: int | None
    level: Any
    ignore_index: int
    partition: Values | Callable[..., Any]
    locality: Values
    dynamics: Values
    learning: Values
    engine: Values
    metrics: Values
    snapshots: Values


class SettingsFields(RunFields, total=False):
    """Keywords of `train`: all fields of `Settings` that are no arguments of its own."""

    compare: Values
    levels: Values
