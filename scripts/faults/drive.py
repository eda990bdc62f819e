"""One run, in this process: drive.py FOLDER, which holds run.json (`Orders`) and gets the rest.

told.jsonl        a line for every actor that was replaced
result.safetensors, result.json     what it has learned, in the end
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from faults.events import Event
from faults.net import DRIVER, Numbered, network
from hamdist.config import Settings
from hamdist.errors import SnapshotError
from hamdist.runtime.results.result import Progress, RunResult
from hamdist.runtime.storage.snapshot_files import latest
from hamdist.runtime.train.train import train


@dataclass(frozen=True)
class Orders:
    """items: of the stream. settings: of the run."""

    items: int
    settings: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        (folder / "run.json").write_text(json.dumps(dataclasses.asdict(self)))


def settings_of(level: str, items: int, **fields: Any) -> dict[str, Any]:
    cuts = {"cuts": ["1", "2", "3", "4"]}
    return {"level": level, "steps": items, "seed": 5, "partition": cuts, **fields}


def undisturbed(level: str, items: int) -> RunResult:
    """The same run in this process, where nothing happens."""
    chosen = settings_of(level, items, engine={"kind": "inprocess"})
    return train(network((), None), Numbered(items), Settings.model_validate(chosen))


def metrics(result: RunResult) -> list[Any]:
    return [[name, [dataclasses.asdict(w) for w in ws]] for name, ws in result.windows.items()]


def main(folder: Path) -> None:
    os.environ[DRIVER] = str(os.getpid())
    torch.set_num_threads(1)
    orders = Orders(**json.loads((folder / "run.json").read_text()))
    settings = Settings.model_validate(orders.settings)
    events = [Event(**event) for event in orders.events]
    seen = 0
    with (folder / "told.jsonl").open("a") as told:

        def show(progress: Progress) -> None:
            nonlocal seen
            for one in progress.replaced[seen:]:
                told.write(json.dumps(dataclasses.asdict(one)) + "\n")
                told.flush()
            seen = len(progress.replaced)

        result = train(
            network(events, str(folder / "marks")),
            Numbered(orders.items),
            settings,
            on_progress=show,
            resume=_before(settings),
        )
    save_file(
        {k: v.contiguous() for k, v in result.model.state_dict().items()},
        folder / "result.safetensors",
    )
    (folder / "result.json").write_text(json.dumps(metrics(result)))


def _complain(text: str) -> None:
    sys.stderr.write(text + "\n")


def _before(settings: Settings) -> str | None:
    """The snapshots to go on from, if a driver before this one has left any."""
    path = settings.snapshots.path
    try:
        if path is not None:
            latest(path, _complain)
    except SnapshotError:
        return None
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]))
