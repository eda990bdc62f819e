"""The settings of a run: what the YAML files hold, checked by pydantic.

One file a section; `settings` has all of them in one. Every name of a level, a knob, a loss, an
engine or a transport is an enum. Shapes and the graph are checked later, by `dynamics`; what can be
checked without them is checked here.
"""

from hamdist.config.course import CourseSettings
from hamdist.config.dynamics import BlockDynamicsSettings, DynamicsSettings, Reset, ResetSettings
from hamdist.config.engine import (
    Balance,
    BlockDType,
    BlockEngineSettings,
    Compress,
    Encryption,
    EngineKind,
    EngineSettings,
    Feedback,
    Pin,
    Spread,
    Step,
    TransportKind,
)
from hamdist.config.laying import lay_over, merge
from hamdist.config.learning import (
    AdaptiveSettings,
    AverageSettings,
    BlockLearningSettings,
    Decay,
    FirstStep,
    HeadsSettings,
    InputRule,
    InputsSettings,
    LearningSettings,
)
from hamdist.config.levels import LevelOverrides
from hamdist.config.locality import (
    Compensation,
    Credit,
    Grouping,
    Level,
    LocalityOverrides,
    Memory,
    Moves,
    Order,
    Presentation,
    Readout,
    Speed,
    TargetOf,
    Update,
)
from hamdist.config.metrics import MetricsSettings, Record
from hamdist.config.model import ModelKind, ModelSettings
from hamdist.config.partition import CutBalance, PartitionSettings
from hamdist.config.plain import read_yaml
from hamdist.config.reading import checked, mapping, parse_override, read_settings, to_yaml
from hamdist.config.section import Above0, Positive, Rate, Section
from hamdist.config.settings import CompareSettings, DType, Loss, Settings
from hamdist.config.snapshots import SnapshotSettings
from hamdist.config.stream import (
    CanvasSettings,
    CharacterSettings,
    DriftSettings,
    Known,
    Late,
    Motion,
    PaceSettings,
    Part,
    SequenceSettings,
    SignalKind,
    SignalSettings,
    SmoothSettings,
    Source,
    StreamSettings,
    View,
)
from hamdist.config.wording import describe

__all__ = [
    "Above0",
    "AdaptiveSettings",
    "AverageSettings",
    "Balance",
    "BlockDType",
    "BlockDynamicsSettings",
    "BlockEngineSettings",
    "BlockLearningSettings",
    "CanvasSettings",
    "CharacterSettings",
    "CompareSettings",
    "Compensation",
    "Compress",
    "CourseSettings",
    "Credit",
    "CutBalance",
    "DType",
    "Decay",
    "DriftSettings",
    "DynamicsSettings",
    "Encryption",
    "EngineKind",
    "EngineSettings",
    "Feedback",
    "FirstStep",
    "Grouping",
    "HeadsSettings",
    "InputRule",
    "InputsSettings",
    "Known",
    "Late",
    "LearningSettings",
    "Level",
    "LevelOverrides",
    "LocalityOverrides",
    "Loss",
    "Memory",
    "MetricsSettings",
    "ModelKind",
    "ModelSettings",
    "Motion",
    "Moves",
    "Order",
    "PaceSettings",
    "Part",
    "PartitionSettings",
    "Pin",
    "Positive",
    "Presentation",
    "Rate",
    "Readout",
    "Record",
    "Reset",
    "ResetSettings",
    "Section",
    "SequenceSettings",
    "Settings",
    "SignalKind",
    "SignalSettings",
    "SmoothSettings",
    "SnapshotSettings",
    "Source",
    "Speed",
    "Spread",
    "Step",
    "StreamSettings",
    "TargetOf",
    "TransportKind",
    "Update",
    "View",
    "checked",
    "describe",
    "lay_over",
    "mapping",
    "merge",
    "parse_override",
    "read_settings",
    "read_yaml",
    "to_yaml",
]
