"""When a sequence travels forward and then, token by token, in reverse (backpropagation through
time, docs: concepts/equations). Pure: no tensors, no sockets, no state.

A token is a sample; the stream's tag says which one is the last of its sequence, and with that tag
every block learns the length. An edge from a block to itself, or to a block listed before it, is
recurrent: it carries the state that belongs to the token before. All other edges join the same
token, and only they count for the depth l of a block (the longest path from the input).

For a sequence of n tokens whose first one meets depth 0 at tick T:

    token m forward at depth l       T + m c + l
    the deepest block has the last   T + (n-1) c + D
    token n-1-j backward at depth l  T + (n-1) c + D + j c + (D - l)    j = 0 ... min(n, r) - 1
    the next sequence begins at      T + (n-1) c + 2D + (min(n, r) - 1) c + 1

c is the least number of ticks between two tokens with which every recurrent edge, forward and
backward, has its delay; r is the truncation. Three tokens, then one, through a cell that reads
itself and a readout (D = 1, c = 1):

    tick  cell  readout        tick  cell  readout
    0     F0                   5     B1    B0
    1     F1    F0             6     B0
    2     F2    F1             7     F3
    3           F2 B2          8           F3 B3
    4     B2    B1             9     B3

The stream is a source at depth -1. The weights move in the last tick of a sequence's way back, so
all its signals carry the number of the sequences before it as their version.
"""

from __future__ import annotations

from hamdist.dynamics.graph.graph import INPUT, Edge, Graph
from hamdist.dynamics.schedule.events import ALONE, Bundle, Event, Kind, Phase, Span, Stamp
from hamdist.dynamics.schedule.levels import Locality
from hamdist.errors import LevelError


