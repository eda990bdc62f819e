"""All sides on one work, in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from harness import explain, ours, sides
from harness.configurations import MICRO_BATCHES, compiled, eager
from harness.figures import Spread
from harness.output import cores
from harness.processes import together
from harness.turns import Side, in_turns
from harness.works import Work

CENTRALISED, TRACE, LOCAL = "centralised", "trace", "local"
EAGER = "centralised, eager"  # the best one that is not compiled, where one that is takes part
PIPELINING, BACKPROP = "pipelining", "backprop"
PIPELINE = "pipeline"
ARITHMETIC, ALONE = "arithmetic", "arithmetic, one process"
EXCHANGE = "raw exchange"


@dataclass(frozen=True)
class Pace:
    """repeats: turns of each side. seconds: of a turn, and of a pilot. compiled: whether
    torch.compile takes part."""

    repeats: int
    seconds: float
    pilot: float
    compiled: bool = False


@dataclass
class Contest:
    """What was found on one work. turns: seconds a step by side. configurations: what each side
    was. pilots: seconds a step of the configurations that it was chosen from. parts: where a tick's
    time goes. told: what hamdist warned of. activations: at level `pipeline` (ours.activations)."""

    work: Work
    turns: dict[str, Spread] = field(default_factory=dict)
    configurations: dict[str, str] = field(default_factory=dict)
    pilots: dict[str, dict[str, float]] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    activations: list[tuple[int, float]] = field(default_factory=list)

    def median(self, side: str) -> float:
        return self.turns[side].median


class Lineup:
    """The sides of one work, added one by one; `contest` runs them in turn. Those on Ray need a
    session that is up."""

    def __init__(self, work: Work, processes: sides.Processes, pace: Pace) -> None:
        self._work = work
        self._processes = processes
        self._pace = pace
        self._found = Contest(work)
        self._running: dict[str, Side] = {}
        self._finalists: dict[str, dict[str, str]] = {}  # by side: their names
        self._ours: dict[str, ours.Ours] = {}
        together(processes.pair, "arithmetic.clear", [{}] * len(processes.pair))

    def centralised(self, threads: int | None = None) -> None:
        """PyTorch in one process. threads: at most; None: as many as cores, and compiled."""
        possible = eager(threads or cores())
        if self._pace.compiled and threads is None:
            possible += compiled(cores())
        remote = self._processes.centralised
        self._take(CENTRALISED, sides.centralised(remote, self._work, possible, self._pace.pilot))

    def pipelining(self) -> None:
        pair = self._processes.pair
        self._take(PIPELINING, sides.pipelining(pair, self._work, self._pace.pilot))

    def levels(self, *levels: str) -> None:
        """hamdist on 2 actors: `trace` in two blocks (of equal parameters, of equal time) or in
        one per layer, whichever is fastest; others cut and placed alike."""
        cuts = [
            ours.Configuration(TRACE, 2),
            ours.Configuration(TRACE, 2, "time"),
            ours.Configuration(TRACE, None),
        ]
        trace, pilot = sides.hamdist_best(self._work, cuts, self._pace.pilot)
        self._found.pilots[TRACE] = pilot
        for level in levels:
            side = trace if level == TRACE else trace.like(level)
            self._ours[level] = side
            self._running[level] = side.run
            self._found.configurations[level] = str(side.configuration)
        if self._work.dims:
            self._arithmetic(ARITHMETIC, trace.shares())

    def pipeline(self) -> None:
        """hamdist's exact level on 2 actors, in two blocks or in four that lie apart, with the best
        number of parts."""
        cuts = [
            ours.Configuration(PIPELINE, 2 * runs, microbatches=parts, interleave=runs)
            for runs in (1, 2)
            for parts in MICRO_BATCHES[1:]
        ]
        side, pilot = sides.hamdist_best(self._work, cuts, self._pace.pilot)
        self._found.pilots[PIPELINE] = pilot
        self._ours[PIPELINE] = side
        self._running[PIPELINE] = side.run
        self._found.configurations[PIPELINE] = str(side.configuration)

    def backprop(self) -> None:
        """hamdist in-process: all layers in one block."""
        remote = self._processes.inprocess
        remote.call("inprocess.build", work=self._work.plain(), level=BACKPROP, blocks=1)
        self._running[BACKPROP] = lambda seconds: remote.call("inprocess.run", seconds=seconds)
        own = ours.Configuration(BACKPROP, 1, kind="inprocess")
        self._found.configurations[BACKPROP] = str(own)
        if self._work.dims:
            self._arithmetic(ALONE, [(0, len(self._work.dims) - 1)])

    def exchange(self, size: int) -> None:
        """The raw one, of signals of `size` bytes."""
        self._take(EXCHANGE, sides.exchange(self._processes.peers, size))

    def _arithmetic(self, side: str, shares: Sequence[tuple[int, int]]) -> None:
        pair = self._processes.pair
        self._take(side, sides.arithmetic(pair, self._work, shares, self._pace.pilot))

    def _take(self, side: str, chosen: sides.Chosen) -> None:
        self._finalists[side] = {f"{side}: {name}": name for name in chosen.finalists}
        self._running |= {f"{side}: {name}": run for name, run in chosen.finalists.items()}
        self._found.pilots[side] = chosen.pilot
        self._found.problems |= chosen.problems

    def contest(self) -> Contest:
        found = self._found
        turns = in_turns(self._running, self._pace.repeats, self._pace.seconds)
        for side, names in self._finalists.items():
            found.turns[side], found.configurations[side] = _best(names, turns)
        if self._pace.compiled and CENTRALISED in self._finalists:
            names = self._finalists[CENTRALISED]
            plain = {long: name for long, name in names.items() if "compiled" not in name}
            found.turns[EAGER], found.configurations[EAGER] = _best(plain, turns)
        found.turns |= {side: turns[side] for side in turns if side in found.configurations}
        for level, ours_of in self._ours.items():
            floor = found.turns.get(ARITHMETIC)
            found.parts[level] = explain.parts(
                found.median(level), None if floor is None else floor.median, ours_of.time_use()
            )
            found.told |= ours_of.told
        if PIPELINE in self._ours:
            found.activations = self._ours[PIPELINE].activations()
        if BACKPROP in found.turns:
            floor = found.turns.get(ALONE)
            found.parts[BACKPROP] = explain.parts(
                found.median(BACKPROP),
                None if floor is None else floor.median,
                self._processes.inprocess.call("inprocess.time_use"),
            )
        return found


def _best(names: Mapping[str, str], turns: Mapping[str, Spread]) -> tuple[Spread, str]:
    """The turns of the fastest of the finalists `names`, and its name alone."""
    best = min(names, key=lambda name: turns[name].median)
    return turns[best], names[best]
