"""The knobs of locality, and the levels: named presets of the knobs (docs: concepts/levels).

    level       grouping  speed  presentation  moves           memory  update
    local       layer     1      hold          all             none    tick
    group       group     1      hold          all             none    tick
    delay-free  layer     depth  hold          layer-by-layer  none    tick
    trace       layer     1      pulse         -               trace   arrival
    heads       layer     1      pulse         -               none    arrival, of the signal itself
    reversible  layer     inf    pulse         -               reversible  arrival
    backprop    layer     inf    pulse         -               trace   arrival
    pipeline    layer     inf    pulse, in M micro-batches     trace   arrival of the last one
    bptt        layer     inf    sequence      -               trace   sequence

Combinations that cannot mean anything are refused here with the reason; those that do not fit a
particular graph are refused in make.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from hamdist.config import (
    Compensation,
    Credit,
    Grouping,
    Level,
    LocalityOverrides,
    Memory,
    Moves,
    Order,
    Presentation,
    Readout,
    Speed,
    TargetOf,
    Update,
)
from hamdist.dynamics.schedule.rounds import OwnLevel
from hamdist.errors import LevelError


@dataclass(frozen=True, slots=True)
class Locality:
    """The value of every knob.

    speed: hops per sample (c in docs: concepts/time-and-signals), `inf`, or `depth`: D + 1.
    truncation: samples of a sequence in its reverse pass (None: all). gate: the tolerance of the
    stability gate, if there is one. lead, blend: see LocalityOverrides. microbatches: number of
    parts of a batch; a plan (runtime/plan/plan.py) has a number. accumulate: samples per step.
    clip: the largest norm of the gradient of all blocks together (a plan has it). own: a level of
    one's own, which says when samples enter, instead of `speed`.
    """

    grouping: Grouping
    speed: Speed
    presentation: Presentation
    memory: Memory
    update: Update
    moves: Moves = Moves.ALL
    credit: Credit = Credit.MESSAGES
    compensation: tuple[Compensation, ...] = ()
    delay_power: float = 0.5
    gate: float | None = None
    lead: float = 1.0
    blend: float = 1.5
    order: Order = Order.OMEGA_FIRST
    target: TargetOf = TargetOf.SAMPLE
    readout: Readout = Readout.OUTPUT
    truncation: int | None = None
    microbatches: int | Literal["auto"] = 1
    accumulate: int = 1
    clip: float = math.inf
    double_buffered: bool = False
    own: OwnLevel | None = None

    @property
    def pulse(self) -> bool:
        """Return True if a sample enters once and travels."""
        return self.presentation is Presentation.PULSE

    @property
    def hold(self) -> bool:
        """Return True if a sample stays at the input while states relax."""
        return self.presentation is Presentation.HOLD

    @property
    def sequence(self) -> bool:
        """Return True if whole sequences travel forward, then in reverse."""
        return self.presentation is Presentation.SEQUENCE


_HOLD = Locality(Grouping.LAYER, 1, Presentation.HOLD, Memory.NONE, Update.TICK)
_PULSE = Locality(Grouping.LAYER, 1, Presentation.PULSE, Memory.TRACE, Update.ARRIVAL)
_SEQUENCE = Locality(Grouping.LAYER, "inf", Presentation.SEQUENCE, Memory.TRACE, Update.SEQUENCE)
_BASES = {Presentation.HOLD: _HOLD, Presentation.PULSE: _PULSE, Presentation.SEQUENCE: _SEQUENCE}

PRESETS = {
    Level.LOCAL: _HOLD,
    Level.GROUP: replace(_HOLD, grouping=Grouping.GROUP),
    # Not the sequential order: with c tau = 1 a hidden block's costate is zero in the very tick in
    # which the block moves, so under it nothing below the last state block ever learns.
    Level.DELAY_FREE: replace(_HOLD, speed="depth", moves=Moves.LAYER_BY_LAYER),
    Level.TRACE: _PULSE,
    Level.HEADS: replace(_PULSE, memory=Memory.NONE, credit=Credit.HEADS),
    Level.REVERSIBLE: replace(_PULSE, speed="inf", memory=Memory.REVERSIBLE),
    Level.BACKPROP: replace(_PULSE, speed="inf"),
    Level.PIPELINE: replace(_PULSE, speed="inf", microbatches="auto"),
    Level.BPTT: _SEQUENCE,
}


STILL = 0.1  # of its norm, by which a still input may change from tick to tick
_ASKS = {
    "delay_power": Compensation.DELAY_SCALED,
    "lead": Compensation.PROSPECTIVE,
    "blend": Compensation.RETROSPECTIVE,
}


def make_locality(level: Level, overrides: LocalityOverrides) -> Locality:
    """Return the preset of `level` with the knobs of `overrides` set.

    Raises LevelError where the knobs contradict each other.
    """
    if level is Level.AUTO:
        raise LevelError(
            "level 'auto' is chosen by `train`, from the stream and the network; name a level here"
        )
    overridden = {k: v for k, v in overrides if v is not None}
    own_level = overridden.pop("level", None)
    if own_level is not None and overridden.setdefault("speed", 1) != 1:
        raise LevelError(
            f"locality.level {own_level!r} says when samples enter, and so does locality.speed "
            f"{overrides.speed!r}: leave one of them out"
        )
    if overridden.get("presentation") not in (None, PRESETS[level].presentation):
        # The other presentation brings its own memory and update, unless they are given as well.
        base = _BASES[overridden["presentation"]]
        fields = {"memory": base.memory, "update": base.update, "moves": base.moves}
        overridden = {**fields, "credit": base.credit, **overridden}
        if base is _SEQUENCE:
            overridden = {"speed": base.speed, **overridden}
    needed = {knob: compensation for knob, compensation in _ASKS.items() if knob in overridden}
    implied = ""
    if needed and "compensation" not in overridden:
        overridden["compensation"] = tuple(needed.values())
        implied = "".join(
            f"locality.{k} stands for compensation {c.value!r}; " for k, c in needed.items()
        )
    if Compensation.WEIGHT_PREDICTION in overridden.get("compensation", ()):
        overridden.setdefault("memory", Memory.TRACE_WEIGHTS)
    if overridden.get("double_buffered"):
        overridden.setdefault("memory", Memory.TRACE_WEIGHTS)
    if isinstance(overridden.get("gate"), bool):
        overridden["gate"] = STILL if overridden["gate"] else None
    knobs = replace(PRESETS[level], **overridden)
    if own_level is not None and not knobs.pulse:
        raise LevelError(
            f"locality.level {own_level!r} with presentation {knobs.presentation.value!r}: a level "
            "of one's own says when pulses pass; use level trace, heads, backprop or reversible"
        )
    for reason in _contradictions(knobs):
        raise LevelError(f"level {level.value!r} cannot run with these knobs: {implied}{reason}")
    return knobs


def _contradictions(k: Locality) -> list[str]:
    """Return the reasons for which the knobs cannot go together (none: they can)."""
    presented, memory, update = k.presentation.value, k.memory.value, k.update.value
    layered = k.moves is Moves.LAYER_BY_LAYER
    reasons = {
        f"truncation {k.truncation} with presentation {presented!r}: only a sequence is gone "
        "through in reverse; use level 'bptt'": k.truncation is not None and not k.sequence,
        f"microbatches {k.microbatches} with presentation {presented!r}, speed {k.speed!r} and "
        f"credit {k.credit.value!r}: the parts of a batch travel one behind the other before any "
        "weight moves; use presentation 'pulse', speed 'inf' and credit 'messages' (level "
        "'pipeline')": k.microbatches != 1
        and not (k.pulse and k.speed == "inf" and k.credit is Credit.MESSAGES),
        **_against_accumulation(k),
        **(_against_sequence(k) if k.sequence else _against_recipes(k)),
        f"update 'sequence' with presentation {presented!r}: it belongs to presentation "
        "'sequence' (level 'bptt')": k.update is Update.SEQUENCE and not k.sequence,
        f"memory 'reversible' with presentation {presented!r}: inputs are recomputed when a "
        "message comes back; use presentation 'pulse' (level 'reversible')": k.hold
        and k.memory is Memory.REVERSIBLE,
        f"credit 'heads' with presentation {presented!r} and memory {memory!r}: each block learns "
        "in the tick in which a sample passes it, so nothing is held and nothing is kept; use "
        "presentation 'pulse' and memory 'none' (level 'heads'), or learning.heads beside the "
        "messages of level 'trace'": k.credit is Credit.HEADS
        and not k.sequence
        and (k.hold or k.memory is not Memory.NONE),
    }
    if k.pulse:
        reasons |= {
            "presentation 'pulse' with memory 'none': a message comes back when the sample has "
            "left the block, so the block must keep its activations; use memory "
            "'trace'": k.memory is Memory.NONE and k.credit is Credit.MESSAGES,
            f"presentation 'pulse' with update {update!r}: a pulse passes a block once; use "
            "update 'arrival'": k.update is not Update.ARRIVAL,
            "moves 'layer-by-layer' belongs to presentation 'hold'": layered,
            f"presentation 'pulse' with order {k.order.value!r}: a pulse computes the costate of a "
            "sample before the weights move; use order 'omega-first'": k.order
            is not Order.OMEGA_FIRST,
            "readout 'state' and target 'current' belong to presentation 'hold': a pulse always "
            "meets its own target in an output net": k.readout is not Readout.OUTPUT
            or k.target is not TargetOf.SAMPLE,
        }
    elif k.hold:
        reasons |= {
            f"presentation 'hold' with memory {memory!r}: a held sample is still at the input when "
            "its message arrives; use memory 'none', or presentation "
            "'pulse'": k.memory is not Memory.NONE,
            "presentation 'hold' with update 'arrival': messages arrive in every tick": k.update
            is Update.ARRIVAL,
            f"moves 'layer-by-layer' with speed {k.speed!r}: one sample takes as many ticks as the "
            "network is deep; use speed 'depth'": layered and k.speed != "depth",
            "moves 'layer-by-layer' with update 'last-tick': in the last tick only the readout "
            "moves; use update 'tick'": layered and k.update is Update.LAST,
        }
    return [reason for reason, holds in reasons.items() if holds]


def _against_accumulation(k: Locality) -> dict[str, bool]:
    """Return the reasons against one step for several samples, and whether they hold."""
    presented = k.presentation.value
    whole = k.memory is Memory.TRACE_WEIGHTS and k.pulse and k.microbatches == 1
    return {
        f"accumulate {k.accumulate} with presentation {presented!r} and credit "
        f"{k.credit.value!r}: it counts the messages between two steps of a block; use "
        "presentation 'pulse' and credit 'messages' (levels 'trace', 'backprop', "
        "'pipeline')": k.accumulate != 1 and not (k.pulse and k.credit is Credit.MESSAGES),
        f"double_buffered with presentation {presented!r}, memory {k.memory.value!r} and "
        f"microbatches {k.microbatches}: a message meets the weights of its forward pass; use "
        "memory 'trace+weights' of whole samples (level 'trace')": k.double_buffered and not whole,
        "double_buffered with compensation 'weight-prediction': both say which weights a sample "
        "meets; leave one out": k.double_buffered
        and Compensation.WEIGHT_PREDICTION in k.compensation,
    }


def _against_recipes(k: Locality) -> dict[str, bool]:
    """Return the reasons against a gate or a compensation, and whether they hold."""
    presented, methods = k.presentation.value, k.compensation
    all_move = k.hold and k.update is Update.TICK and k.moves is Moves.ALL
    return {
        f"gate with presentation {presented!r}, update {k.update.value!r} and moves "
        f"{k.moves.value!r}: it picks the ticks in which a held input is still; use "
        "presentation 'hold', update 'tick' and moves 'all' (levels 'local', "
        "'group')": k.gate is not None and not all_move,
        **{
            f"compensation {method.value!r} with presentation {presented!r}: signals of one "
            "sample meet there anyway; use presentation 'hold' (level "
            "'local')": method in methods and not k.hold
            for method in (Compensation.PROSPECTIVE, Compensation.RETROSPECTIVE)
        },
        "compensation 'retrospective' with order 'sequential', whose gradient takes the costate "
        "of the next tick; use order 'omega-first'": Compensation.RETROSPECTIVE in methods
        and k.order is Order.SEQUENTIAL,
        f"compensation 'weight-prediction' with memory {k.memory.value!r}: a message meets the "
        "weights that were expected for it, so a block keeps them; use memory 'trace+weights' "
        "(level 'trace')": Compensation.WEIGHT_PREDICTION in methods
        and k.memory is not Memory.TRACE_WEIGHTS,
    }


def _against_sequence(k: Locality) -> dict[str, bool]:
    """Return the reasons against knobs of presentation 'sequence', and whether they hold."""
    needed = {
        "speed": "inf",
        "memory": Memory.TRACE,
        "update": Update.SEQUENCE,
        "moves": Moves.ALL,
        "order": Order.OMEGA_FIRST,
        "compensation": (),
        "credit": Credit.MESSAGES,
        "gate": None,
        "readout": Readout.OUTPUT,
        "target": TargetOf.SAMPLE,
    }
    return {
        f"presentation 'sequence' with {name} {_word(getattr(k, name))!r}: a sequence travels "
        "forward with its states kept, then back, and the weights move once; use "
        f"{name} {_word(need)!r}": getattr(k, name) != need
        for name, need in needed.items()
    }


def _word(value: object) -> object:
    """Return a knob's value as a user writes it."""
    if isinstance(value, tuple):
        return ", ".join(str(_word(entry)) for entry in value) or "none"
    return "off" if value is None else getattr(value, "value", value)
