"""The section `snapshots`: what is kept of a run, and what is done when a part of it is lost."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from hamdist.config.sections.section import Above0, Positive, Section


def _as_text(path: Any) -> Any:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


class SnapshotSettings(Section):
    """Snapshots of a run, and what is done when a part of it is lost. path: a folder (of all
    hosts), or a URL that fsspec knows (s3://...); without one no snapshots are taken. every: ticks
    from one to the next; seconds: the same in time; without either every 30 seconds. keep: how many
    stay.

    recover: lost actors are started again from the latest snapshot (engine 'ray'). memory: MiB of
    signals that an actor keeps for that at most; with half of it a snapshot is taken. full: what
    is done where none can be written meanwhile: 'forget' lets the signals go, so that nothing can
    be replaced until one is; 'end' ends the run. attempts: failures of one
    block at one tick, or losses of one process that got no further, that end the run. silence:
    seconds after which an actor that does not answer counts as lost.
    """

    path: Annotated[str | None, BeforeValidator(_as_text)] = None
    every: Positive | None = None
    seconds: Above0 | None = None
    keep: Positive = 2
    recover: bool = True
    memory: Positive = 256
    full: Literal["forget", "end"] = "forget"
    attempts: Positive = 3
    silence: Above0 = 10.0
