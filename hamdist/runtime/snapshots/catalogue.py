"""The snapshots of a whole run, complete when every node's file is there; its fingerprint."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from hamdist.config import Compress, EngineSettings, Settings, StepKind
from hamdist.dynamics.graph.graph import INPUT
from hamdist.errors import HamdistWarning, SnapshotError
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.process.arithmetic import Arithmetic
from hamdist.runtime.snapshots.process_snapshots import WrittenFiles
from hamdist.runtime.storage.snapshot_files import (
    FORMAT,
    Manifest,
    Snapshot,
    conclude,
    folder_of,
    remove_unfinished,
    versions,
)
from hamdist.runtime.storage.store import now, storage


class SnapshotCatalogue:
    """The snapshots of one run.

    Attributes:
        latest: the latest complete snapshot: taken by this run, or the one it began with.
        arithmetic: of all kinds of processes that the run has had; without any, of this one.
    """

    def __init__(self, plan: Plan, arithmetic: Sequence[Arithmetic] = ()) -> None:
        if plan.snapshot_policy is None:
            raise SnapshotError("the run takes no snapshots")
        self._policy = plan.snapshot_policy
        self._store = storage(plan.snapshot_policy.path)
        self._nodes = {INPUT, *plan.graph.blocks}
        self._network = fingerprint(plan, Settings.model_validate(plan.snapshot_policy.settings))
        self._delays = {e.name: e.delay for e in plan.graph.edges if not e.from_input}
        self._run = f"{plan.run:016x}"
        self._partial: dict[
            int, list[WrittenFiles]
        ] = {}  # by tick, of snapshots that are not complete
        self._skip = plan.skip
        self._arithmetic = arithmetic or [plan.arithmetic]
        self._switches = plan.switches
        self.latest: Snapshot | None = plan.snapshot_policy.snapshot
        self._complete: list[Snapshot] = []
        self._resumed = self.latest  # what the run began with
        self._damaged: set[str] = set()  # folders of snapshots that the run went back behind

    @property
    def snapshots(self) -> list[str]:
        """Return the snapshots that this run took and still has, the latest last."""
        with suppress(SnapshotError):  # (where they cannot be listed they may be there)
            there = set(self._store.folders())
            self._complete = [snapshot for snapshot in self._complete if snapshot.folder in there]
        return [str(snapshot) for snapshot in self._complete]

    def forget_tries(self, before: int) -> None:
        """Remove the files of unfinished snapshots of ticks before `before`."""
        self._partial = {tick: parts for tick, parts in self._partial.items() if tick >= before}
        with suppress(SnapshotError):
            remove_unfinished(self._store, before)

    def go_back(self, nodes: Collection[str]) -> list[str]:
        """Return to the latest snapshot whose files are undamaged, or to the beginning.

        Args:
            nodes: whose files are needed of the latest one; of earlier ones all are.

        Returns:
            The damage of each snapshot that was given up, naming the file; empty: the latest is
            whole.

        Raises:
            SnapshotError: even the one that the run began with is damaged.
        """
        faults: list[str] = []
        while self.latest is not None:
            try:
                self.latest.check(None if faults else nodes)
                break
            except SnapshotError as error:
                faults.append(str(error))
            if self.latest is self._resumed:
                raise SnapshotError(
                    f"{'; '.join(faults)}; the run began with that one and has no other: go on "
                    f"from one before it, if there is one (--resume {self.latest.where})"
                )
            self._damaged.add(self.latest.folder)  # (it may be whole again: nothing is removed now)
            self._partial.clear()
            self._complete = [
                snapshot for snapshot in self._complete if snapshot.tick < self.latest.tick
            ]
            self.latest = self._complete[-1] if self._complete else self._resumed
        return faults

    def put(self, files: WrittenFiles) -> Snapshot | None:
        """Note the files of one process; return the snapshot, if they complete it."""
        if self.latest is not None and files.tick <= self.latest.tick:
            return None
        written_files = self._partial.setdefault(files.tick, [])
        written_files.append(files)
        parts = {name: part for written in written_files for name, part in written.parts.items()}
        if set(parts) != self._nodes:
            return None
        manifest = Manifest(
            format=FORMAT,
            tick=files.tick,
            run=self._run,
            parts=parts,
            settings=dict(self._policy.settings),
            network=self._network,
            delays=self._delays,
            versions=versions(),
            arithmetic=list(self._arithmetic),
            switches=dict(self._switches),
            samples=max(written.samples for written in written_files) + self._skip,
            passed=max(written.passed for written in written_files),
            skip=self._skip,
            time=now(),
            stream=dict(self._policy.stream),
        )
        self._damaged.discard(folder_of(files.tick))
        self.latest = conclude(self._store, manifest, self._policy.section.keep, self._damaged)
        self._complete = [*self._complete, self.latest][-self._policy.section.keep :]
        self._partial = {
            tick: written for tick, written in self._partial.items() if tick > files.tick
        }
        return self.latest


class SnapshotFailures:
    """Snapshots that could not be written: the first failure warns, all are counted."""

    def __init__(self) -> None:
        self._first = self._latest = ""
        self._count = 0

    def add(self, reason: str) -> None:
        """Count a failure, and warn of the first one at once."""
        self._count += 1
        self._latest = reason
        if self._count == 1:
            self._first = reason
            warnings.warn(self.texts()[0], HamdistWarning, stacklevel=2)

    def texts(self) -> list[str]:
        """Return the warning at the end of the run, if there was a failure: one text, or none."""
        if not self._count:
            return []
        text = f"a snapshot was not written: {self._first}"
        more = f" ({self._count} were not, the last of them: {self._latest})"
        return [text if self._count == 1 else text + more]


_ALIKE = ("level", "locality", "loss", "dtype", "seed", "metrics")


def fingerprint(plan: Plan, settings: Settings) -> dict[str, Any]:
    """Return everything that two runs have in common if one can continue from the other's state.

    Left out are numbers that may change on the way, where blocks live, and how signals travel.
    """
    engine = plan.engine.model_dump(mode="json")
    dumped = settings.model_dump(mode="json")
    blocks = {
        name: {
            "parents": list(block.parents),
            "parameters": {k: list(p.shape) for k, p in block.module.named_parameters()},
            "shape": list(plan.shapes[name][0]),
            **({} if block.rule is None else {"rule": type(block.rule).__name__}),
            **({} if plan.optimizer is None else {"optimizer": plan.optimizer.kinds.get(name)}),
        }
        for name, block in plan.graph.blocks.items()
    }
    kinds = {
        n: {"dtype": b["dtype"], "autocast": b["autocast"]} for n, b in engine["blocks"].items()
    }
    return {
        "blocks": blocks,
        "edges": {e.name: e.delay for e in plan.graph.edges},
        "channels": [c.key for c in plan.channels.all()],
        "c": plan.schedule.c,
        **{name: dumped[name] for name in _ALIKE},
        "compress": [engine["compress"], engine["feedback"], *_share(plan.engine)],
        "native": plan.native,
        "closed": plan.engine.step is not StepKind.AUTOGRAD,
        "computes": kinds,
        "code": {} if plan.snapshot_policy is None else dict(plan.snapshot_policy.code),
        "round": getattr(plan.schedule, "own_round", {}),
    }


def _share(engine: EngineSettings) -> list[float]:
    """Return `engine.topk_share` where a codec uses it."""
    words = engine.compress.values() if isinstance(engine.compress, dict) else [engine.compress]
    return [engine.topk_share] if Compress.TOPK in words else []
