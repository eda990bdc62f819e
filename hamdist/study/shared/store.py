"""Finished runs of a study or a comparison on disk: one JSON file a run, named by its key.

Each is written whole or not at all, so an interrupted study continues from its finished runs.
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
    """Records in `folder`, which is made. Raises SettingsError if it cannot be written.

    `read` makes a record of plain values, or raises ValueError or TypeError.
    """

    def __init__(self, folder: Path, read: Callable[[dict[str, Any]], RecordType]) -> None:
        prepare_folder(folder)
        self._folder = folder
        self._read = read

    def find(self, key: str) -> RecordType | None:
        """Return the record of a finished run. Raises SettingsError for a damaged file."""
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
        """Write the JSON `text` of a record. Raises SettingsError if it cannot be written."""
        write_file(self._folder / f"{key}.json", text + "\n")
