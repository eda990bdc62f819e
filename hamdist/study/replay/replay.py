"""Replays of a run in one process: one block at one tick; the first tick at which two runs part.

A run is a function of its settings, so what is recorded of it are its settings, its snapshots and,
with `engine.digests`, digests of its signals. A replay begins at the latest snapshot before the
ticks that are asked for and steps the whole network up to there; every mark of the run's digests on
the way says whether it is the same run, to the bit.

Two runs part within a window between two marks of their digests (report/digests_diff.py). One
replay of either through that window names the first signal that differs, where bisection would take
log2 of its ticks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from torch import Tensor

from hamdist.config import EngineKind, Settings, read_settings
from hamdist.errors import SettingsError
from hamdist.runtime.engines.inprocess import InProcessEngine
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.portable import pin
from hamdist.runtime.results.digests import DigestMap, Digests, on_top
from hamdist.runtime.results.result import BlockState
from hamdist.runtime.signals.signal import Channel, Signal
from hamdist.runtime.storage.snapshot_files import Snapshot, latest, latest_complete
from hamdist.runtime.storage.store import storage
from hamdist.streams.sample import Stream
from hamdist.study.report.digests_diff import Parting, RunDigests, compared, read_digests
from hamdist.study.run.export import starting_plan
from hamdist.study.run.own_data import NO_FUNCTIONS, OwnFunctions

SETTINGS, DIGESTS = "settings.yaml", "digests.json"


class Reached(Exception):
    """Raised by a replay behind its last tick."""


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run that can be replayed.

    Attributes:
        folder: of `--out`.
        settings: for one process, without snapshots of its own.
        snapshots: where the run's snapshots lie, if it took any.
        digests: that the run recorded; empty without `engine.digests`.
        own: of `--model` and `--stream`.
        resumed: samples of the run that it has gone on from.
    """

    folder: Path
    settings: Settings
    snapshots: str | None
    digests: RunDigests
    own: OwnFunctions = NO_FUNCTIONS
    resumed: int = 0

    def latest_before(self, tick: float, without: int | None = None) -> Snapshot | None:
        """Return the latest snapshot at or before a tick; None: only the beginning is.

        without: the number of a sample that has not entered then.
        """
        if self.snapshots is None:
            return None
        store = storage(self.snapshots)
        folder = latest_complete(store, tick)
        snapshot = None if folder is None else latest(f"{store.where}/{folder}", lambda _: None)
        if snapshot is None or without is None or snapshot.manifest.samples <= without:
            return snapshot
        return self.latest_before(snapshot.tick - 1, without)


def recorded_run(folder: Path) -> RecordedRun:
    """Read the folder of a run; if its bits are portable, this process will compute such.

    Raises SettingsError if it is no such folder.
    """
    try:
        text = (folder / SETTINGS).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        raise SettingsError(
            f"{str(folder)!r}: no {SETTINGS} there; give the folder that a run's --out named"
        ) from None
    settings = read_settings(text, str(folder / SETTINGS))
    settings = settings.for_level(settings.level)
    pin(settings.engine)
    engine = {"kind": EngineKind.INPROCESS, "placement": None}
    alone = settings.changed(engine=engine, snapshots={"path": None})
    digests = read_digests(folder)[DIGESTS] if (folder / DIGESTS).exists() else {}
    return RecordedRun(folder, alone, settings.snapshots.path, digests, resumed=_resumed(folder))


