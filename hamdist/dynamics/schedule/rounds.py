"""A level of one's own, and what every schedule of pulses is made of: a round of events.

A round is a table that repeats: the events of S samples in P ticks. Sample n = q S + i has those of
sample i of the round, q P ticks later:

    levels trace, backprop     S = 1, P = c: F n at n c + l, B n at n c + 2D - l
    level pipeline             S = M parts of a sample, two ticks apart, P = c
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import ClassVar, NamedTuple

from hamdist.dynamics.graph.graph import Graph
from hamdist.errors import LevelError

FORWARD, BACKWARD = "F", "B"


class OwnLevel:
    """When samples enter, and when they and their messages pass the blocks: a schedule of pulses.

    What a block computes and keeps is that of the level `base`. `self` holds constants.

    Attributes:
        base: the level whose knobs hold otherwise: `trace`, `heads`, `backprop` or `reversible`.
        tables: by number of blocks of a chain the table drawn by hand, as `table` draws it, with
            which `hamdist verify --level` compares.
    """

    base: ClassVar[str] = "trace"
    tables: ClassVar[Mapping[int, str]] = {}

    def ticks(self, graph: Graph) -> int:
        """Return the ticks of a round, after which the events repeat for the next samples.

        Args:
            graph: of the run; `depths` by block, `depth` D, `edges`, `readouts` are what counts.
        """
        raise NotImplementedError("a level of your own has its own ticks()")

    def events(self, graph: Graph) -> Iterable[tuple[int, str, str, int]]:
        """Yield (tick, block, phase, sample) for the samples 0 ... S - 1 of the first round.

        Phase `F`: the sample passes the block; `B`: the message about it does, and the weights
        move (of a readout both are in the tick of `F`, and `B` may be left out). In any order.
        At one tick `F` comes before `B`. A sample enters so that it meets the first blocks in time.

        Args:
            graph: as of `ticks`.
        """
        raise NotImplementedError("a level of your own has its own events()")

    def table(self, graph: Graph, ticks: int) -> str:
        """Return the events as a table, a row for each tick.

        Args:
            graph: as of `ticks`.
            ticks: number of rows.
        """
        times = make_round(self, graph)
        rows = [["tick", *graph.blocks]]
        for tick in range(ticks):
            rows.append([str(tick)])
            for block in graph.blocks:
                phases = {"FB": times.forward}
                if block not in graph.readouts:
                    phases = {FORWARD: times.forward, BACKWARD: times.backward}
                now = {
                    p: (of[block].before(tick), of[block].before(tick + 1))
                    for p, of in phases.items()
                }
                events = [f"{p}{n}" for p, (n, after) in now.items() if 0 <= n < after]
                rows[-1].append(" ".join(events))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows]
        return "\n".join(" | ".join(row).rstrip() for row in padded)


class Times(NamedTuple):
    """The ticks of one kind of event: those of a round, increasing, and its period."""

    first: Sequence[int]
    ticks: int

    def of(self, n: int) -> int:
        """Return the tick of event n."""
        turn, i = divmod(n, len(self.first))
        return turn * self.ticks + self.first[i]

    def before(self, tick: int) -> int:
        """Return the number of events before `tick`; below 0 for those that are missing then."""
        turn, rest = divmod(tick - self.first[0], self.ticks)
        return turn * len(self.first) + bisect_left(self.first, self.first[0] + rest)

    def most(self, times: Times) -> int:
        """Return the most events n, n + 1, ... of these up to the tick of n in `times`."""
        return max(self.before(tick + 1) - i for i, tick in enumerate(times.first))


class Round(NamedTuple):
    """The times of a schedule: of the stream's emissions, and by block of both passes.

    Of blocks to which no message comes, `backward` are the times of their forward passes, in which
    they learn.
    """

    emits: Times
    forward: Mapping[str, Times]
    backward: Mapping[str, Times]

    def lag(self, block: str) -> int:
        """Return the most ticks from a block's forward to its backward pass."""
        both = zip(self.forward[block].first, self.backward[block].first, strict=True)
        return max(back - forth for forth, back in both)


