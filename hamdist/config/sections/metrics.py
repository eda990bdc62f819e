"""The section `metrics`: what is measured while a run goes on."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field

from hamdist.config.sections.section import Positive, Section


class RecordedState(str, Enum):
    """What is recorded per tick: the energies, or the states and costates as well."""

    ENERGY = "energy"
    TRAJECTORY = "trajectory"


class MetricsSettings(Section):
    """window: items that one prequential window covers. limit: windows that are kept; with more,
    neighbours are joined. record: what is recorded per tick, by block; record_every: ticks between
    two entries."""

    window: Positive = 50
    limit: Annotated[int, Field(ge=2)] = 2048
    record: RecordedState | None = None
    record_every: Positive = 1
