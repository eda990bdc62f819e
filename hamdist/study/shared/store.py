"""The finished runs of a study or a comparison on disk: one JSON file a run, named by its key.

Each is written whole or not at all, so what was ended at any moment goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from hamdist.errors import SettingsError
from hamdist.study.shared.result_folder import prepare_folder, write_file

RecordType = TypeVar("RecordType")


class Store(Generic[RecordType]):
    """Records in `folder`, which is made. read: makes one of plain values, or raises ValueError or
    TypeError. Raises SettingsError where it cannot be written."""

    def __init__(self, folder: Path, read: Callable[[dict[str, Any]], RecordType]) -> None:
        prepare_folder(folder)
        self._folder = folder
        self._read = read

    def find(self, key: str) -> RecordType | None:
        """The record of a run that was made. Raises SettingsError for a file that is none."""
        path = self._folder / f"{key}.json"
        try:
            values = json.loads(path.read_text("utf-8"))
            record = self._read(values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise SettingsError(
                f"{path}: cannot be read as the record of a run ({error}); delete it, and the run "
                "is made again"
            ) from None
        if values.get("key") != key:
            raise SettingsError(f"{path}: holds the record of run {values.get('key')}; delete it")
        return record

    def keep(self, key: str, text: str) -> None:
        """Write the JSON `text` of a record. Raises SettingsError where it cannot be written."""
        write_file(self._folder / f"{key}.json", text + "\n")
