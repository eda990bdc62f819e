"""The constants of Hamilton's equations, of a run and of each block (docs: concepts/equations).

    tau_k   s     step of integration       c    1/s   speed of propagation, c tau in (0, 1]
    eta     1/s   dissipation of z, omega   beta       rate of the weights
    phi_k         scale of the loss         s          sign: -1 Hamiltonian Learning, +1 Hamilton

What settings leave open follows from gradient descent (HL Appendix E): with rate gamma, momentum mu
and dampening rho, beta = gamma/tau, eta_omega = (1 - mu)/tau, phi = (1 - rho)/tau; the first
momentum step of PyTorch is not dampened, so there phi = 1/tau for the first loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias, TypeVar

from hamdist.config import (
    AdaptiveSettings,
    AverageSettings,
    BlockDynamicsSettings,
    BlockLearningSettings,
    ClipSettings,
    Compensation,
    CourseSettings,
    DynamicsSettings,
    FirstStep,
    InputsSettings,
    LearningSettings,
    Reset,
    ResetSettings,
)
from hamdist.dynamics.graph.patterns import check_patterns, fitting
from hamdist.dynamics.schedule.levels import Locality
from hamdist.errors import LevelError

TOLERANCE = 1e-12

TickSchedule: TypeAlias = Callable[[int], float]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Constant:
    """The same value at every tick."""

    value: float

    def __call__(self, k: int) -> float:  # noqa: ARG002
        return self.value


@dataclass(frozen=True)
class Dynamics:
    """The constants of the equations of a run, or of one of its blocks.

    tau: by tick; None where the stream's time stamps give it. phi: by tick, where the
    presentation is not 'hold' by sample; first_phi: for the first loss that a readout takes (in a
    sequence: for all losses of the first one), if not None.
    beta: of the weights; betas: of those whose name is given, or fits a pattern: the first one.
    weight_cost: r_w; first_cost: of the first update, if not None. decay: of the weights, beside
    adaptive steps. momentum: the share of omega that a sequence takes over from the one before it
    (presentation 'sequence'). adaptive: beta by weight, as Adam has it. reset, limit: see
    DynamicsSettings. average: of the weights; clip: the most that |tau g| may be; ahead: momentum
    looks ahead (weights.py); inputs: how steps precondition a layer's inputs (whitening.py).
    blocks, learning: overrides by pattern, for `of`. per_lr: beta at a learning rate of 1.
    """

    tau: TickSchedule | None
    c: float
    eta_z: float
    eta_omega: float
    beta: float
    phi: TickSchedule
    sign: int = -1
    first_phi: float | None = None
    betas: tuple[tuple[str, float], ...] = ()
    weight_cost: float = 0.0
    first_cost: float | None = None
    decay: float = 0.0
    momentum: float = 0.0
    adaptive: AdaptiveSettings | None = None
    reset: ResetSettings = field(default_factory=lambda: ResetSettings(h=Reset.NEVER))
    limit: float = math.inf
    average: AverageSettings | None = None
    clip: float = math.inf
    ahead: bool = False
    inputs: InputsSettings | None = None
    blocks: Mapping[str, BlockDynamicsSettings] = field(default_factory=dict)
    learning: Mapping[str, BlockLearningSettings] = field(default_factory=dict)
    per_lr: float = 1.0

    def of(self, block: str) -> Dynamics:
        """Return the constants of `block`."""
        pattern = fitting(block, self.learning)
        d = self if pattern is None else self._learning(self.learning[pattern])
        pattern = fitting(block, self.blocks)
        return replace(d, blocks={}) if pattern is None else d._with(self.blocks[pattern])

    def _learning(self, learning: BlockLearningSettings) -> Dynamics:
        return replace(
            self,
            beta=self.beta if learning.lr is None else learning.lr * self.per_lr,
            average=self.average if learning.average is None else _unless_off(learning.average),
            clip=self.clip if learning.clip is None else _clip(learning.clip),
            inputs=self.inputs if learning.inputs is None else _unless_off(learning.inputs),
            learning={},
        )

    def _with(self, constants: BlockDynamicsSettings) -> Dynamics:
        betas = tuple(constants.beta.items()) if isinstance(constants.beta, dict) else ()
        return replace(
            self,
            c=_first(constants.c, self.c),
            eta_z=_first(constants.eta_z, constants.eta, self.eta_z),
            eta_omega=_first(constants.eta_omega, constants.eta, self.eta_omega),
            beta=_first(constants.beta if isinstance(constants.beta, float) else None, self.beta),
            betas=betas,
            blocks={},
        )

    def rates(self, names: Sequence[str]) -> list[float]:
        """Return beta of each parameter, by its name in the block."""
        rates = dict(self.betas)
        patterns = [fitting(name, rates) for name in names]
        return [self.beta if p is None else rates[p] for p in patterns]

    def speeds(self) -> list[float]:
        """Return every c of the run."""
        return [self.c, *(b.c for b in self.blocks.values() if b.c is not None)]

    @property
    def clocked(self) -> bool:
        """Return True if the stream has to send every block the time, or the end of a sequence."""
        r = self.reset
        return self.tau is None or Reset.SEQUENCE in (r.h, r.z, r.omega)


def _unless_off(settings: T | Literal["off"]) -> T | None:
    return None if settings == "off" else settings


def _clip(limit: float | ClipSettings | str) -> float:
    clip = limit.norm if isinstance(limit, ClipSettings) and limit.of == "block" else limit
    return clip if isinstance(clip, float) else math.inf  # (of the network: Block.step)


def _first(*values: float | None) -> float:
    return next(v for v in values if v is not None)


def make_dynamics(
    dynamics: DynamicsSettings,
    learning: LearningSettings,
    knobs: Locality,
    *,
    phi: TickSchedule | None = None,
) -> Dynamics:
    """Return the constants, with those not given taken from `learning`.

    phi: a function of the tick (of the sample, where the presentation is not 'hold'), instead of
    `dynamics.phi`. Raises LevelError where they do not fit `knobs`.
    """
    d = dynamics
    tau: TickSchedule | None
    if isinstance(d.tau, CourseSettings):
        largest, tau = max(d.tau.values), d.tau
        if min(d.tau.values) <= 0:
            raise LevelError("dynamics.tau: every step of integration is above 0 seconds")
    elif d.tau == "stamps":
        largest, tau = _unknown_tau(d, phi), None
    else:
        largest, tau = d.tau, Constant(d.tau)
    course, first_phi = _phi(d, learning, largest) if phi is None else (phi, None)
    forgets = (1 - learning.momentum) / largest
    dampens = learning.momentum or learning.first_step is FirstStep.DAMPENED
    cost = learning.weight_decay * (1 - learning.dampening if dampens else 1) / largest
    if learning.adaptive is not None:
        cost = 0.0
    if learning.weight_decay and d.weight_cost:
        raise LevelError(
            "learning.weight_decay and dynamics.weight_cost are the same term of the Hamiltonian: "
            "give one of them"
        )
    result = Dynamics(
        tau=tau,
        c=_first(d.c, 1 / largest),
        eta_z=_first(d.eta_z, d.eta, 0.0),
        eta_omega=_first(d.eta_omega, d.eta, 0.0 if knobs.sequence else forgets),
        beta=_first(d.beta, learning.lr / largest),
        phi=course,
        sign=d.sign,
        first_phi=first_phi,
        weight_cost=d.weight_cost or cost,
        first_cost=None if first_phi is None else learning.weight_decay / largest,
        decay=0.0 if learning.adaptive is None else learning.weight_decay,
        momentum=learning.momentum if knobs.sequence else 0.0,
        adaptive=learning.adaptive,
        reset=_reset(d.reset, knobs),
        limit=d.limit,
        average=_unless_off(learning.average),
        clip=_clip(learning.clip),
        inputs=_unless_off(learning.inputs),
        ahead=Compensation.LOOK_AHEAD in knobs.compensation,
        blocks=d.blocks,
        learning=learning.blocks,
        per_lr=1 / largest if learning.blocks else 1.0,
    )
    _check(result, None if tau is None else largest, knobs)
    return result


def _unknown_tau(d: DynamicsSettings, phi: TickSchedule | None) -> float:
    """Return a stand-in for tau where only the stream has it: nothing may follow from it."""
    names = {
        "c": d.c is not None,
        "beta": d.beta is not None,
        "phi": d.phi is not None or phi is not None,
        "eta": d.eta is not None or d.eta_omega is not None,
    }
    open_ = [name for name, is_known in names.items() if not is_known]
    if open_:
        raise LevelError(
            "dynamics.tau 'stamps': the step is known only when the stream runs, so nothing can "
            f"follow from it; give dynamics.{', dynamics.'.join(open_)} as well"
        )
    return 1.0


def _phi(
    d: DynamicsSettings, learning: LearningSettings, tau: float
) -> tuple[TickSchedule, float | None]:
    """Return the curve of phi, and phi of the first loss where it differs."""
    if isinstance(d.phi, CourseSettings):
        return d.phi, None
    if d.phi is not None:
        return Constant(d.phi), None
    dampened = Constant((1 - learning.dampening) / tau)
    if learning.first_step is FirstStep.DAMPENED or not learning.dampening:
        return dampened, None
    if not learning.momentum:  # PyTorch then ignores the dampening
        return Constant(1 / tau), None
    return dampened, 1 / tau


def _reset(reset: ResetSettings, knobs: Locality) -> ResetSettings:
    """Return `reset` with defaults for the fields that are not given."""
    if reset.h is not None:
        return reset
    h = Reset.SEQUENCE if knobs.sequence else Reset.NEVER
    return reset.model_copy(update={"h": h})


def _check(d: Dynamics, tau: float | None, knobs: Locality) -> None:
    for block, c in (("", d.c), *((p, b.c) for p, b in d.blocks.items())):
        if c is not None and tau is not None and c * tau > 1 + TOLERANCE:
            where = f"dynamics.blocks.{block}" if block else "dynamics"
            raise LevelError(
                f"{where}: c tau = {c * tau:g} is above 1: the state would overshoot; "
                f"use c <= {1 / tau:g} or a smaller tau"
            )
    _check_recipes(d, tau, knobs)
    if not knobs.hold:
        _check_wave(d, tau, knobs)


def _check_recipes(d: Dynamics, tau: float | None, knobs: Locality) -> None:
    """Check the recipes of `learning` against the other settings."""
    clip = min([d.clip, *(_clip(b.clip) for b in d.learning.values() if b.clip is not None)])
    rules = [d.inputs, *(_unless_off(b.inputs or "off") for b in d.learning.values())]
    names = {
        "learning.adaptive": d.adaptive is not None,
        f"learning.clip {clip:g}": clip < math.inf,
        "learning.inputs": any(rules),
    }
    each = [d, *(d._with(block) for block in d.blocks.values())]
    at_rest = tau is not None and any(abs(1 - tau * k.eta_omega) <= TOLERANCE for k in each)
    along = {
        "weight-prediction": Compensation.WEIGHT_PREDICTION in knobs.compensation,
        "look-ahead": d.ahead,
    }
    reasons = {
        **{
            f"{name} with presentation 'sequence', whose omega gathers the gradients of a whole "
            "sequence before the weights move: leave it out, or use another "
            "presentation": is_set and knobs.sequence
            for name, is_set in names.items()
        },
        "learning.inputs 'rotated' turns the axes of Adam's step: set learning.adaptive {} "
        "(with learning.weight_decay AdamW), and no learning.optimizer": d.adaptive is None
        and any(rule and rule.rotated for rule in rules),
        **{
            f"compensation {name!r} with learning.adaptive, whose steps are not along omega: "
            "leave one of them out": is_set and d.adaptive is not None
            for name, is_set in along.items()
        },
        "compensation 'look-ahead' without momentum: there is nothing that could carry the weights "
        "ahead; set learning.momentum (or dynamics.eta_omega below 1/tau)": d.ahead and at_rest,
    }
    for reason in (text for text, holds in reasons.items() if holds):
        raise LevelError(reason)


def _check_wave(d: Dynamics, tau: float | None, knobs: Locality) -> None:
    """Check that a pulse and a sequence are the travelling wave: c tau = 1 everywhere, s = -1."""
    name = knobs.presentation.value
    if tau is None or not isinstance(d.tau, Constant):
        raise LevelError(
            f"dynamics.tau changes from tick to tick with presentation {name!r}: a travelling wave "
            "makes one hop a tick; use presentation 'hold'"
        )
    if knobs.sequence:
        _check_sequence(d.reset)
    elif d.reset != _reset(ResetSettings(), knobs):
        raise LevelError(
            "dynamics.reset with presentation 'pulse': every sample has states and costates of its "
            "own there, and momentum 0 clears omega; use presentation 'hold'"
        )
    each = [d, *(d._with(block) for block in d.blocks.values())]
    needs: list[tuple[str, list[float], float]] = [
        ("c tau", [k.c * tau for k in each], 1.0),
        ("sign", [d.sign], -1.0),
    ]
    if knobs.pulse:
        needs.append(("eta_z", [k.eta_z for k in each], 0.0))
    for constant, current, needed in needs:
        for value in current:
            if not math.isclose(value, needed, abs_tol=TOLERANCE):
                raise LevelError(
                    f"dynamics: {constant} = {value:g} with presentation {name!r}: a {name} is the "
                    f"travelling wave of {constant} = {needed:g}; use presentation 'hold'"
                )


def constant_tau(dynamics: Dynamics) -> float:
    """Return tau of a travelling wave, the same at every tick (checked by `make_dynamics`)."""
    if dynamics.tau is None:
        raise LevelError("a travelling wave needs a constant dynamics.tau")
    return dynamics.tau(0)


def _check_sequence(reset: ResetSettings) -> None:
    if reset.h is Reset.SAMPLE:
        raise LevelError(
            "dynamics.reset.h 'sample' with presentation 'sequence': a token begins with the "
            "states of the token before it; use 'sequence', or 'never', which goes on over the end "
            "of a sequence"
        )
    for name, value in (("z", reset.z), ("omega", reset.omega)):
        if value is not Reset.NEVER:
            raise LevelError(
                f"dynamics.reset.{name} {value.value!r} with presentation 'sequence': each way "
                "back begins with z = 0 and omega = momentum times omega; leave it out, and set "
                "learning.momentum"
            )


def check_names(dynamics: Dynamics, parameters: Mapping[str, Iterable[str]]) -> None:
    """Raise LevelError for a pattern in `dynamics.blocks` without a block or parameter.

    parameters: their names, by block.
    """
    check_patterns("dynamics.blocks", dynamics.blocks, parameters, "block", LevelError)
    check_patterns("learning.blocks", dynamics.learning, parameters, "block", LevelError)
    for block in parameters:
        a, b = fitting(block, dynamics.blocks), fitting(block, dynamics.learning)
        if a and b and dynamics.blocks[a].beta is not None and dynamics.learning[b].lr is not None:
            raise LevelError(
                f"dynamics.blocks.{a}.beta and learning.blocks.{b}.lr both are the rate of the "
                f"weights of {block!r}: give one of them"
            )
    for pattern, constants in dynamics.blocks.items():
        fits = [b for b in parameters if fnmatchcase(b, pattern)]
        if isinstance(constants.beta, dict):
            names = [name for block in fits for name in parameters[block]]
            for key in constants.beta:
                if not any(fnmatchcase(name, key) for name in names):
                    raise LevelError(
                        f"dynamics.blocks.{pattern}.beta.{key}: no such parameter; known: "
                        f"{', '.join(names) or 'none'}"
                    )