def make_round(level: OwnLevel, graph: Graph, one_way: Collection[str] = ()) -> Round:
    """Return the round of a level. one_way: blocks beside the readouts to which nothing comes back.

    Raises LevelError where the events cannot be: a block without a sample, or with it twice; a
    signal that is used before it has come; samples that pass each other.
    """
    refuse = _Refusal(f"level {type(level).__name__}")
    ticks, events = refuse.failures_of(level, graph)
    by_block: dict[tuple[str, str], dict[int, int]] = {}
    for event in events:
        tick, block, phase, n = refuse.unless_event(event, graph)
        times = by_block.setdefault((block, phase), {})
        refuse.unless(n not in times, f"{phase}{n} of block {block!r} is there twice")
        times[n] = tick
    samples = range(1 + max((n for times in by_block.values() for n in times), default=0))
    forward, backward = dict[str, Times](), dict[str, Times]()
    for block in graph.blocks:
        ways = [(FORWARD, forward), (BACKWARD, backward)]
        if block in graph.readouts:
            both = [by_block.get((block, phase), {}) for phase, _ in ways]
            wrong = f"B of readout {block!r} is not in the tick of F; leave it out"
            refuse.unless(not both[1] or both[0] == both[1], wrong)
        for phase, way in ways[: 1 if block in graph.readouts or block in one_way else 2]:
            times = by_block.get((block, phase), {})
            lost = next((n for n in samples if n not in times), None)
            refuse.unless(lost is None, f"block {block!r} has no {phase}{lost}")
            way[block] = refuse.unless_in_order(f"{phase} of {block!r}", times, ticks)
        backward.setdefault(block, forward[block])
    into = [edge for edge in graph.edges if edge.from_input]
    emits = {n: min(forward[e.child].first[n] - e.delay for e in into) for n in samples}
    late = f"sample 0 enters in tick {emits[0] + 1}; let it pass the first blocks from tick 0 on"
    refuse.unless(emits[0] == -1, late)
    listening = {name for name, block in graph.blocks.items() if block.back == "message"}
    listening -= {*one_way}
    for edge in graph.edges:
        if not edge.from_input:
            refuse.unless_after(edge.delay, FORWARD, edge.child, edge.parent, forward)
            if edge.parent in listening and edge.child in listening | {*graph.readouts}:
                refuse.unless_after(edge.delay, BACKWARD, edge.parent, edge.child, backward)
    readout = graph.readouts[0]
    for block, spec in graph.blocks.items():
        if spec.back == "error" and block not in one_way and spec.loss is None:
            times_of_both = {block: backward[block], readout: forward[readout]}
            refuse.unless_after(1, BACKWARD, block, readout, times_of_both)
    return Round(refuse.unless_in_order("the stream", emits, ticks), forward, backward)


class _Refusal(NamedTuple):
    """Raises LevelErrors that name the level."""

    who: str

    def unless(self, good: object, wrong: str) -> None:
        if not good:
            raise LevelError(f"{self.who}: {wrong}")

    def failures_of(self, level: OwnLevel, graph: Graph) -> tuple[int, list[object]]:
        """Return ticks and events of a user's level, whose code may raise anything."""
        try:
            ticks = level.ticks(graph)
            whole = isinstance(ticks, int) and ticks > 0
            self.unless(whole, f"ticks() is {ticks!r}; return a whole number, 1 or more")
            most = 2 * ticks * len(graph.blocks)  # (a block does F and B once a tick)
            events: list[object] = list(islice(level.events(graph), most + 1))
            pure = (level.ticks(graph), list(islice(level.events(graph), most + 1)))
            self.unless(
                pure == (ticks, events),
                "it is another one when asked again; let ticks() "
                "and events() depend on the graph alone, as every process asks",
            )
        except LevelError:
            raise
        except Exception as error:
            raise LevelError(f"{self.who}: {type(error).__name__}: {error}") from error
        self.unless(events, "events() yields none")
        enough = (
            f"events() yields more than the {most} that fit into {ticks} ticks; yield one round"
        )
        self.unless(len(events) <= most, enough)
        return ticks, events

    def unless_event(self, event: object, graph: Graph) -> tuple[int, str, str, int]:
        match event:
            case (int() as tick, str() as block, "F" | "B" as phase, int() as n) if n >= 0:
                self.unless(block in graph.blocks, f"{event}: blocks are {', '.join(graph.blocks)}")
                return tick, block, phase, n
        form = "(tick, block, 'F' or 'B', sample), of whole numbers, samples from 0"
        raise LevelError(f"{self.who}: events() yields {event!r}; yield {form}")

    def unless_in_order(self, what: str, times: Mapping[int, int], ticks: int) -> Times:
        """Return the times of samples that follow one another, also into the next round."""
        first = [times[n] for n in range(len(times))]
        for n, (tick, later) in enumerate(zip(first, [*first[1:], first[0] + ticks], strict=True)):
            wrong = f"{what}: sample {n + 1} comes in tick {later}, and sample {n} in tick {tick}"
            rule = "; samples pass a block one by one and in their order"
            self.unless(tick < later, wrong + rule)
        return Times(first, ticks)

    def unless_after(
        self, delay: int, phase: str, block: str, other: str, times: Mapping[str, Times]
    ) -> None:
        for n, (tick, sent) in enumerate(zip(times[block].first, times[other].first, strict=True)):
            wrong = (
                f"{phase}{n} of {block!r} is in tick {tick}, but waits for a signal of {other!r}"
            )
            comes = f"that is sent in tick {sent} and takes {delay} tick(s)"
            self.unless(tick >= sent + delay, f"{wrong} {comes}")