def _resumed(folder: Path) -> int:
    """Return the samples of the run that a run has gone on from; 0 where no summary was written."""
    try:
        return int(json.loads((folder / "summary.json").read_text("utf-8"))["resumed"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@dataclass(frozen=True, slots=True)
class Sent:
    """A signal on its way out: the sender's tick and name, the channel, the signal's digest."""

    tick: int
    block: str
    channel: str
    digest: str


@dataclass
class Replay(Digests):
    """Observations of a replay.

    Attributes:
        run: that is replayed; began: the snapshot that it began at; None: the beginning.
        last: the tick behind which it ends.
        first: the tick behind which `course` begins; block: whose signals are kept.
        course: signals in the order in which they were sent.
        signals: that the block took and sent at `last`, by channel ('taken state b0->b1').
        state: of the block behind `last`; None: it did nothing at that tick.
        latest: the latest tick before at which the block did something.
        met: marks of the run's digests that were met; missed: the first that was not.
        record: of all signals that the block takes, by channel; None: it is not kept.
    """

    run: RecordedRun
    began: Snapshot | None
    last: float
    first: float = inf
    block: str | None = None
    course: list[Sent] = field(default_factory=list)
    signals: dict[str, Signal] = field(default_factory=dict)
    state: BlockState | None = None
    latest: int | None = None
    met: int = 0
    missed: Sent | None = None
    record: dict[str, list[Signal]] | None = None

    def __post_init__(self) -> None:
        super().__init__(int(self.run.settings.engine.digests))
        marks = self.run.digests.get("sent", {})
        self._marks = {key: dict(track.marks) for key, track in marks.items()}
        self._now: dict[str, Signal] = {}

    def post(self, channel: Channel, signal: Signal) -> None:
        """Compare a signal on its way out with the run's, and keep it if it is asked for."""
        super().post(channel, signal)
        tick = signal.stamp.tick
        mark = self._marks.get(channel.key, {}).get(tick)
        if mark == self.sent[channel.key].last:
            self.met += 1
        elif mark is not None and self.missed is None:
            self.missed = Sent(tick, channel.sender, channel.key, mark)
        if tick > self.first:
            self.course.append(Sent(tick, channel.sender, channel.key, on_top("", signal)))
        if channel.sender == self.block:
            self._now[f"sent {channel.key}"] = signal

    def take(self, channel: Channel, signal: Signal) -> None:
        """Keep a signal that the block takes."""
        super().take(channel, signal)
        if channel.receiver == self.block:
            self._now[f"taken {channel.key}"] = signal
            if self.record is not None:
                self.record.setdefault(channel.key, []).append(signal)

    def after_step(self, node: Any, tick: int) -> None:
        """End the replay behind its last tick."""
        super().after_step(node, tick)
        if tick > self.last:
            raise Reached
        if node.name == self.block:
            self.latest = tick
            if tick == self.last:
                self.signals |= self._now
                self.state = node.state()
            self._now = {}

    def load_state_dict(self, state: Mapping[str, DigestMap] | None) -> None:
        """Continue from the digests of a snapshot, if it has some."""
        if state is not None:
            super().load_state_dict(state)

    @property
    def fault(self) -> str | None:
        """Return why the replay is not the run, to the bit; None: it is, as far as is known."""
        miss, began = self.missed, 0 if self.began is None else self.began.manifest.samples
        if miss is None:
            return None
        before = (
            f"the run had gone on from sample {self.run.resumed} of another, whose settings may "
            "have been others, and no snapshot from there up to that tick is left "
            "(snapshots.keep); or "
        )
        return (
            f"{str(self.run.folder)!r}: its replay is not the run: at tick {miss.tick} block "
            f"{miss.block!r} sent other bits ({miss.channel}); "
            f"{before if began < self.run.resumed else ''}another model or stream (--model, "
            "--stream), other software or another processor, or the run's memory or network failed"
        )


def from_snapshot(
    run: RecordedRun, snapshot: Snapshot | None, last: float, first: float, block: str | None
) -> tuple[Plan, Stream, Replay]:
    """Return the plan and the stream of a replay that begins at a snapshot, and its watch."""
    if snapshot is not None and not snapshot.digests:
        run = dataclasses.replace(run, digests={})  # (the digests would begin in its midst)
    plan, stream = starting_plan(run.settings, run.own, snapshot)
    if block is not None and block not in plan.graph.blocks:
        blocks = ", ".join(plan.graph.blocks)
        raise SettingsError(f"--block {block!r}: no block of the run; there are {blocks}")
    return plan, stream, Replay(run, snapshot, last, first if block is None else inf, block)


def replay(
    run: RecordedRun, first: float, last: float, block: str | None = None, *, records: bool = False
) -> Replay:
    """Replay a run from the latest snapshot up to tick `first`, until behind tick `last`.

    Signals behind `first` are kept as digests; of `block` those of tick `last`, and with `records`
    all that it takes.
    """
    snapshot = run.latest_before(min(first + 1, last))
    plan, stream, seen = from_snapshot(run, snapshot, last, first, block)
    seen.record = {} if records else None
    with suppress(Reached):
        InProcessEngine(seen).run(plan, stream)
    return seen


def rewind(run: RecordedRun, block: str, tick: int, *, records: bool = False) -> Replay:
    """Return what a block did at a tick; with `records`, and all that it took since the snapshot.

    Raises SettingsError if it did nothing then, or if the replay does not meet the run's digests.
    """
    return replay_at(replay(run, tick - 1, tick, block, records=records), tick)


def replay_at(seen: Replay, tick: int) -> Replay:
    """Return a replay that has met the run, and its block at a tick; raise as `rewind`."""
    if seen.fault is not None:
        raise SettingsError(seen.fault)
    if seen.state is None:
        before = "" if seen.latest is None else f"; the latest tick before is {seen.latest}"
        raise SettingsError(f"--tick {tick}: block {seen.block!r} does nothing then{before}")
    return seen


def tensors_of(seen: Replay) -> dict[str, Tensor]:
    """Return the tensors of a rewind by name: its signals, and 'theta NAME' ... of its block."""
    named = {key: signal.payload for key, signal in seen.signals.items()}
    if seen.state is not None:
        named |= {f"theta {key}": tensor for key, tensor in seen.state.theta.items()}
        named |= {"h": seen.state.h, "z": seen.state.z}
    return {key: t.detach().clone().contiguous() for key, t in named.items() if t is not None}


@dataclass(frozen=True, slots=True)
class FirstParting:
    """The first signal that differs in two runs.

    Attributes:
        tick, block: that sent it; channel: on which it left.
        after: the tick up to which all signals are known to be equal; tick - 1 where the replays
            settle it, earlier where one of the runs differs from its own replay.
        replays: that it took.
        cause: why a run's replay is not the run; None where both are.
    """

    tick: int
    block: str
    channel: str
    after: int
    replays: int
    cause: str | None = None


def bisect(first: RecordedRun, second: RecordedRun) -> FirstParting | None:
    """Return the first signal that differs in two runs with digests; None if none does.

    Raises SettingsError where the runs have no digests in common.
    """
    (partings,) = compared(first.folder, second.folder).values()
    sent = [p for p in partings if p.kind == "sent"]
    if not sent:
        return _not_sent(partings)
    equal = min(-1 if p.equal is None else p.equal for p in sent)
    earliest = sent[0]
    last = inf if earliest.tick is None else earliest.tick
    replays = [replay(run, equal, last) for run in (first, second)]
    cause = next((seen.fault for seen in replays if seen.fault is not None), None)
    if cause is None:
        for step, other in zip(*(seen.course for seen in replays), strict=False):
            if step != other:
                return FirstParting(step.tick, step.block, step.channel, step.tick - 1, 2)
        cause = "the replays of both runs are equal: one of them differs from what it was set to do"
    kind, edge = earliest.name.split(" ", 1)
    block = edge.split("->")[-1 if kind in ("message", "gradient") else 0]
    tick = equal + 1 if earliest.tick is None else earliest.tick
    return FirstParting(tick, block, earliest.name, equal, 2, cause)


def _not_sent(partings: list[Parting]) -> FirstParting | None:
    """Return a parting of runs that have sent the same: their transport, or memory, differs."""
    if not partings:
        return None
    parting = partings[0]
    raise SettingsError(
        f"all signals of both runs left equal, but {parting}: a transport has changed a signal on "
        "its way, or memory has changed; nothing to replay"
    )
