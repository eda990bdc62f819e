"""The section `dynamics`: the constants of Hamilton's equations."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from hamdist.config.sections.section import (
    Above0,
    CourseSettings,
    Rate,
    Section,
    SignedCourseSettings,
)


class Reset(str, Enum):
    """Times at which h, z or omega is cleared: never, before a sample, before a sequence."""

    NEVER = "never"
    SAMPLE = "sample"
    SEQUENCE = "sequence"


class ResetSettings(Section):
    """Times at which states, costates and weight costates are cleared."""

    h: Reset | None = None
    """States; not given: never, but with presentation `sequence` before each sequence."""
    z: Reset = Reset.NEVER
    """Costates."""
    omega: Reset = Reset.NEVER
    """Weight costates."""


class BlockDynamicsSettings(Section):
    """Constants of one block that differ from those of the run."""

    c: Above0 | None = None
    """Speed of propagation, 1/s."""
    eta: Rate | None = None
    """Dissipation of both costates, 1/s."""
    eta_z: Rate | None = None
    """Dissipation of the costate."""
    eta_omega: Rate | None = None
    """Dissipation of the weight costates."""
    beta: Rate | dict[str, Rate] | None = None
    """Rate of the block's weights, or of its parameters by name (patterns as in a shell; a name
    itself goes first)."""


class DynamicsSettings(Section):
    """Constants of Hamilton's equations (docs: concepts/equations).

    Values that are not given follow from `learning`: beta = lr/tau, phi = (1 - dampening)/tau,
    eta_omega = (1 - momentum)/tau, eta_z = 0; with presentation 'sequence' eta_omega = 0, and omega
    begins each reverse pass with momentum times its value.
    """

    tau: Above0 | CourseSettings | Literal["stamps"] = 1.0
    """Step of integration in seconds, a course by tick, or `stamps`: the differences of the
    stream's time stamps."""
    c: Above0 | None = None
    """Speed of propagation in 1/s, c tau at most 1; not given: 1/tau."""
    eta: Rate | None = None
    """Dissipation of both costates, 1/s."""
    eta_z: Rate | None = None
    """Dissipation of the costates."""
    eta_omega: Rate | None = None
    """Dissipation of the weight costates."""
    beta: Rate | None = None
    """Rate of the weights; not given: lr/tau."""
    phi: Rate | SignedCourseSettings | None = None
    """Scale of the loss, or a course of it: by tick, where the presentation is not `hold` by
    sample.
    """
    sign: Literal[-1, 1] = -1
    """-1: Hamiltonian Learning; 1: the original Hamilton equations, which diverge forward in time.
    """
    weight_cost: Rate = 0.0
    """r_w of the term r_w/2 |theta|^2 of the Hamiltonian (NILP)."""
    reset: ResetSettings = ResetSettings()
    """When states and costates are cleared."""
    blocks: dict[str, BlockDynamicsSettings] = {}
    """What single blocks have otherwise, by name (patterns as in a shell, names first)."""
    limit: Above0 = 1e12
    """Largest norm of a block's h, z or omega, and largest loss; above it the run ends as a
    numerical failure."""
