"""A level of one's own, and what every schedule of pulses is made of: a round of events.

A round is a table that repeats: the events of S samples in P ticks. Sample n = q S + i has those of
sample i of the round, q P ticks later:

    levels trace, backprop     S = 1, P = c: F n at n c + l, B n at n c + 2D - l
    level pipeline             S = M parts of a sample, two ticks apart, P = c
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

from hamdist.dynamics.graph.graph import Graph
from hamdist.errors import LevelError

FORWARD, BACKWARD = "F", "B"


class OwnLevel:
    """When samples enter, and when they and their messages pass the blocks: a schedule of pulses.

        class TwoAndWait(hamdist.OwnLevel):
            def ticks(self, graph):
                return 2 * graph.depth + 2

            def events(self, graph):
                for block, l in graph.depths.items():
                    for n in range(2):
                        yield n + l, block, "F", n
                        yield n + 2 * graph.depth - l, block, "B", n

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
        raise NotImplementedError

    def events(self, graph: Graph) -> Iterable[tuple[int, str, str, int]]:
        """Yield (tick, block, phase, sample) for the samples 0 ... S - 1 of the first round.

        Phase `F`: the sample passes the block; `B`: the message about it does, and the weights
        move (of a readout both are in the tick of `F`, and `B` may be left out). In any order.
        At one tick `F` comes before `B`. A sample enters so that it meets the first blocks in time.

        Args:
            graph: as of `ticks`.
        """
        raise NotImplementedError

    def table(self, graph: Graph, ticks: int) -> str:
        """Return the events as a table, a row for each tick.

        Args:
            graph: as of `ticks`.
            ticks: number of rows.
        """
        made = make_round(self, graph)
        rows = [["tick", *graph.blocks]]
        for tick in range(ticks):
            cells = [str(tick)]
            for block in graph.blocks:
                now = [[*one[block].at_tick(tick)] for one in (made.forward, made.backward)]
                both = now[0] == now[1] and block in graph.readouts
                named = zip(("FB",) if both else (FORWARD, BACKWARD), now, strict=False)
                cells.append(" ".join(f"{phase}{n}" for phase, ns in named for n in ns))
            rows.append(cells)
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

    def at_tick(self, tick: int) -> range:
        """Return the events of a tick: one, or none."""
        return range(max(0, self.before(tick)), self.before(tick + 1))

    def most(self, taken: Times) -> int:
        """Return the most events n, n + 1, ... of these up to the tick in which n is `taken`."""
        return max(self.before(tick + 1) - i for i, tick in enumerate(taken.first))


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
    name = type(level).__name__
    own = _Checked(f"level {name}")
    ticks = level.ticks(graph)
    own.check(isinstance(ticks, int) and ticks > 0, f"ticks() is {ticks!r}; return 1 or more")
    found: dict[tuple[str, str], dict[int, int]] = {}
    samples = 0
    for event in level.events(graph):
        whole = isinstance(event, tuple) and len(event) == 4
        own.check(whole, f"events() yields {event!r}; yield (tick, block, 'F' or 'B', sample)")
        tick, block, phase, n = event
        own.check(block in graph.blocks, f"no block {block!r}; known: {', '.join(graph.blocks)}")
        own.check(phase in (FORWARD, BACKWARD), f"an event of phase {phase!r}; give 'F' or 'B'")
        whole = isinstance(tick, int) and isinstance(n, int) and n >= 0
        own.check(whole, f"the event {event!r}: tick and sample are whole numbers, samples from 0")
        times = found.setdefault((block, phase), {})
        own.check(n not in times, f"{phase}{n} of block {block!r} is there twice")
        times[n], samples = tick, max(samples, n + 1)
    own.check(samples > 0, "events() yields none")
    made: dict[str, dict[str, Times]] = {FORWARD: {}, BACKWARD: {}}
    for block in graph.blocks:
        for phase, by_block in made.items():
            times = found.get((block, phase), {})
            if phase == BACKWARD and (block in graph.readouts or block in one_way):
                passes = made[FORWARD][block]
                late = block in graph.readouts and times and [*times.values()] != [*passes.first]
                own.check(not late, f"B of readout {block!r} is not in the tick of F; leave it out")
                by_block[block] = passes
                continue
            lost = next((n for n in range(samples) if n not in times), None)
            own.check(lost is None, f"block {block!r} has no {phase}{lost}")
            by_block[block] = own.in_order(f"{phase} of block {block!r}", times, ticks)
    forward, backward = made.values()
    into = [edge for edge in graph.edges if edge.from_input]
    emits = {i: min(forward[e.child].first[i] - e.delay for e in into) for i in range(samples)}
    own.check(
        emits[0] == -1,
        f"sample 0 enters in tick {emits[0] + 1}; let it pass the first blocks from tick 0 on",
    )
    for edge in graph.edges:
        if not edge.from_input:
            own.after(edge.delay, f"F of {edge.child!r}", forward[edge.child],
                      f"F of {edge.parent!r}", forward[edge.parent])  # fmt: skip
            message = graph.blocks[edge.parent].back == "message" and edge.parent not in one_way
            if message and edge.child not in one_way:
                own.after(edge.delay, f"B of {edge.parent!r}", backward[edge.parent],
                          f"B of {edge.child!r}", backward[edge.child])  # fmt: skip
    for block, spec in graph.blocks.items():
        if spec.back == "error" and block not in one_way and spec.loss is None:
            own.after(1, f"B of {block!r}", backward[block], f"the error of {graph.readouts[0]!r}",
                      forward[graph.readouts[0]])  # fmt: skip
    return Round(own.in_order("the stream", emits, ticks), forward, backward)


class _Checked(NamedTuple):
    """Raises LevelErrors that name the level."""

    who: str

    def check(self, good: object, wrong: str) -> None:
        if not good:
            raise LevelError(f"{self.who}: {wrong}")

    def in_order(self, what: str, times: Mapping[int, int], ticks: int) -> Times:
        """Return the times of samples that follow one another, also into the next round."""
        first = [times[n] for n in range(len(times))]
        for n, (tick, later) in enumerate(zip(first, [*first[1:], first[0] + ticks], strict=True)):
            wrong = f"{what}: sample {n + 1} comes in tick {later}, and sample {n} in tick {tick}"
            self.check(tick < later, f"{wrong}; samples pass a block one by one and in their order")
        return Times(first, ticks)

    def after(self, delay: int, what: str, times: Times, other: str, earlier: Times) -> None:
        for n, (tick, sent) in enumerate(zip(times.first, earlier.first, strict=True)):
            wrong = f"{what}, sample {n}, is in tick {tick}, and {other} in tick {sent}"
            self.check(tick >= sent + delay, f"{wrong}; a signal takes {delay} tick(s)")
