"""The knobs of locality, and the levels: named presets of the knobs (semantics.md).

    level       grouping  speed  presentation  moves           memory  update
    local       layer     1      hold          all             none    tick
    group       group     1      hold          all             none    tick
    delay-free  layer     depth  hold          layer-by-layer  none    tick
    trace       layer     1      pulse         -               trace   arrival
    backprop    layer     inf    pulse         -               trace   arrival

Combinations that cannot mean anything are refused here with the reason; those that do not fit a
particular graph are refused in schedule.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hamdist.config import (
    Compensation,
    DynamicsSettings,
    Grouping,
    LearningSettings,
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
from hamdist.errors import LevelError


@dataclass(frozen=True, slots=True)
class Locality:
    """Every knob, set. speed: hops per sample (semantics.md's c), `inf`, or `depth`: D + 1."""

    grouping: Grouping
    speed: Speed
    presentation: Presentation
    memory: Memory
    update: Update
    moves: Moves = Moves.ALL
    compensation: Compensation = Compensation.NONE
    delay_power: float = 0.5
    order: Order = Order.OMEGA_FIRST
    target: TargetOf = TargetOf.SAMPLE
    readout: Readout = Readout.OUTPUT

    @property
    def pulse(self) -> bool:
        return self.presentation is Presentation.PULSE


_HOLD = Locality(Grouping.LAYER, 1, Presentation.HOLD, Memory.NONE, Update.TICK)
_PULSE = Locality(Grouping.LAYER, 1, Presentation.PULSE, Memory.TRACE, Update.ARRIVAL)

PRESETS = {
    Level.LOCAL: _HOLD,
    Level.GROUP: replace(_HOLD, grouping=Grouping.GROUP),
    # Not the sequential order: with c tau = 1 a hidden block's costate is zero in the very tick in
    # which the block moves, so under it nothing below the last state block ever learns.
    Level.DELAY_FREE: replace(_HOLD, speed="depth", moves=Moves.LAYER_BY_LAYER),
    Level.TRACE: _PULSE,
    Level.BACKPROP: replace(_PULSE, speed="inf"),
}


def make_locality(level: Level, overrides: LocalityOverrides) -> Locality:
    """The preset of `level` with the knobs of `overrides` set.

    Raises LevelError where the knobs contradict each other.
    """
    given = {k: v for k, v in overrides if v is not None}
    if given.get("presentation") not in (None, PRESETS[level].presentation):
        # The other presentation brings its own memory and update, unless they are given as well.
        base = _PULSE if given["presentation"] is Presentation.PULSE else _HOLD
        given = {"memory": base.memory, "update": base.update, "moves": base.moves, **given}
    if "delay_power" in given:
        given.setdefault("compensation", Compensation.DELAY_SCALED)
    knobs = replace(PRESETS[level], **given)
    for reason in _contradictions(knobs):
        raise LevelError(f"level {level.value!r} cannot run with these knobs: {reason}")
    return knobs


def _contradictions(k: Locality) -> list[str]:
    """Why the knobs cannot go together (none: they can)."""
    reasons = []
    if k.pulse:
        if k.memory is Memory.NONE:
            reasons.append(
                "presentation 'pulse' with memory 'none': a message comes back when the sample has "
                "left the block, so the block must keep its activations; use memory 'trace'"
            )
        if k.update is not Update.ARRIVAL:
            reasons.append(
                f"presentation 'pulse' with update {k.update.value!r}: a pulse passes a block "
                "once; use update 'arrival'"
            )
        if k.moves is not Moves.ALL:
            reasons.append("moves 'layer-by-layer' belongs to presentation 'hold'")
        if k.order is not Order.OMEGA_FIRST:
            reasons.append(
                f"presentation 'pulse' with order {k.order.value!r}: a pulse computes the costate "
                "of a sample before the weights move; use order 'omega-first'"
            )
        if k.readout is not Readout.OUTPUT or k.target is not TargetOf.SAMPLE:
            reasons.append(
                "readout 'state' and target 'current' belong to presentation 'hold': a pulse "
                "always meets its own target in an output net"
            )
        return reasons
    if k.memory is not Memory.NONE:
        reasons.append(
            f"presentation 'hold' with memory {k.memory.value!r}: a held sample is still at the "
            "input when its message arrives; use memory 'none', or presentation 'pulse'"
        )
    if k.update is Update.ARRIVAL:
        reasons.append("presentation 'hold' with update 'arrival': messages arrive in every tick")
    if k.moves is Moves.LAYER_BY_LAYER:
        if k.speed != "depth":
            reasons.append(
                f"moves 'layer-by-layer' with speed {k.speed!r}: one sample takes as many ticks "
                "as the network is deep; use speed 'depth'"
            )
        if k.update is Update.LAST:
            reasons.append(
                "moves 'layer-by-layer' with update 'last-tick': in the last tick only the readout "
                "moves; use update 'tick'"
            )
    if k.order is Order.SEQUENTIAL and k.readout is Readout.OUTPUT:
        reasons.append(
            "order 'sequential' with readout 'output': this order compares the new state with the "
            "target inside one tick, so the last block needs the state; use readout 'state'"
        )
    return reasons


@dataclass(frozen=True, slots=True)
class Dynamics:
    """The constants of Hamilton's equations, all set (equations.md).

    tau: s; c, eta_z, eta_omega: 1/s; beta: rate of the weights; phi: scale of the loss; sign: s.
    """

    tau: float
    c: float
    eta_z: float
    eta_omega: float
    beta: float
    phi: float
    sign: int

    @property
    def step(self) -> float:
        """c tau: 1 makes a tick one hop (HL Eq. 9)."""
        return self.c * self.tau


def make_dynamics(
    dynamics: DynamicsSettings, learning: LearningSettings, knobs: Locality
) -> Dynamics:
    """The constants, with those not given taken from `learning` (HL Appendix E).

    Raises LevelError where they do not fit `knobs`.
    """
    d, tau = dynamics, dynamics.tau

    def first(*values: float | None) -> float:
        return next(v for v in values if v is not None)

    made = Dynamics(
        tau=tau,
        c=first(d.c, 1 / tau),
        eta_z=first(d.eta_z, d.eta, 0.0),
        eta_omega=first(d.eta_omega, d.eta, (1 - learning.momentum) / tau),
        beta=first(d.beta, learning.lr / tau),
        phi=first(d.phi, (1 - learning.dampening) / tau),
        sign=d.sign,
    )
    if made.step > 1 + 1e-12:
        raise LevelError(
            f"dynamics: c tau = {made.step:g} is above 1: the state would overshoot; "
            f"use c <= {1 / tau:g} or a smaller tau"
        )
    if knobs.pulse:
        for name, given, needed in (
            ("c tau", made.step, 1.0),
            ("eta_z", made.eta_z, 0.0),
            ("sign", made.sign, -1),
        ):
            if not math.isclose(given, needed, abs_tol=1e-12):
                raise LevelError(
                    f"dynamics: {name} = {given:g} with presentation 'pulse': a pulse is the "
                    f"travelling wave of {name} = {needed:g}; use presentation 'hold'"
                )
    return made
