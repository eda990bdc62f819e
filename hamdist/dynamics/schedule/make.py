"""When: which block steps in which tick, and which signal it expects (docs:
concepts/time-and-signals). Pure: no tensors, no sockets, no state.

A block's events come in order of their ticks; at one tick, FORWARD before BACKWARD:

    pulse, chain of 3, c = 1      block 0   block 1   block 2 (readout)
    tick 0                        F0
    tick 1                        F1        F0
    tick 2                        F2        F1        F0 B0
    tick 3                        F3        F2 B0     F1 B1
    tick 4                        F4 B0     F3 B1     F2 B2

The stream is a source at depth -1: it sends sample n at tick n c - 1, to the blocks that read it
and to the readouts that compare with it.
"""

from __future__ import annotations

from typing import TypeAlias

from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.dynamics.schedule.levels import Locality
from hamdist.dynamics.schedule.pulse import PulseSchedule
from hamdist.dynamics.schedule.sequence import SequenceSchedule
from hamdist.errors import LevelError

AnySchedule: TypeAlias = PulseSchedule | HoldSchedule | SequenceSchedule


def make_schedule(
    graph: Graph, knobs: Locality, silent: frozenset[str] = frozenset(), *, carries: bool = False
) -> AnySchedule:
    """Return the schedule of `knobs` on `graph`. silent: blocks without messages (`Graph.silent`);
    carries: as of `SequenceSchedule`.

    Raises LevelError where the graph does not allow it: a pulse through a cycle, or past a block
    that the input does not reach; a speed that is measured in depths on a graph with cycles.
    """
    if knobs.sequence:
        return SequenceSchedule(graph, knobs, carries=carries)
    cycle = graph.cycle()
    if knobs.pulse:
        if cycle:
            raise LevelError(
                f"presentation 'pulse' needs an acyclic graph, but {', '.join(cycle)} lie on or "
                "behind a cycle; use the levels 'local' or 'group' (presentation 'hold'), or for "
                "sequences 'bptt'"
            )
        unreached = graph.unreached()
        if unreached:
            raise LevelError(
                f"presentation 'pulse': no path leads from the input to {', '.join(unreached)}"
            )
        with_state = [r for r in graph.readouts if graph.blocks[r].state]
        if with_state:
            raise LevelError(
                f"presentation 'pulse': the readout {with_state[0]!r} has a state; a pulse needs "
                "an output net (state=False)"
            )
        if knobs.own is not None and graph.ties:
            raise LevelError(
                f"level {type(knobs.own).__name__}: {graph.ties[0].name} is a weight of several "
                "blocks, whose times are those of the built-in levels; have both in one block"
            )
        return PulseSchedule(graph, knobs, silent)
    if cycle and not isinstance(knobs.speed, int):
        raise LevelError(
            f"speed {knobs.speed!r} counts the depth of the graph, but {', '.join(cycle)} lie on "
            "or behind a cycle; give the number of ticks a sample is held"
        )
    return HoldSchedule(graph, knobs)
