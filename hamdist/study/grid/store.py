"""The records of a study on disk: one JSON file a run, named by the run's key.

Each is written whole or not at all, so a study that was ended at any moment goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from hamdist.errors import SettingsError
from hamdist.study.grid.cells import Job
from hamdist.study.grid.work import Record
from hamdist.study.results import prepare_folder, to_json, write_file


class Store:
    """Records in `folder`, which is made. Raises SettingsError where it cannot be written."""

    def __init__(self, folder: Path) -> None:
        prepare_folder(folder)
        self._folder = folder

    def find(self, job: Job) -> Record | None:
        """The record of a job that has run. Raises SettingsError for a file that is none."""
        path = self._folder / f"{job.key}.json"
        try:
            raw = json.loads(path.read_text("utf-8"))
            record = Record(**raw)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise SettingsError(
                f"{path}: cannot be read as the record of a run ({error}); delete it, and the run "
                "is made again"
            ) from None
        if record.key != job.key:
            raise SettingsError(f"{path}: holds the record of run {record.key}; delete it")
        return record

    def keep(self, record: Record) -> None:
        """Raises SettingsError where it cannot be written."""
        text = to_json(dataclasses.asdict(record)) + "\n"
        write_file(self._folder / f"{record.key}.json", text)
