"""The events of a run: what happens, as it happens, the same from both engines.

An engine reports `Progress` one to four times a second; `ProgressEvents` (run_events.py) turns
each report into the events that are new in it. An event is a dataclass here, and a line of JSON in
`events.jsonl`: `time`, `event` (its name), `level` and `seed` of the run, and its own fields (docs:
reference/events). Trackers, the live page and `hamdist explain` read these, and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time as clock
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from pydantic import TypeAdapter, ValidationError

from hamdist.display.network import PlacedNetwork
from hamdist.runtime.results.measured import EdgeCounts, Histogram, Norms, Replaced

if TYPE_CHECKING:  # (a command's folder is there before torch is imported)
    from hamdist.config import Settings
    from hamdist.dynamics.objective.prequential import Window
    from hamdist.runtime.results.result import RunFacts
    from hamdist.runtime.results.scores import Scores


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """Anything that happens in a run; a subclass has the `name` of its lines.

    Attributes:
        time: seconds since 1970.
        level, seed: of the run; None for what concerns a whole folder of runs.
    """

    name: ClassVar[str]
    by_name: ClassVar[dict[str, type[RunEvent]]] = {}
    time: float = field(default_factory=lambda: round(clock.time(), 3))
    level: str | None = None
    seed: int | None = None

    def __init_subclass__(cls, name: str) -> None:
        cls.name = name
        cls.by_name[name] = cls

    def as_json(self) -> dict[str, Any]:
        """Return the event as plain values, null for numbers that are not finite."""
        values = plain(self)
        head = {"time": values.pop("time"), "event": self.name}
        return head | {
            k: v for k, v in values.items() if v is not None or k not in ("level", "seed")
        }

    def to_line(self) -> str:
        """Return the event as a line of JSON, without its end."""
        return json.dumps(self.as_json(), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class FolderStarted(RunEvent, name="started"):
    """A process has claimed the folder (`goes_on`: of an unfinished comparison)."""

    key: str | None = None
    process: int
    goes_on: bool = False
    controls: bool = False
    """Whether it looks for requests (`control.jsonl`)."""


@dataclass(frozen=True, kw_only=True)
class RunBegun(RunEvent, name="run"):
    """A run begins. `settings`: those that are set; `batch`: rows of a sample."""

    title: str
    engine: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = None
    steps: int | None = None

    @classmethod
    def of(cls, settings: Settings, title: str, batch: int | None = None) -> RunBegun:
        """Return the event of a run of `settings`."""
        raw = settings.model_dump(mode="json", exclude_unset=True)
        engine, level = settings.engine.kind.value, settings.level_name
        head: dict[str, Any] = {"level": level, "seed": settings.seed, "steps": settings.steps}
        return cls(title=title, engine=engine, settings=raw, batch=batch, **head)


@dataclass(frozen=True, kw_only=True)
class PhaseBegun(RunEvent, name="phase"):
    """A phase of the start begins (process/startup.py)."""

    phase: str


@dataclass(frozen=True, kw_only=True)
class NetworkPlaced(RunEvent, PlacedNetwork, name="network"):
    """The graph of blocks and their places, before the first tick, and when a place changes."""


@dataclass(frozen=True, kw_only=True)
class WindowFull(RunEvent, name="window"):
    """A prequential window of a readout is full; `seconds`: since the first tick."""

    readout: str
    first: int
    last: int
    samples: int
    loss: float
    """Mean over the window's samples."""
    accuracy: float | None
    correct: int
    rows: int
    seconds: float

    @classmethod
    def of(cls, window: Window, readout: str, seconds: float, **head: Any) -> WindowFull:
        """Return the event of a full `window`, `seconds` after the first tick."""
        sums: dict[str, Any] = {
            n: getattr(window, n) for n in ("first", "last", "samples", "correct", "rows")
        }
        sums |= {"loss": window.mean_loss, "accuracy": window.accuracy}
        return cls(readout=readout, seconds=seconds, **sums, **head)


@dataclass(frozen=True, kw_only=True)
class RunProgressed(RunEvent, name="progress"):
    """Progress of the run. `samples` include `resumed`, those of an earlier run."""

    samples: int
    steps: int | None
    seconds: float
    tick: int
    resumed: int = 0
    note: str | None = None
    stream: Mapping[str, int] = field(default_factory=dict)
    """What the stream counts: samples dropped, waiting, targets too late."""


