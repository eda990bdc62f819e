"""The section `snapshots`: what is kept of a run, and what is done when a part of it is lost."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from hamdist.config.sections.section import Above0, Positive, Section


def _as_text(path: Any) -> Any:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


class SnapshotSettings(Section):
    """Snapshots of a run, and what is done when a part of it is lost."""

    path: Annotated[str | None, BeforeValidator(_as_text)] = None
    """A folder that all hosts see, or a URL that fsspec knows; not given: no snapshots."""
    every: Positive | None = None
    """Ticks from one to the next."""
    seconds: Above0 | None = None
    """Seconds from one to the next; without either 30."""
    keep: Positive = 2
    """How many stay."""
    recover: bool = True
    """Start lost actors again from the latest snapshot (engine `ray`)."""
    memory: Positive = 256
    """MiB of signals that an actor keeps for its neighbours; with half of it a snapshot is taken.
    """
    full: Literal["forget", "end"] = "forget"
    """Where no snapshot can be written and the memory is full: `forget` the signals, or `end` the
    run."""
    attempts: Positive = 3
    """Failures of one block at one tick, or losses of a process that got no further, that end the
    run."""
    silence: Above0 = 10.0
    """Seconds without an answer after which an actor counts as lost."""
