"""Presentation hold: every block steps in every tick."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from hamdist.config import Moves, Order, TargetOf, Update
from hamdist.dynamics.graph.graph import Edge, Graph
from hamdist.dynamics.schedule.events import (
    ALONE,
    Bundle,
    Event,
    Kind,
    Phase,
    Stamp,
    emitted,
    source_events,
)
from hamdist.dynamics.schedule.levels import Locality


class HoldSchedule:
    """The sample stays at the input for c ticks; every block steps in every tick.

    At tick k the input shows sample floor(k / c). With `layer-by-layer` only the blocks of depth
    k mod c move (HL Eq. 10). The sequential order compares the new states with the target inside
    one tick (HL Appendix D), so there an output net takes its tick last: it reads the h_{k+1} that
    its parents have sent in their tick k, and they read its message at the start of the next.
    """

    def __init__(self, graph: Graph, knobs: Locality) -> None:
        self._depths = graph.depths
        self._knobs = knobs
        sequential = knobs.order is Order.SEQUENTIAL
        state = {r: graph.blocks[r].has_state for r in graph.readouts}
        self._late = {r for r in graph.readouts if sequential and not state[r]}
        # The tick after its presentation in which a sample's prediction stands at a readout: a
        # state is one tick later than an output net, and the sequential order looks one ahead.
        self._lags = {r: max(0, graph.depths[r] + state[r] - sequential) for r in graph.readouts}
        self._reach = max(self._lags.values())
        depth = max(1, max(graph.depths[r] + (r not in self._late) for r in graph.readouts))
        speeds = {"inf": 2 * self._reach + 1, "depth": depth}
        self.c = knobs.speed if isinstance(knobs.speed, int) else speeds[knobs.speed]

    def enters(self, sample: int) -> int:
        return sample * self.c

    def entered(self, tick: int) -> int:
        """Return the sample that the input shows in `tick`."""
        return tick // self.c

    @property
    def round(self) -> tuple[int, int]:
        """Return the ticks after which the events repeat, and the samples that enter meanwhile."""
        return self.c, 1

    def emissions(self, first: int = 0) -> Iterator[Event]:
        """Yield the events of the stream from a sample on."""
        return source_events(self.c, first)

    def late(self, block: str) -> bool:
        """Return True if a tick of `block` comes after those of all others with the same number."""
        return block in self._late

    def events(self, block: str, since: int = 0) -> Iterator[Event]:  # noqa: ARG002
        """Yield the events of a block: every tick."""
        for k in count(since):
            yield Event(k, Phase.TICK, k // self.c)

    def before_start(self, edge: Edge) -> range:
        """Return the ticks before the first whose states the child of `edge` reads."""
        return range(self.late(edge.child) - edge.delay, 0)

    def state(self, edge: Edge, event: Event) -> Stamp | None:
        if not edge.from_input:
            return self._sent(event.tick - edge.delay + self.late(edge.child))
        shown = event.tick - edge.delay + 1
        return emitted(shown // self.c, self.c) if shown >= 0 and shown % self.c == 0 else None

    def message(self, edge: Edge, event: Event) -> Stamp | None:
        return self._sent(event.tick - edge.delay)

    def _sent(self, tick: int) -> Stamp:
        """Return the stamp of what a block sends in `tick` (below 0: before the start)."""
        return Stamp(tick, tick // self.c, max(0, self.updates_before(tick)))

    def updates_before(self, tick: int) -> int:
        """Return the number of updates of the weights before `tick`."""
        return tick if self._knobs.update is Update.TICK else tick // self.c

    def updates(self, tick: int) -> bool:
        """Return True if the weights move in `tick`."""
        return self._knobs.update is Update.TICK or tick % self.c == self.c - 1

    def moves(self, block: str, tick: int) -> bool:
        """Return True if the state of `block` moves in `tick`."""
        return self._knobs.moves is Moves.ALL or tick % self.c == self._depths[block]

    def target_lag(self, readout: str) -> int:
        """Return the ticks by which the target that `readout` compares with lies back."""
        return 0 if self._knobs.target is TargetOf.CURRENT else self._lags[readout]

    def compares(self, readout: str, tick: int) -> bool:
        """Return True if `readout` takes its loss in `tick`."""
        since = tick - self.target_lag(readout)
        if self._knobs.moves is Moves.ALL or self._knobs.target is TargetOf.CURRENT:
            return since >= 0
        return since >= 0 and since % self.c == 0

    def records(self, readout: str, tick: int) -> int | None:
        """Return the sample whose prequential loss is taken in `tick`.

        That is the first tick in which its prediction is at the readout, before the readout has
        learned from it; with target 'current' (literal Algorithm 1) the sample's last tick.
        """
        since = tick - self.target_lag(readout)
        last = self.c - 1 if self._knobs.target is TargetOf.CURRENT else 0
        return since // self.c if since >= 0 and since % self.c == last else None

    def answers(self, readout: str, tick: int) -> int | None:
        """Return the sample whose prediction stands at the readout in `tick`, at first."""
        since = tick - self._lags[readout]
        return since // self.c if since >= 0 and since % self.c == 0 else None

    @property
    def idle(self) -> int:
        return (2 * self._reach + 1) // self.c + 1

    def target(self, readout: str, event: Event) -> Stamp | None:
        since = event.tick - self.target_lag(readout)
        return emitted(since // self.c, self.c) if since >= 0 and since % self.c == 0 else None

    def delay(self, block: str) -> int:
        back = max(0, self._lags.get(block, self._reach) - self._depths[block])
        if self._knobs.moves is Moves.LAYER_BY_LAYER:
            return back
        return 2 * back if self._knobs.update is Update.TICK else 2 * back // self.c

    def wait(self, block: str) -> int:
        """Return the ticks from a sample's arrival at `block` to that of the message about it."""
        return 2 * max(0, self._lags.get(block, self._reach) - self._depths[block])

    def in_flight(self, edge: Edge, kind: Kind) -> int:  # noqa: ARG002
        """Return 2 d: d in every tick, and d more at the end.

        A block that stops in tick k has read the signals sent until k - d; its neighbour, which is
        notified in tick k + d, has sent on until then.
        """
        return 2 * edge.delay

    def target_in_flight(self, readout: str) -> int:
        return (self._lags[readout] + 1) // self.c + 1

    def bundle(self, edge: Edge, kind: Kind) -> Bundle:
        if kind is Kind.STATE and self.late(edge.child):
            return ALONE  # read in the tick in which it is sent
        spacing = self.c if edge.from_input else 1
        return Bundle(max(1, edge.delay // spacing), spacing)

    @property
    def staleness(self) -> int:
        if self._knobs.moves is Moves.LAYER_BY_LAYER:
            return self._reach
        return 2 * self._reach // self.c
