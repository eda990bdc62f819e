"""The sides of one work. Where a side has several configurations, a pilot finds its best one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness import ours
from harness.configurations import OPTIMISERS, Centralised, Pipeline, schedules
from harness.processes import Remote, together
from harness.turns import Side, fastest
from harness.works import Work

PILOT_TICKS = 200
CLEARLY = 1.5  # times as slow in a pilot, and a configuration cannot be the best one
STEADY = 0.5  # of a turn is enough for the arithmetic, which waits for nobody
LONGER = 2  # a pilot of hamdist's own than of the others: signals have to fill the network


@dataclass
class Chosen:
    """A side at its best. finalists: by name; which of them is the best shows in the turns.
    pilot: seconds a step of all configurations; problems: what could not be had, and why."""

    finalists: dict[str, Side]
    pilot: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


class Processes:
    """The processes of all sides but hamdist's actors; those wanted are forked at once, as soon as
    the fork server (processes.py) has all that it imports.

    pair: of two; the arithmetic, and the stages of the pipeline. peers: of the raw exchange.
    """

    def __init__(self, *, baselines: bool = True) -> None:
        """baselines: whether centralised PyTorch, the pipeline and the in-process engine are
        wanted."""
        folder = tempfile.TemporaryDirectory(prefix="hb-")  # only the owner can enter
        self._folder = folder
        self.pair = [Remote() for _ in range(2)]
        self.peers = [Remote() for _ in range(2)]
        self._all = [*self.pair, *self.peers]
        for i, remote in enumerate(self.peers):
            remote.ask("exchange.open", folder=folder.name, me=i)
        for i, remote in enumerate(self.pair):
            if baselines:
                meeting = str(Path(folder.name) / "rendezvous")
                remote.ask("pipelining.open", rank=i, rendezvous=meeting)
            else:
                remote.ask("arithmetic.ready")
        self._starting = list(self._all)
        if baselines:
            self.centralised, self.inprocess = Remote(None), Remote()
            self.centralised.ask("centralised.ready")
            self.inprocess.ask("inprocess.ready")
            also = [self.centralised, self.inprocess]
            self._all += also
            self._starting += also

    def __enter__(self) -> Processes:
        return self

    def hang_up(self) -> None:
        """They end while other things end, too."""
        for remote in self._all:
            remote.hang_up()

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        for remote in self._all:
            remote.close()
        self._folder.cleanup()

    def ready(self) -> None:
        """Waits until all have started, and have found each other."""
        while self._starting:
            self._starting.pop().answer()


def centralised(
    remote: Remote, work: Work, configurations: Sequence[Centralised], pilot_seconds: float
) -> Chosen:
    """The finalists are the fastest one of each number of threads, eager and compiled; but none
    that a pilot found far slower than another of its kind."""
    plain = {str(c): asdict(c) for c in configurations}
    problems = remote.call(
        "centralised.build", work=work.plain(), configurations=list(plain.values())
    )

    def side(configuration: dict[str, Any]) -> Side:
        return lambda seconds: remote.call(
            "centralised.run", configuration=configuration, seconds=seconds
        )

    sides = {name: side(raw) for name, raw in plain.items()}
    _, pilot = fastest(sides, pilot_seconds)
    best: dict[tuple[int, str], str] = {}
    for c in configurations:
        kind = c.threads, c.compiled
        best[kind] = min(best.setdefault(kind, str(c)), str(c), key=pilot.__getitem__)
    bound = {
        kind: CLEARLY * min(pilot[name] for (_, k), name in best.items() if k == kind)
        for _, kind in best
    }
    names = [name for (_, kind), name in best.items() if pilot[name] <= bound[kind]]
    return Chosen({name: sides[name] for name in names}, pilot, problems)


def pipelining(stages: list[Remote], work: Work, pilot_seconds: float) -> Chosen:
    """First the optimiser is chosen, on the simplest schedule, then the schedule with it."""
    together(stages, "pipelining.build", [{"work": work.plain()}] * len(stages))
    pilot: dict[str, float] = {}
    made: dict[str, Side] = {}
    known: list[float] = []

    def best_of(configurations: Sequence[Pipeline]) -> Pipeline:
        for c in configurations:
            if str(c) not in pilot:
                made[str(c)] = _pipeline(stages, c, known)
                pilot[str(c)] = made[str(c)](pilot_seconds)
        return min(configurations, key=lambda c: pilot[str(c)])

    simplest = best_of([Pipeline("GPipe", 1, optimiser) for optimiser in OPTIMISERS])
    best = best_of(schedules(work.batch, simplest.optimiser))
    return Chosen({str(best): made[str(best)]}, pilot)


def _pipeline(stages: list[Remote], configuration: Pipeline, known: list[float]) -> Side:
    """known: seconds a step, of this configuration or of another one, so far."""

    def run(seconds: float) -> float:
        steps = max(2, int(seconds / known[-1])) if known else 2
        call = {"configuration": asdict(configuration), "steps": steps}
        known.append(max(together(stages, "pipelining.run", [call] * len(stages))))
        return known[-1]

    return run


def exchange(peers: list[Remote], size: int) -> Chosen:
    """Both ways of giving ZeroMQ the bytes."""

    def side(copy: bool) -> Side:
        def ticks(number: int) -> float:
            call = {"size": size, "ticks": number, "copy": copy}
            return max(together(peers, "exchange.run", [call] * len(peers)))

        return lambda seconds: ticks(max(PILOT_TICKS, int(seconds / ticks(PILOT_TICKS))))

    return Chosen({f"copy={copy}": side(copy) for copy in (True, False)})


def arithmetic(
    remotes: list[Remote], work: Work, shares: Sequence[tuple[int, int]], pilot_seconds: float
) -> Chosen:
    """All shares at once, a process each, as actors step them; the slowest counts."""
    own = remotes[: len(shares)]
    calls = [{"work": work.plain(), "first": a, "last": b} for a, b in shares]
    ways = []
    pilot: dict[str, float] = {}
    for i, (remote, possible) in enumerate(
        zip(own, together(own, "arithmetic.build", calls), strict=True)
    ):
        found = {
            way: remote.call("arithmetic.run", way=way, seconds=pilot_seconds) for way in possible
        }
        ways.append(min(found, key=found.__getitem__))
        pilot |= {f"share {i}, {way}": seconds for way, seconds in found.items()}

    def run(seconds: float) -> float:
        turns = [{"way": way, "seconds": seconds * STEADY} for way in ways]
        return max(together(own, "arithmetic.run", turns))

    return Chosen({", ".join(ways): run}, pilot)


def hamdist_best(
    work: Work, configurations: Sequence[ours.Configuration], pilot_seconds: float
) -> tuple[ours.Ours, dict[str, float]]:
    """The fastest of several configurations on Ray, and the pilot of all."""
    made = {str(c): ours.Ours(work, c) for c in configurations}
    best, pilot = fastest({name: side.run for name, side in made.items()}, pilot_seconds * LONGER)
    chosen = made[best]
    del chosen.results[:-1]
    return chosen, pilot
