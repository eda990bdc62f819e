"""Settings that are shipped with hamdist, by name: recipes and studies."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from hamdist.errors import SettingsError

SUFFIX = ".yaml"


class ShippedFiles(NamedTuple):
    """A kind of shipped settings: `folder` in the package, and the word for `one` of them."""

    folder: str
    one: str

    def texts(self) -> dict[str, str]:
        """Return the YAML by name, in order."""
        return {
            item.name.removesuffix(SUFFIX): item.read_text("utf-8")
            for item in sorted((files("hamdist") / self.folder).iterdir(), key=lambda i: i.name)
            if item.name.endswith(SUFFIX)
        }

    def descriptions(self) -> dict[str, str]:
        """Return the descriptions by name (first comments)."""
        return {name: t.partition("\n")[0].lstrip("# ") for name, t in self.texts().items()}

    def text(self, source: str) -> tuple[str, str]:
        """Return the YAML of the name or file `source`, and its name in errors.

        Raises SettingsError if there is neither, or the file cannot be read.
        """
        shipped = self.texts()
        if source in shipped:
            return shipped[source], f"{self.one} {source}"
        try:
            return Path(source).read_text("utf-8-sig"), source
        except FileNotFoundError:
            raise SettingsError(
                f"no settings file {source!r}, and no {self.one} of that name; "
                f"{self.folder}: {', '.join(shipped)}"
            ) from None
        except (OSError, ValueError) as error:  # (a NUL or a surrogate in the path, no UTF-8)
            raise SettingsError(f"cannot read settings from {source!r}: {error}") from None
