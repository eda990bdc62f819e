"""The section `metrics`: what is measured while a run goes on."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field

from hamdist.config.sections.section import Positive, Section


class RecordedState(str, Enum):
    """Quantities recorded per tick: the energies, or the states and costates as well."""

    ENERGY = "energy"
    TRAJECTORY = "trajectory"


class TrackerKind(str, Enum):
    """Service that gets a run's scalars (`opentelemetry`: spans) besides its own files."""

    CSV = "csv"
    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"
    WANDB = "wandb"
    PROMETHEUS = "prometheus"
    RAY = "ray"
    OPENTELEMETRY = "opentelemetry"


class MetricsSettings(Section):
    """Measurements during a run."""

    window: Positive = 50
    """Samples of one prequential window."""
    limit: Annotated[int, Field(ge=2)] = 2048
    """Windows that are kept; with more, neighbours are joined (live runs: in the older half)."""
    record: RecordedState | None = None
    """Record by tick and block: energies, or trajectories as well (presentation `hold`)."""
    record_every: Positive = 1
    """Ticks between two entries."""
    progress: bool | None = None
    """Show a bar: on a terminal and in a notebook (not given), also where there is neither (true),
    or nowhere (false)."""
    histograms: bool = False
    """Histograms of weights, states and costates as events, for trackers that show them."""
    alignment: Positive | None = None
    """Compare the update by one of so many samples with backpropagation's, by block."""
    trace: Positive | None = None
    """Keep a trace of the last so many ticks of every process (`--trace`)."""
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] = 9400
    """Port on this machine's loopback where the tracker `prometheus` shows `/metrics`."""
