"""The result of a run, whichever engine ran it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, TypeAdapter
from torch import Tensor, nn

from hamdist.config import Settings
from hamdist.display.figure import draw_figure
from hamdist.display.network import PlacedNetwork
from hamdist.display.table import Table, frame, html_table
from hamdist.display.windows import columns, windows_figure
from hamdist.dynamics.blocks.energy import Records
from hamdist.dynamics.objective.prequential import Window
from hamdist.dynamics.saved_state.block_memory import BlockMemory
from hamdist.dynamics.vjp.autocast import Rounding
from hamdist.runtime.results.digests import DigestMap
from hamdist.runtime.results.measured import Alignment, ProcessSample, Replaced, TraceSpan
from hamdist.runtime.signals.codec import Compressed


@dataclass(frozen=True, slots=True, repr=False)
class BlockState:
    """The state of a block at the end of a run (detached copies).

    Attributes:
        theta: weights by the parameter's name in the block's module.
        omega: weight costates by the same names.
        average: the moving average of the weights by name, where there is one.
        buffers: the module's buffers by name, and its extra state.
        h: the state (of micro-batches: the last one's); None where a block has none.
        z: its costate, likewise.
        rounding: the error of autocast, where it is on.
        updates: how often the weights moved.
        stored: the most tokens whose activations it kept at once (presentation 'sequence').
    """

    theta: Mapping[str, Tensor]
    omega: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    h: Tensor | None
    z: Tensor | None
    updates: int
    stored: int = 0
    rounding: Rounding | None = None
    average: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in self.theta.items())
        return f"BlockState(theta: {shapes or 'none'}; {self.updates} updates)"


@dataclass(frozen=True, slots=True)
class BlockProgress:
    """Progress of a block, for the live display: next tick, updates, the edge it waits for."""

    block: str
    tick: int
    updates: int
    waiting: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a running engine.

    Attributes:
        samples: samples that entered the network; resumed: those of them before the snapshot that
            the run resumes from.
        phase: of the start (process/startup.py); None from the first tick on.
        replaced: actors that were lost so far.
        windows: of the first readout, called `readout`; others: those of the other readouts.
        actors: what each process has measured of itself; network: the blocks and their places.
        snapshots: the complete ones that are left; warnings: of the engine so far.
        over: the run has ended; rows: of the samples, 0 where they are not counted.
    """

    seconds: float
    samples: int
    steps: int | None
    windows: Sequence[Window]
    blocks: Sequence[BlockProgress]
    note: str | None = None
    phase: str | None = None
    replaced: Sequence[Replaced] = field(default_factory=list)
    resumed: int = 0
    readout: str = ""
    others: Mapping[str, Sequence[Window]] = field(default_factory=dict)
    actors: Mapping[str, ProcessSample] = field(default_factory=dict)
    network: PlacedNetwork | None = None
    alignment: Alignment | None = None
    snapshots: Sequence[str] = field(default_factory=list)
    warnings: Sequence[str] = field(default_factory=list)
    over: bool = False
    rows: int = 0


@dataclass(frozen=True, slots=True)
class WeightLag:
    """Age of the weights that a block reads of another one.

    They lack the steps of so many `samples` before the one that passes, which came in so many
    `ticks`. 0: none, as in one block that keeps one sample in the network at a time.
    """

    samples: int
    ticks: int


Facts = TypeVar("Facts", bound="RunFacts")
APART = {"apart": True}  # metadata of a field that JSON does not hold


@dataclass(slots=True, kw_only=True)
class RunFacts:
    """The facts of a run, from the engine to the files: every layer adds its own fields.

    Attributes:
        samples: samples that entered; resumed: those of them before the snapshot that the run
            resumed from; rows: of all of them.
        seconds: wall time from the first to the last tick, without that of the resumed samples;
            startup_seconds: the time before, startup: the same by phase (process/startup.py).
        predicted: samples a second by the timing model (runtime/timing), from the steps as measured
            before the start; 0 where there is no prediction.
        bytes_per_edge: payload bytes that crossed each edge in both directions, by edge.
        compression: by edge and direction ('h' forward, 'm' backward), of the compressed ones,
            bytes sent and saved, and the error of the decoded signals.
        rounding: by block under autocast, the distance of its results from float32.
        peak_memory: peak resident bytes by process ('driver', 'actor 0', ...).
        own_memory: at the end, without the code of libraries and Ray's object store.
        block_memory: by block, bytes of its own tensors.
        staleness: the most samples that lie between the activations a block's message was made with
            and the weights or activations that it meets.
        delays: ticks by edge between blocks; can be given as `partition.delays`.
        weight_lags: by 'owner<->user', of weights that two blocks use, the age of those that the
            user reads.
        stream: counts of the stream (samples dropped, say), where it counts.
        stored: the most tokens whose activations a block kept at once, at level 'bptt'.
        interrupted: Ctrl-C or SIGTERM ended the run (signals: their numbers, in order); stopped:
            its `on_progress` or a callback did.
        snapshots: the complete ones that are left, the latest last.
        replaced: actors that were lost.
        chosen: the settings that ran, of level 'auto'; why: the reasons.
        placement: the blocks of each process; can be given as `engine.placement`.
        time_use: by process (of one that replaces another, since it began), seconds of the whole
            run ('total'), of processors on all its threads ('cpu'), in the steps of its blocks
            ('step'), and over sockets in packing ('packing') and blocked ('waiting').
        trace: with `metrics.trace`, spans by process (`results.trace.chrome_trace` for Perfetto).
        digests: with `engine.digests`, of the signals that were 'sent' and 'taken' by channel
            ('state u->block0'), and of the 'weights' by block; `hamdist diff` compares two runs.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        arbitrary_types_allowed=True, ser_json_inf_nan="constants"
    )

    samples: int
    ticks: int
    seconds: float
    bytes_per_edge: dict[str, int]
    peak_memory: dict[str, int]
    startup_seconds: float = 0.0
    predicted: float = 0.0
    rows: int = 0
    staleness: int = 0
    resumed: int = 0
    smoothness: float | None = None
    delays: dict[str, int] = field(default_factory=dict)
    weight_lags: dict[str, WeightLag] = field(default_factory=dict)
    stream: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    own_memory: dict[str, int] = field(default_factory=dict)
    block_memory: dict[str, BlockMemory] = field(default_factory=dict)
    snapshots: list[str] = field(default_factory=list)
    replaced: list[Replaced] = field(default_factory=list)
    chosen: Settings | None = None
    why: list[str] = field(default_factory=list)
    interrupted: bool = False
    stopped: bool = False
    warnings: list[str] = field(default_factory=list)
    startup: dict[str, float] = field(default_factory=dict)
    placement: list[list[str]] = field(default_factory=list)
    time_use: dict[str, dict[str, float]] = field(default_factory=dict)
    compression: dict[str, dict[str, Compressed]] = field(default_factory=dict)
    rounding: dict[str, Rounding] = field(default_factory=dict)
    digests: dict[str, DigestMap] = field(default_factory=dict, metadata=APART)
    trace: dict[str, list[TraceSpan]] = field(default_factory=dict, metadata=APART)
    signals: list[int] = field(default_factory=list, metadata=APART)

    @property
    def new_samples(self) -> int:
        """Return the number of samples that entered since the resume, in `seconds`."""
        return self.samples - self.resumed

    def shared(self) -> dict[str, Any]:
        """Return the fields that every layer has, by name."""
        return {field.name: getattr(self, field.name) for field in fields(RunFacts)}

    def as_json(self) -> dict[str, Any]:
        """Return the facts as plain values, without tensors and modules; inf and nan stay."""
        apart = {field.name for field in fields(self) if field.metadata == APART}
        values: dict[str, Any] = TypeAdapter(type(self)).dump_python(
            self, mode="json", exclude=apart, warnings=False
        )
        return values

    @classmethod
    def from_json(cls: type[Facts], values: object) -> Facts:
        """Restore facts from the values of `as_json`. Raises ValueError for others."""
        return TypeAdapter(cls).validate_python(values)


@dataclass(slots=True, kw_only=True, repr=False)
class RunResult(RunFacts):
    """A finished (or interrupted) run; its text is a short report, which a notebook shows.

    The other fields are those of RunFacts.

    Attributes:
        model: a plain module with the learned weights, or their averages where `learning.average`
            asks for them.
        plain: then the same with the weights as they were in the end.
        windows: prequential metrics in order, per readout.
        records: the energies per tick by block, where `metrics.record` asked for them.
    """

    model: nn.Module
    blocks: dict[str, BlockState]
    windows: dict[str, list[Window]]
    records: dict[str, Records] = field(default_factory=dict)
    plain: nn.Module | None = None

    def __repr__(self) -> str:
        facts = [f"{self.new_samples:,} samples in {self.seconds:.3g} s"]
        facts += [f"gone on from sample {self.resumed:,}"] if self.resumed else []
        facts += ["interrupted"] if self.interrupted else []
        facts += ["stopped"] if self.stopped else []
        for readout, windows in self.windows.items():
            if windows:
                facts.append(f"{readout}: {_last(windows[-1])}")
        facts += [f"warning: {text}" for text in self.warnings]
        return f"RunResult({'; '.join(facts)})"

    @property
    def metrics(self) -> Any:
        """Return all windows by column: `readout` and those of `display.windows.columns`.

        A pandas DataFrame if pandas is installed, else a dict of lists.
        """
        rows = [({"readout": name}, w) for name, windows in self.windows.items() for w in windows]
        return frame(columns(rows))

    def plot(self, ax: Any = None) -> Any:
        """Return the prequential accuracy (or loss) as an `SvgPicture`.

        Args:
            ax: axes of matplotlib's, on which it is drawn instead; they are returned.
        """
        return draw_figure(windows_figure("", self.windows), ax)

    def _repr_html_(self) -> str:
        lines = [[part] for part in repr(self).removeprefix("RunResult(")[:-1].split("; ")]
        picture: str = self.plot().svg
        return html_table(Table(["run"], lines)) + picture


def _last(window: Window) -> str:
    right = "" if window.accuracy is None else f", {100 * window.accuracy:.1f} % right"
    return f"loss {window.mean_loss:.4g}{right} over samples {window.first} to {window.last}"


@dataclass(slots=True, kw_only=True)
class Outcome(RunFacts):
    """The result of an engine. The other fields are those of RunResult.

    Attributes:
        blocks: final states by name (without those that were lost, after an interruption).
        startup: seconds by phase, as far as the engine times them.
        delays: the chosen ones, where they were to be chosen.
        error: the exception of `on_progress` that ended the run.
    """

    blocks: dict[str, BlockState]
    windows: dict[str, list[Window]]
    records: dict[str, Records] = field(default_factory=dict)
    error: Exception | None = None
