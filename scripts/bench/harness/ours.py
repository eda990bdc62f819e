"""hamdist itself: `hamdist.train` with the Ray engine, as a user calls it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from torch import nn

import hamdist
from hamdist.config import Settings
from hamdist.runtime.ray_engine.session import Session
from hamdist.runtime.results.result import RunResult
from harness.works import LR, Cycled, Work, pace

WARM_UP = 0.2
SHORT = 0.05  # seconds of a run that is not timed


@dataclass(frozen=True)
class Configuration:
    """blocks: of the network; None: one per layer. balance: what is even between the blocks.
    delay: ticks of an edge. microbatches: parts of a batch, at level `pipeline`; interleave: runs
    of blocks of each actor."""

    level: str = "trace"
    blocks: int | None = 2
    balance: str = "parameters"
    actors: int = 2
    transport: str = "auto"
    kind: str = "ray"
    delay: int = 1
    microbatches: int | None = None
    interleave: int = 1

    def settings(self, **more: Any) -> Settings:
        partition: dict[str, Any] = {"delay": self.delay}
        if self.blocks is not None:
            partition |= {"blocks": self.blocks, "balance": self.balance}
        engine: dict[str, Any] = {"kind": self.kind}
        if self.kind == "ray":
            engine |= {"actors": self.actors, "transport": self.transport}
            engine["interleave"] = self.interleave
        raw = {"level": self.level, "partition": partition, "engine": engine}
        if self.microbatches is not None:
            raw["locality"] = {"microbatches": self.microbatches}
        return Settings.model_validate({**raw, "learning": {"lr": LR}, **more})

    def __str__(self) -> str:
        blocks = "a block per layer"
        if self.blocks is not None:
            even = f" of equal {self.balance}" if self.blocks > 1 else ""
            blocks = f"{self.blocks} block{'s' if self.blocks > 1 else ''}{even}"
        if self.microbatches is not None:
            blocks += f", {self.microbatches} micro-batches"
        if self.interleave > 1:
            blocks += f", {self.interleave} runs of blocks an actor"
        if self.kind != "ray":
            return f"{self.level}, {blocks}, in-process"
        actors = f"{self.actors} actor{'s' if self.actors > 1 else ''}"
        return f"{self.level}, {blocks}, {actors}, {self.transport}"


class Ours:
    """One configuration on one work. The cuts and the placement that hamdist finds in the first
    run hold in the others, too.

    results: of its runs; told: what they warned of.
    """

    def __init__(self, work: Work, configuration: Configuration) -> None:
        self.work = work
        self.configuration = configuration
        self._model = work.model()  # training leaves it as it is
        self._settings = configuration.settings()
        self.results: list[RunResult] = []
        self.told: set[str] = set()

    def run(self, seconds: float) -> float:
        """Seconds a sample (with speed 1: a tick)."""
        stream = Cycled(self.work, seconds, max(0.1, seconds * WARM_UP))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # collected instead: RunResult has them, too
            result = hamdist.train(self._model, stream, self._settings)
        self.told |= set(result.warnings)
        if not self.results:
            self._settings = _as_in(result, self._settings)
        self.results.append(result)
        return pace(result.stream)

    def like(self, level: str) -> Ours:
        """Another level, cut and placed alike. This one has run."""
        other = Ours(self.work, replace(self.configuration, level=level))
        other._settings = _as_in(self.results[-1], other._settings)
        return other

    def shares(self) -> list[tuple[int, int]]:
        """The layers (first, last + 1) that each actor steps, of a chain. It has run."""
        layers = [key for key, m in self._model.named_children() if isinstance(m, nn.Linear)]
        result = self.results[-1]
        found = []
        for blocks in result.placement:
            keys = {
                name.partition(".")[0] for block in blocks for name in result.blocks[block].theta
            }
            mine = [i for i, key in enumerate(layers) if key in keys]
            found.append((mine[0], mine[-1] + 1))
        return found

    def activations(self) -> list[tuple[int, float]]:
        """Of each actor, bytes of the activations that its blocks kept at most, and what 1F1B
        promises: at depth l of D of min(M, D - l + 1) micro-batches, 1/M of a whole sample's each.
        It has run at level `pipeline`."""
        result, parts = self.results[-1], self.configuration.microbatches or 1
        alone = replace(
            self.configuration, level="backprop", kind="inprocess", microbatches=None, interleave=1
        )
        whole = Ours(self.work, alone)
        whole._settings = _as_in(result, whole._settings)
        whole.run(SHORT)
        of_a_sample = {name: m.samples or 0 for name, m in whole.results[-1].block_memory.items()}
        behind = dict(zip(reversed(whole.results[-1].blocks), count(), strict=False))
        return [
            (
                sum(result.block_memory[name].samples or 0 for name in blocks),
                sum(of_a_sample[n] * min(parts, behind[n] + 1) / parts for n in blocks),
            )
            for blocks in result.placement
        ]

    def time_use(self) -> dict[str, dict[str, float]]:
        """Seconds a sample by process and by what they were spent on, over all runs; empty where
        this hamdist does not tell."""
        samples = sum(result.samples for result in self.results)
        found: dict[str, dict[str, float]] = {}
        for result in self.results:
            for process, parts in getattr(result, "time_use", {}).items():
                mine = found.setdefault(process, {})
                for part, spent in parts.items():
                    mine[part] = mine.get(part, 0.0) + spent / samples
        return found


def _as_in(result: RunResult, settings: Settings) -> Settings:
    """`settings`, cut and placed as in a run. A block begins with its first layer that has
    weights."""
    firsts = [next(iter(block.theta)).partition(".")[0] for block in result.blocks.values()]
    raw = settings.model_dump(mode="json", exclude_unset=True)
    cuts = {"cuts": firsts[1:]} if firsts[1:] else {"blocks": 1}
    raw["partition"] = {"delay": settings.partition.delay, **cuts}
    if raw["engine"]["kind"] == "ray":
        raw["engine"] |= {"placement": result.placement, "interleave": 1}
    return Settings.model_validate(raw)


def fresh_actors(session: Session) -> None:
    """Ends the idle actors, so that the next run begins in processes that hold nothing."""
    import ray  # takes a second, which processes without Ray do not need

    while session.idle:
        _, actor = session.idle.pop()
        ray.kill(actor)
