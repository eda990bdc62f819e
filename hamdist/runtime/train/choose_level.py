"""Level `auto`: chooses the level, the scaling of steps and the averaging, with reasons.

Measured on prototypes (learning on Fashion-MNIST; docs: concepts/staleness), with S samples over
which the stream decorrelates, c ticks a sample, D the depth of the readout, L = D + 1 blocks, B
rows a batch:

    local      where S c >= 2.5 * 2D: a block without memory then equals backpropagation
    trace      where it is less: each message meets the activations of its own sample
    heads      where it is less and `locality.memory: none` forbids a trace
    backprop   where D = 0 (nothing is late), or `locality.speed: inf` waits for every message
    bptt       where blocks read their own past and the stream marks the ends of sequences
    steps      lr / (1 + d)^p,  p = 0.25 at L = 5, 0.5 at L = 20 (trace); 0.5 (local)
    axes       Adam's step of 0.003 in rotated axes (`learning.inputs`) at level trace, where
               messages are 32 samples late or later, `learning` says nothing of steps, and an
               update takes at most 8 times the products of a plain one (evidence/studies)
    averaging  decay 0.99 at B = 32, 0.9995 at B = 1, over a tenth of the run at most; only where
               the step size does not fall anyway

Values that the settings give are kept.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hamdist.config import Credit, Decay, Level, Memory, Presentation, Settings, merge
from hamdist.dynamics.graph.graph import Graph
from hamdist.errors import ChoiceWarning
from hamdist.streams.replay import samples_from
from hamdist.streams.sample import Sample, Stream
from hamdist.streams.smoothness import MOST_SAMPLES, Smoothness
from hamdist.streams.wrappers.derived import Derived

ROUND_TRIPS = 2.5
SHARE_OF_THE_RUN = 10
LATE = 32  # samples from which on Adam's axes are turned
COST = 8.0  # times the products of a plain update, at most
ROTATED = {"lr": 0.003, "adaptive": {}, "inputs": {"rule": "rotated"}}
_OF_AVERAGES = {"average", "decay", "floor", "warmup", "clip"}  # settings that say nothing of steps


@dataclass(frozen=True)
class LevelFacts:
    """Facts that the choice depends on.

    Attributes:
        depth: D; batch: rows.
        frames: S (None: unknown).
        ends: the stream marks the ends of sequences.
        layers: inputs and outputs of each linear layer.
        own_steps: an optimiser or rules come as code, or blocks share weights.
    """

    depth: int
    batch: int
    frames: float | None = None
    acyclic: bool = True
    ends: bool = False
    layers: Sequence[tuple[int, int]] = ()
    own_steps: bool = False


def settings_at_level(settings: Settings, seen: LevelFacts) -> tuple[Settings, list[str]]:
    """Return `settings` at the level that fits, with its own values, and the reasons."""
    level, reason = _level(settings, seen)
    why = [f"level {level.value!r}: {reason}"]
    at_level = settings.for_level(level)
    over: dict[str, Any] = {}
    for fields, reasons in (
        _scaling(at_level, level, seen),
        _axes(at_level, level, seen),
        _averaging(at_level, seen),
    ):
        over = merge(over, fields)
        why += reasons
    raw = at_level.model_dump(mode="json", exclude_unset=True)
    return Settings.model_validate(merge(raw, over)), why


def _level(settings: Settings, seen: LevelFacts) -> tuple[Level, str]:
    locality = settings.locality
    trip = 2 * seen.depth
    if locality.memory is Memory.REVERSIBLE:
        return Level.REVERSIBLE, "locality.memory is 'reversible'"
    if locality.credit is Credit.HEADS:
        return Level.HEADS, "locality.credit is 'heads'"
    if not seen.acyclic or locality.presentation is Presentation.SEQUENCE:
        if seen.ends or locality.presentation is Presentation.SEQUENCE:
            return Level.BPTT, "blocks read their own past, and the stream marks ends of sequences"
        return Level.LOCAL, "the graph has cycles, through which no pulse travels"
    if trip == 0:
        return Level.BACKPROP, "one block has its loss at once, so nothing is late"
    if locality.speed == "inf" and locality.presentation is not Presentation.HOLD:
        return Level.BACKPROP, "locality.speed 'inf' waits for every message"
    c = locality.speed if isinstance(locality.speed, int) else 1
    needed = ROUND_TRIPS * trip
    if seen.frames is None:
        measured, smooth = "the smoothness of the stream is not known", False
    else:
        ticks = seen.frames * c
        smooth = ticks >= needed
        over = "or more " if seen.frames >= MOST_SAMPLES else ""
        measured = (
            f"the stream decorrelates over about {seen.frames:.3g} samples {over}of {c} tick(s), "
            f"{'not less' if smooth else 'less'} than {ROUND_TRIPS} round trips of {trip} ticks"
        )
    if locality.presentation is Presentation.HOLD:
        return Level.LOCAL, "locality.presentation is 'hold'"
    wants_trace = locality.memory in (Memory.TRACE, Memory.TRACE_WEIGHTS)
    if smooth and not wants_trace and locality.presentation is not Presentation.PULSE:
        return Level.LOCAL, f"{measured}, so no memory is needed"
    if locality.memory is Memory.NONE:
        return Level.HEADS, f"{measured}, and locality.memory 'none' forbids a trace"
    return Level.TRACE, f"{measured}, so messages have to meet their own samples' activations"


def _scaling(
    settings: Settings, level: Level, seen: LevelFacts
) -> tuple[dict[str, Any], list[str]]:
    if level not in (Level.TRACE, Level.LOCAL) or not seen.depth:
        return {}, []
    if settings.locality.compensation is not None or settings.locality.delay_power is not None:
        return {}, []
    power = 0.5
    if level is Level.TRACE:
        power = min(0.5, max(0.0, 0.25 + 0.125 * math.log2((seen.depth + 1) / 5)))
    power = round(power, 2)
    if not power:
        return {}, []
    reason = (
        f"steps divided by (1 + delay)^{power:g}: messages are up to {2 * seen.depth} ticks late"
    )
    return {"locality": {"compensation": "delay-scaled", "delay_power": power}}, [reason]


def _axes(settings: Settings, level: Level, seen: LevelFacts) -> tuple[dict[str, Any], list[str]]:
    """Turn Adam's axes where messages are late by dozens of samples, and nothing asks for others.

    Beside the three products of B rows with a weight of m x n an update takes four with square
    matrices: it costs 1 + 2 (m + n) / (3 B) times as much.
    """
    learning, locality = settings.learning, settings.locality
    c = locality.speed if isinstance(locality.speed, int) else 1
    late, weights = 2 * seen.depth // c, sum(m * n for m, n in seen.layers)
    stepped = bool(learning.model_fields_set - _OF_AVERAGES) or locality.double_buffered
    stepped = stepped or seen.own_steps
    if level is not Level.TRACE or late < LATE or stepped or locality.compensation or not weights:
        return {}, []
    more = sum(2 * m * n * (m + n) for m, n in seen.layers)
    cost = 1 + more / (3 * seen.batch * weights)
    if cost > COST:
        return {}, [
            f"plain steps: messages are {late} samples late, but Adam's steps along the axes of "
            f"inputs and costates would take {cost:.0f} times the products (learning.inputs)"
        ]
    return {"learning": ROTATED}, [
        f"Adam's steps of {ROTATED['lr']} along the axes of inputs and costates (learning.inputs "
        f"'rotated'): messages are {late} samples late, and learning says nothing of steps; an "
        f"update takes {cost:.1f} times the products of a plain one (learning.lr keeps plain steps)"
    ]


def _averaging(settings: Settings, seen: LevelFacts) -> tuple[dict[str, Any], list[str]]:
    learning = settings.learning
    if "average" in learning.model_fields_set or learning.decay is not Decay.NONE:
        return {}, []
    new = min(0.01, 0.0005 * seen.batch ** math.log(20, 32))
    if settings.steps is not None:
        new = max(new, min(1.0, SHARE_OF_THE_RUN / settings.steps))
    decay = float(f"{1 - new:.6g}")
    reason = (
        f"weights averaged with decay {decay:g} for evaluation: batches of {seen.batch}, and the "
        "step size does not fall (learning.decay)"
    )
    return {"learning": {"average": {"decay": decay}}}, [reason]


def resolved(
    settings: Settings,
    stream: Stream,
    graph_of: Callable[[Settings], Graph],
    *,
    own_steps: bool = False,
) -> tuple[Settings, Stream, list[str]]:
    """Replace level `auto` by the level that fits.

    Each reason is also issued as a `ChoiceWarning`.

    Args:
        settings: of any level.
        stream: its first samples are read.
        graph_of: cuts the model.
        own_steps: an optimiser or rules come as code.

    Returns:
        The settings, the stream with its first samples put back, and the reasons.
    """
    graph = graph_of(settings.changed(level=Level.TRACE))
    paced = settings.stream.pace is not None  # looking ahead would take its time
    frames, ends = None, False
    if not paced:
        stream, frames, ends = inspect_stream(stream, settings.steps)
    modules = [m for b in graph.blocks.values() if b.module is not None for m in b.module.modules()]
    layers = [(m.in_features, m.out_features) for m in modules if isinstance(m, nn.Linear)]
    own_steps = own_steps or bool(graph.shared)
    batch = stream.spec.batch
    seen = LevelFacts(graph.depth, batch, frames, graph.acyclic, ends, layers, own_steps)
    level_settings, why = settings_at_level(settings, seen)
    for text in why:
        warnings.warn(ChoiceWarning(f"auto: {text}"), stacklevel=4)
    return level_settings, stream, why


def inspect_stream(stream: Stream, steps: int | None) -> tuple[Stream, float | None, bool]:
    """Return the stream, first samples put back, their S, and True if one ends a sequence.

    No more than `steps` are read: an iterator may have another use for the others.
    """
    samples = stream.samples()
    first = list(itertools.islice(samples, min(MOST_SAMPLES, steps or MOST_SAMPLES)))
    smoothness = Smoothness()
    for sample in first:
        smoothness.observe(sample.u)
    ends = any(sample.end for sample in first)
    again = stream if stream.portable else _Again(stream, first, samples)
    return again, smoothness.frames, ends


class _Again(Derived):
    """A stream whose first samples were read ahead: the first iteration gives them again. Later
    iterations give what the stream then gives: the rest, if it cannot be repeated."""

    def __init__(self, stream: Stream, first: list[Sample], rest: Iterator[Sample]) -> None:
        super().__init__(stream)
        self._samples = itertools.chain(first, rest)
        self._repeats = False

    def samples(self) -> Iterator[Sample]:
        again, self._repeats = self._repeats, True
        return iter(self._stream.samples()) if again and self.replays else self._samples

    def samples_from(self, n: int) -> Iterator[Sample]:
        """Yield `samples()` without its first n samples; for a stream that replays."""
        return samples_from(self._stream, n)
