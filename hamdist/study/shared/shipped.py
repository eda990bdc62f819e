"""Settings that are shipped with hamdist, by name: recipes and studies."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from hamdist.errors import SettingsError

SUFFIX = ".yaml"


class ShippedFiles(NamedTuple):
    """One kind of them. folder: in the package; one: what one of them is called."""

    folder: str
    one: str

    def texts(self) -> dict[str, str]:
        """YAML by name, in order."""
        return {
            item.name.removesuffix(SUFFIX): item.read_text("utf-8")
            for item in sorted((files("hamdist") / self.folder).iterdir(), key=lambda i: i.name)
            if item.name.endswith(SUFFIX)
        }

    def descriptions(self) -> dict[str, str]:
        """What each is for (its first comment)."""
        return {name: t.partition("\n")[0].lstrip("# ") for name, t in self.texts().items()}

    def text(self, source: str) -> tuple[str, str]:
        """The YAML of the one named `source`, or of the file of that path, and how errors call it.

        Raises SettingsError where there is neither, or the file cannot be read.
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
