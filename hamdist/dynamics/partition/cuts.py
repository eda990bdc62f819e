"""The places where the blocks of a traced model begin.

A unit is a module with weights and what follows it without weights (Linear, then ReLU); behind an
invertible module what is not invertible belongs to the next one. Blocks are runs of units; where
there are fewer units than blocks are asked for, of single steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate, islice, pairwise
from typing import TypeAlias

from torch import nn

from hamdist.config import CutBalance, Grouping
from hamdist.dynamics.modules.reversible import pieces_of
from hamdist.dynamics.partition.assemble import OperationRun
from hamdist.dynamics.tracing.dataflow import Flow
from hamdist.dynamics.tracing.recorded_calls import Unfollowed, stays_whole
from hamdist.errors import GraphError

SHOWN = 12  # names in an error


@dataclass(frozen=True, slots=True)
class CutPlace:
    """A place where a block may begin.

    Attributes:
        names: the modules that begin there, outermost first.
        parameters: numbers that are learned between this place and the next.
        activations: real numbers per row of the batch that are computed between them.
        crossing: numbers per row that a block that begins here gets from earlier blocks, or
            passes on from them to later ones.
    """

    names: tuple[str, ...]
    parameters: int
    activations: int
    crossing: int


# From the places to the names of the modules that begin a block.
Policy: TypeAlias = Callable[[Sequence[CutPlace]], Iterable[str]]


class Cuts:
    """The places of one model where blocks can begin."""

    def __init__(self, flow: Flow, model: nn.Module) -> None:
        self._flow = flow
        self._model = model
        self.forced = sorted({s for s in flow.segments[1:] if 0 < s < len(flow.order)})
        for place in self.forced:
            glue = flow.prevents(place)
            if glue is not None:
                raise GraphError(
                    f"the outputs of the model cannot be told apart: {glue.why}; {glue.remedy}"
                )
        self.legal = [k for k in range(len(flow.order)) if k == 0 or flow.prevents(k) is None]
        self._begins = self._first_places()

    def _first_places(self) -> dict[str, int]:
        """Return by module the place of its first step."""
        begins: dict[str, int] = {}
        for place, i in enumerate(self._flow.order):
            for name in self._flow.names(i):
                begins.setdefault(name, place)
                for outer in _outer(name):  # a ModuleList is never called
                    begins.setdefault(outer, place)
        for i in sorted(self._flow.free):  # in no block: with what comes next
            following = (k for k, j in enumerate(self._flow.order) if j > i)
            for place in islice(following, 1):
                for name in self._flow.names(i):
                    begins.setdefault(name, place)
        return begins

    # -- by name --------------------------------------------------------------------------------

    def named(self, cuts: Iterable[str]) -> list[int]:
        """Return the places of `cuts` and the forced ones; raise GraphError for an unknown name."""
        return sorted({0, *self.forced, *(self._place(cut) for cut in cuts)})

    def _place(self, cut: str) -> int:
        place = self._begins.get(cut) if isinstance(cut, str) else None
        if place is None:
            raise GraphError(self._unknown(cut))
        glue = None if place == 0 else self._flow.prevents(place)
        if glue is not None:
            raise GraphError(f"no block can begin at {cut!r}: {glue.why}; {glue.remedy}")
        return place

    def _unknown(self, cut: object) -> str:
        for name, why in self._flow.trace.whole.items():
            if isinstance(cut, str) and cut.startswith(f"{name}."):
                return f"no block can begin at {cut!r}: {stays_whole(name, self._model, why)}"
        parts = dict(self._model.named_modules())
        if cut in parts and cut:
            inside = next((o for o in _outer(str(cut)) if o in self._begins), None)
            if inside is not None:
                kind = type(parts[inside]).__name__
                return (
                    f"no block can begin at {cut!r}, inside {inside!r} (a {kind}), which is one "
                    "step; cut before it or behind it"
                )
            return f"no block can begin at {cut!r}: the model never calls it"
        near = get_close_matches(str(cut), self._begins, n=3)
        modules = list(self._begins)
        more = f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else ""
        hint = f"; did you mean {' or '.join(map(repr, near))}? Known" if near else "; known"
        listed = f"{', '.join(modules[:SHOWN])}{more}"
        return f"cut {cut!r} is no module of the model{hint}: {listed}"

    # -- by rule --------------------------------------------------------------------------------

    def by_policy(self, policy: Policy) -> list[int]:
        """Return the places that `policy` chooses; raise GraphError for a name that is no place."""
        legal = set(self.legal)
        named: dict[int, list[str]] = {}
        for name, place in self._begins.items():
            if place in legal:
                named.setdefault(place, []).append(name)
        at = sorted(named)
        crossing = self._flow.crossing()
        starts = []
        for place, end in zip(at, [*at[1:], len(self._flow.order)], strict=True):
            starts.append(
                CutPlace(
                    tuple(named[place]),
                    int(self._cost(CutBalance.PARAMETERS, place, end)),
                    int(self._cost(CutBalance.ACTIVATIONS, place, end)),
                    crossing[place],
                )
            )
        chosen = policy(starts)
        if isinstance(chosen, str) or not isinstance(chosen, Iterable):
            raise GraphError(
                f"the partition's function returned {chosen!r:.60}; return the names of the "
                "modules that begin a block"
            )
        return self.named(chosen)

    def units(self) -> list[int]:
        """Return the places where units begin."""
        starts, legal = [0], {*self.legal}
        weighted = invertible = False  # the unit so far: has a layer; could be undone
        for place, i in enumerate(self._flow.order):
            module = self._module(i)
            is_layer = module is not None and self._flow.learned(i) > 0
            undoable = module is not None and bool(pieces_of(module))
            ends = weighted and (is_layer or (invertible and not undoable))
            if place and (place in self.forced or (ends and place in legal)):
                starts.append(place)
                weighted, invertible = False, undoable
            else:
                invertible = undoable and (invertible or place == 0)
            weighted = weighted or is_layer
        return starts

    def _module(self, i: int) -> nn.Module | None:
        """Return the module that an op calls."""
        node = self._flow.ops[i].node
        return self._model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def grouped(self, grouping: Grouping) -> list[int]:
        """Return the places where blocks begin by the grouping of locality."""
        if grouping is Grouping.NETWORK:
            return sorted({0, *self.forced})
        size = {Grouping.LAYER: 1, Grouping.GROUP: 2}[grouping]
        return [place for part in self._segments(self.units()) for place in part[::size]]

    def balanced(
        self,
        blocks: int,
        balance: CutBalance,
        seconds: Callable[[list[int]], list[float]],
        heads: int,
    ) -> list[int]:
        """Return the places where blocks of about equal cost begin.

        blocks: on the way from the input to an output, so that `heads` outputs make heads - 1
        blocks more. seconds: from places to the measured seconds of the runs that begin there.
        Raises GraphError for more blocks than there are places.
        """
        bounds = [*self._flow.segments, len(self._flow.order)]
        workless = sum(a == b for a, b in pairwise(bounds[1:]))  # outputs that shared work makes
        number = blocks + max(0, heads - max(1, workless))
        least = len(self.forced) + 1
        if number < least:
            raise GraphError(
                f"partition.blocks {blocks}: the model's outputs share work, and each of them is "
                f"predicted by a block of its own; use at least {least - heads + 1}"
            )
        units = self.units()
        pieces = units if number <= len(units) else sorted({*self.legal, *self.forced})
        if number > len(pieces):
            raise GraphError(self._too_many(blocks, len(pieces) - number + blocks))
        ends = [*pieces[1:], len(self._flow.order)]
        if balance is CutBalance.TIME:
            costs = seconds(pieces)
        else:
            costs = [self._cost(balance, a, b) for a, b in zip(pieces, ends, strict=True)]
        parts = [(part, [costs[pieces.index(p)] for p in part]) for part in self._segments(pieces)]
        counts = [1] * len(parts)
        while sum(counts) < number:  # one more where the slowest block is
            able = [j for j, (part, _) in enumerate(parts) if counts[j] < len(part)]
            worst = max(able, key=lambda j: _largest(parts[j][1], counts[j]))
            counts[worst] += 1
        return [
            part[k]
            for (part, alone), count in zip(parts, counts, strict=True)
            for k in balanced(alone, count)
        ]

    def _too_many(self, blocks: int, most: int) -> str:
        text = f"cannot cut the model into {blocks} blocks; use at most {most}"
        flow = self._flow
        glue = max(flow.glues, key=lambda g: g.last - g.first, default=None)
        if glue is not None:
            text += f" ({glue.why}; {glue.remedy})"
        for name, why in flow.trace.whole.items():
            text += f". {stays_whole(name, self._model, why)}"
        return text

    def _segments(self, places: Sequence[int]) -> list[list[int]]:
        bounds = [0, *self.forced, len(self._flow.order)]
        return [[p for p in places if a <= p < b] for a, b in pairwise(bounds)]

    def _cost(self, balance: CutBalance, first: int, end: int) -> float:
        flow = self._flow
        ops = flow.order[first:end]
        if balance is CutBalance.ACTIVATIONS:
            return float(sum(flow.real_numbers(i) for i in ops))
        return float(sum(flow.learned(i) for i in ops))

    # -- runs -----------------------------------------------------------------------------------

    def runs(self, starts: Sequence[int], names: Sequence[str]) -> list[OperationRun]:
        """Return the runs of operations that begin at `starts`.

        names: of the outputs; one without a name is predicted by the last block.
        """
        flow = self._flow
        bounds = [*flow.segments, len(flow.order)]
        runs: list[OperationRun] = []
        for segment, (a, b) in enumerate(pairwise(bounds)):
            inside = [s for s in starts if a <= s < b]
            ops = [tuple(flow.order[s:e]) for s, e in pairwise([*inside, b])]
            output = segment - 1 if len(bounds) > 2 else 0
            if output >= 0 and not ops:  # others go on from it
                ops = [()]
            for k, run in enumerate(ops):
                last = output >= 0 and k == len(ops) - 1
                states = sum(r.output is None for r in runs)
                name = names[output] if last and names[output] else f"block{states}"
                runs.append(OperationRun(name, run, output if last else None))
        return runs


def _outer(name: str) -> list[str]:
    """Return the modules around a module, innermost first."""
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(len(parts) - 1, 0, -1)]


def _largest(costs: Sequence[float], parts: int) -> float:
    starts = balanced(costs, parts)
    return max(sum(costs[a:b]) for a, b in zip(starts, [*starts[1:], len(costs)], strict=True))


def stays(whole: Mapping[str, Unfollowed], model: nn.Module) -> list[str]:
    """Return warnings about modules with several layers that could not be traced."""
    reasons = []
    for name, why in whole.items():
        part = model.get_submodule(name) if name else model
        learned = [m for m in part.modules() if len(m._parameters)]
        if len(learned) > 1:
            reasons.append(stays_whole(name, model, why))
    return reasons


def balanced(costs: Sequence[float], parts: int) -> list[int]:
    """Return the first indices of `parts` runs of neighbours with the least largest sum of costs.

    Every run has at least one element; among equal solutions the cuts are the earliest.
    """
    n = len(costs)
    if parts == n:
        return list(range(n))
    sums = [0.0, *accumulate(costs)]
    # best: of the elements before `end` in so many runs. It rises with the end, and the sum of the
    # last run falls with its start: the best start is where the two meet, which rises with the end.
    best = dict(enumerate(sums))
    cuts: list[dict[int, int]] = []
    for part in range(2, parts + 1):
        before, best = best, {}
        cuts.append({})
        start = part - 1
        for end in range(part, n - (parts - part) + 1):
            while start < end - 1 and before[start] < sums[end] - sums[start]:
                start += 1
            least, cut = max(before[start], sums[end] - sums[start]), start
            while cut >= part and sums[end] - sums[cut - 1] <= least:
                cut -= 1
                least = sums[end] - sums[cut]
            best[end], cuts[-1][end] = least, cut
    starts = [n]
    for by_end in reversed(cuts):
        starts.append(by_end[starts[-1]])
    return [0, *starts[:0:-1]]
