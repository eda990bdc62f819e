"""A run in which things happen, compared with the one in which nothing does."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from faults.drive import Orders, metrics, settings_of, undisturbed
from faults.events import Event
from faults.watch import Local, OnHosts, lost_seconds, watch
from hamdist.runtime.results.result import RunResult

EVERY = 100  # ticks between two snapshots
SILENCE = 3.0
START_SECONDS, EVENT_SECONDS = 90.0, 45.0  # until a run counts as stuck


@dataclass(frozen=True)
class Trial:
    """seconds: lost, by number of the events that happened (watch.py). replaced: actors; drivers:
    those that followed one that was lost; replayed: signals. wrong: what differs; empty if nothing
    does."""

    level: str
    events: list[Event]
    seconds: dict[int, float]
    replaced: int
    drivers: int
    replayed: int
    wrong: str

    @property
    def equal(self) -> bool:
        return not self.wrong


def trial(
    level: str,
    items: int,
    events: Sequence[Event],
    world: Any = None,
    told: Callable[[str], None] = lambda _: None,
    silence: float = SILENCE,
) -> Trial:
    """Three actors, on this host or spread over those of `world` (tests/hosts/namespaces.py)."""
    calm = undisturbed(level, items)
    parent = "/tmp" if world is None else world.folder  # (which all hosts see)
    folder = Path(tempfile.mkdtemp(prefix="hc-", dir=parent))
    engine: dict[str, Any] = {"kind": "ray", "actors": 3}
    if world is not None:
        engine |= {"address": world.address, "spread": "spread", "encryption": "on"}
    kept = {"path": str(folder / "kept"), "every": EVERY, "silence": silence}
    settings = settings_of(level, items, engine=engine, snapshots=kept)
    Orders(items, settings, [event.plain() for event in events]).write(folder)
    driver = Local(folder) if world is None else OnHosts(world, folder)
    try:
        limit = START_SECONDS + EVENT_SECONDS * len(events)
        log = watch(driver, events, folder, limit, world, told)
        wrong = _wrong(folder, log.code, calm, driver.text)
        lines = (folder / "told.jsonl").read_text().splitlines()
        replaced = [json.loads(line) for line in lines]
        return Trial(
            level,
            list(events),
            lost_seconds(log.times, log.restarts, folder),
            len(replaced),
            len(log.restarts),
            sum(one["replayed"] for one in replaced),
            wrong,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wrong(folder: Path, code: int | None, calm: RunResult, text: str) -> str:
    if code != 0:
        return f"the driver ended with {'nothing in time' if code is None else code}\n{text}"
    state = load_file(folder / "result.safetensors")
    before = calm.model.state_dict()
    if set(state) != set(before):
        return "other weights"
    off = [name for name in before if not torch.equal(state[name], before[name])]
    if off:
        return f"weights differ: {', '.join(off)}"
    measured = json.loads(json.dumps(metrics(calm)))
    same = json.loads((folder / "result.json").read_text()) == measured
    return "" if same else "metrics differ"
