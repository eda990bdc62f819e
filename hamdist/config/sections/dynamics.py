"""The section `dynamics`: the constants of Hamilton's equations."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from hamdist.config.sections.section import Above0, CourseSettings, Rate, Section


class Reset(str, Enum):
    """When a block's h, z or omega is cleared: never, before a sample, before a sequence."""

    NEVER = "never"
    SAMPLE = "sample"
    SEQUENCE = "sequence"


class ResetSettings(Section):
    """When the blocks' states, costates and weight costates are cleared. h, where it is not given:
    never, but with presentation 'sequence' before each sequence."""

    h: Reset | None = None
    z: Reset = Reset.NEVER
    omega: Reset = Reset.NEVER


class BlockDynamicsSettings(Section):
    """What one block has otherwise. beta: of the block, or of its parameters by name (patterns as
    in a shell: a name itself goes first, then the first pattern that fits)."""

    c: Above0 | None = None
    eta: Rate | None = None
    eta_z: Rate | None = None
    eta_omega: Rate | None = None
    beta: Rate | dict[str, Rate] | None = None


class DynamicsSettings(Section):
    """Hamilton's equations (equations.md). tau in seconds, or `stamps`: the differences of the
    stream's time stamps; c in 1/seconds (default 1/tau), eta in 1/seconds (one for both costates,
    or eta_z and eta_omega). tau and phi may change from tick to tick (phi where the presentation is
    not 'hold': from sample to sample). What is not given follows from `learning`: beta = lr/tau,
    phi = (1 - dampening)/tau, eta_omega = (1 - momentum)/tau, eta_z = 0; with presentation
    'sequence' eta_omega = 0, and omega begins each way back with momentum times its value.

    weight_cost: r_w of the term r_w/2 |theta|^2 of the Hamiltonian (NILP). blocks: by name
    (patterns as in a shell), what single blocks have otherwise. limit: of the norm of a block's
    h, z or omega, and of a loss; above it the run is stopped as a numerical failure.
    """

    tau: Above0 | CourseSettings | Literal["stamps"] = 1.0
    c: Above0 | None = None
    eta: Rate | None = None
    eta_z: Rate | None = None
    eta_omega: Rate | None = None
    beta: Rate | None = None
    phi: Rate | CourseSettings | None = None
    sign: Literal[-1, 1] = -1
    weight_cost: Rate = 0.0
    reset: ResetSettings = ResetSettings()
    blocks: dict[str, BlockDynamicsSettings] = {}
    limit: Above0 = 1e12