@dataclass(frozen=True, kw_only=True)
class BlocksMeasured(RunEvent, name="blocks"):
    """Ticks, updates and norms by block; `waiting`: the edge and signal a block waits for."""

    tick: Mapping[str, int]
    updates: Mapping[str, int]
    norms: Mapping[str, Norms]
    seconds: Mapping[str, float]
    """In the steps of the block, since its process began."""
    waiting: Mapping[str, str]
    staleness: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """How many samples came back to a block after so many updates, since its process began."""
    histograms: Mapping[str, Mapping[str, Histogram]] = field(default_factory=dict)
    """By block of `theta`, `omega`, `h`, `z`, with `metrics.histograms`."""


@dataclass(frozen=True, kw_only=True)
class UpdatesAligned(RunEvent, name="alignment"):
    """With `metrics.alignment`: the fields are those of `measured.Alignment`."""

    sample: int
    cosines: Mapping[str, float]
    feedback: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ActorsMeasured(RunEvent, name="actors"):
    """By process: seconds since its start (`RunFacts.time_use`), and resident bytes."""

    seconds: Mapping[str, Mapping[str, float]]
    memory: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class EdgesMeasured(RunEvent, name="edges"):
    """By edge: bytes sent so far, signals under way, and seconds of waiting so far."""

    edges: Mapping[str, EdgeCounts]


@dataclass(frozen=True, kw_only=True)
class SnapshotComplete(RunEvent, name="snapshot"):
    """A snapshot is complete: its `path`."""

    path: str


@dataclass(frozen=True, kw_only=True)
class ActorReplaced(RunEvent, Replaced, name="replaced"):
    """An actor was lost and replaced."""


@dataclass(frozen=True, kw_only=True)
class SettingsChanged(RunEvent, name="settings"):
    """Settings were changed in the run: new values by dotted name, from `tick` or `sample` on."""

    changed: Mapping[str, Any]
    tick: int | None = None
    sample: int | None = None


@dataclass(frozen=True, kw_only=True)
class Warned(RunEvent, name="warning"):
    """A warning of the run."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Evaluated(RunEvent, name="evaluation"):
    """Scores on held-out data after `samples`; `outputs`: by output, where there are several."""

    samples: int
    loss: float
    accuracy: float | None
    outputs: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Scores, samples: int, **head: Any) -> Evaluated:
        """Return the event of `scores` after `samples`."""
        each = {n: {"loss": o.loss, "accuracy": o.accuracy} for n, o in scores.outputs.items()}
        values: dict[str, Any] = {"loss": scores.loss, "accuracy": scores.accuracy}
        return cls(samples=samples, outputs=each, **values, **head)


@dataclass(frozen=True, kw_only=True)
class RunFinished(RunEvent, name="finished"):
    """A run has ended; the fields are those of `RunFacts`."""

    samples: int
    seconds: float
    resumed: int = 0
    stopped: bool = False
    interrupted: bool = False
    failure: str | None = None
    startup: Mapping[str, float] = field(default_factory=dict)
    time_use: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    bytes_per_edge: Mapping[str, int] = field(default_factory=dict)
    peak_memory: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: RunFacts, failure: str | None, **head: Any) -> RunFinished:
        """Return the event of a run's end with these facts."""
        names = {f.name for f in dataclasses.fields(cls)} - {"time", "level", "seed", "failure"}
        return cls(**{name: getattr(facts, name) for name in names}, failure=failure, **head)


@dataclass(frozen=True, kw_only=True)
class FolderEnded(RunEvent, name="ended"):
    """The process releases the folder; `error`: why, if an error ended it."""

    error: str | None = None


EventListener: TypeAlias = Callable[[RunEvent], object]


def from_values(values: Mapping[str, Any]) -> RunEvent | None:
    """Return the event that `as_json` gave; None for one that this version does not know."""
    cls = RunEvent.by_name.get(str(values.get("event")))
    if cls is None:
        return None
    try:
        event: RunEvent = _adapter(cls.name).validate_python(values)
    except ValidationError:
        return None
    return event


def read_events(lines: Iterable[str]) -> Iterator[RunEvent]:
    """Yield the events of lines of JSON; a line that is cut off or unknown is passed over."""
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        event = from_values(values) if isinstance(values, dict) else None
        if event is not None:
            yield event


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(RunEvent.by_name[name])


def plain(value: Any) -> Any:
    """Return `value` as JSON holds it: null for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "_asdict"):  # a NamedTuple
        return plain(value._asdict())
    if dataclasses.is_dataclass(value):
        return {part.name: plain(getattr(value, part.name)) for part in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value