class SequenceSchedule:
    """The schedule of sequences, which travel forward, and then back token by token.

    carries: the states at the end of a sequence are those that the next begins with; else zeros.

    Raises LevelError for a readout with a state, and for a block that no token reaches in its own
    time.
    """

    def __init__(self, graph: Graph, knobs: Locality, *, carries: bool = False) -> None:
        with_state = [r for r in graph.readouts if graph.blocks[r].state]
        if with_state:
            raise LevelError(
                f"presentation 'sequence': the readout {with_state[0]!r} has a state; a sequence "
                "is read by an output net (state=False)"
            )
        self._recurrent = {e.index for e in graph.edges if graph.recurrent(e)}
        self._depths = self._count(graph)
        self._D = max(self._depths.values())
        self._truncation = knobs.truncation
        self.carries = carries
        back = [e for e in graph.edges if self.recurrent(e)]
        self.c = max([1, *(self._depths[e.parent] + e.delay - self._depths[e.child] for e in back)])

    def _count(self, graph: Graph) -> dict[str, int]:
        depths = {INPUT: -1, **{e.parent: -1 for e in graph.out_of[INPUT]}}
        for name in graph.blocks:
            reach = [depths[e.parent] + e.delay for e in graph.into[name] if not self.recurrent(e)]
            if not reach:
                raise LevelError(
                    f"presentation 'sequence': block {name!r} reads only {_parents(graph, name)}, "
                    "listed with it or behind it, so nothing of the present token reaches it; list "
                    f"a parent of it earlier, or give it {INPUT!r}"
                )
            depths[name] = max(reach)
        return depths

    def recurrent(self, edge: Edge) -> bool:
        """Return True if `edge` carries the state of the previous token."""
        return edge.index in self._recurrent

    # -- sequences ----------------------------------------------------------------------------

    def opening(self) -> Span:
        """Return the first sequence. The states before it entered one token's time earlier."""
        return Span(number=0, start=0, first=0, before=-self.c)

    def following(self, span: Span) -> Span:
        """Return the sequence after `span`, whose length is known."""
        entered = span.start + (_length(span) - 1) * self.c
        back = 2 * self._D + (self.reversed(span) - 1) * self.c
        return Span(span.number + 1, entered + back + 1, span.first + _length(span), entered)

    def reversed(self, span: Span) -> int:
        """Return the number of tokens of the reverse pass, min(n, r)."""
        return _length(span) if self._truncation is None else min(_length(span), self._truncation)

    # -- events -------------------------------------------------------------------------------

    def forward(self, block: str, span: Span, m: int) -> Event:
        """Return the event in which token m of a sequence passes a block."""
        tick = span.start + m * self.c + self._depths[block]
        return Event(tick, Phase.FORWARD, span.first + m, span)

    def backward(self, block: str, span: Span, j: int) -> Event:
        """Return the event in which reversed token j passes a block."""
        last = _length(span) - 1
        tick = span.start + (last + j) * self.c + self._D + (self._D - self._depths[block])
        return Event(tick, Phase.BACKWARD, span.first + last - j, span)

    def closed(self, event: Event) -> Event:
        """Return a FORWARD or EMIT event with its token known to be the last of its sequence."""
        span = _span(event)
        return event._replace(span=span._replace(length=event.sample + 1 - span.first))

    def last(self, event: Event) -> int:
        """Return the last token of the sequence that a BACKWARD event belongs to."""
        return _span(event).first + _length(_span(event)) - 1

    def begins(self, event: Event) -> bool:
        """Return True if a BACKWARD event is the first one of its sequence."""
        return self._place(event) == 0

    def ends(self, event: Event) -> bool:
        """Return True if a BACKWARD event is the last one of its sequence: the weights move."""
        return self._place(event) == self.reversed(_span(event)) - 1

    def _place(self, event: Event) -> int:
        """Return j of a BACKWARD event."""
        return self.last(event) - event.sample

    def after(self, block: str, event: Event) -> Event:
        """Return the event of `block` after `event`, which is `closed` if its token was last."""
        span = _span(event)
        if event.phase is Phase.FORWARD:
            if span.length is None:
                return self.forward(block, span, event.sample + 1 - span.first)
            return self.backward(block, span, 0)
        if self.ends(event):
            return self.forward(block, self.following(span), 0)
        return self.backward(block, span, self._place(event) + 1)

    def emission(self, span: Span, m: int) -> Event:
        """Return the event in which the stream sends token m of `span`."""
        return Event(span.start + m * self.c - 1, Phase.EMIT, span.first + m, span)

    def after_emission(self, event: Event) -> Event:
        """Return the next emission after `event`, which is `closed` if its token was the last."""
        span = _span(event)
        if span.length is None:
            return self.emission(span, event.sample + 1 - span.first)
        return self.emission(self.following(span), 0)

    # -- signals ------------------------------------------------------------------------------

    def state(self, edge: Edge, event: Event) -> Stamp | None:
        if event.phase is not Phase.FORWARD:
            return None
        span = _span(event)
        if edge.from_input:
            return self.target(edge.child, event)
        sent = event.tick - self._depths[edge.child] + self._depths[edge.parent]
        if not self.recurrent(edge):
            return Stamp(sent, event.sample, span.number)
        if event.sample > span.first:
            return Stamp(sent - self.c, event.sample - 1, span.number)
        if not self.carries:
            return None
        sent = span.before + self._depths[edge.parent]
        return Stamp(sent, span.first - 1, max(0, span.number - 1))

    def message(self, edge: Edge, event: Event) -> Stamp | None:
        """Return the stamp of the message, on a recurrent edge that of the token behind it.

        A recurrent edge's message was made with the costate of that token.
        """
        if event.phase is not Phase.BACKWARD:
            return None
        sent = event.tick - self._depths[edge.child] + self._depths[edge.parent]
        if not self.recurrent(edge):
            return Stamp(sent, event.sample, _span(event).number)
        if self.begins(event):
            return None
        return Stamp(sent - self.c, event.sample + 1, _span(event).number)

    def before(self, block: str) -> Stamp:
        """Return the stamp of the state of `block` before the first sequence."""
        return Stamp(self.opening().before + self._depths[block], -1, 0)

    def target(self, readout: str, event: Event) -> Stamp | None:  # noqa: ARG002
        if event.phase is not Phase.FORWARD:
            return None
        sent = self.emission(_span(event), event.sample - _span(event).first)
        return Stamp(sent.tick, sent.sample, 0)

    def delay(self, block: str) -> int:  # noqa: ARG002
        """Return 0: the weights rest while a sequence is under way."""
        return 0

    def in_flight(self, edge: Edge, kind: Kind) -> int:  # noqa: ARG002
        before = -1 if edge.from_input else self._depths[edge.parent]
        wait = self._depths[edge.child] - before + (self.c if self.recurrent(edge) else 0)
        return wait // self.c + 1

    def target_in_flight(self, readout: str) -> int:
        return (self._depths[readout] + 1) // self.c + 1

    def bundle(self, edge: Edge, kind: Kind) -> Bundle:  # noqa: ARG002
        """Return bundles of one: between two sequences signals do not come at equal times."""
        return ALONE

    @property
    def idle(self) -> int:
        """Return 0: nothing of a sequence waits for the next one."""
        return 0

    @property
    def staleness(self) -> int:
        return 0


def _span(event: Event) -> Span:
    if event.span is None:
        raise ValueError(f"{event} belongs to no sequence")
    return event.span


def _length(span: Span) -> int:
    if span.length is None:
        raise ValueError(f"{span} still goes on")
    return span.length


def _parents(graph: Graph, name: str) -> str:
    return ", ".join(repr(parent) for parent in graph.blocks[name].parents)
