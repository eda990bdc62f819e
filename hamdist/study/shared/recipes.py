"""Settings that are shipped with hamdist, by name: recipes and studies; settings by path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from hamdist.config import Settings, read_settings
from hamdist.errors import SettingsError, StreamError

SUFFIX = ".yaml"


class ShippedFiles(NamedTuple):
    """A kind of shipped settings: `folder` in the package, and the word for `one` of them."""

    folder: str
    one: str

    def texts(self) -> dict[str, str]:
        """Return the YAML by name, in order."""
        return {
            file.name.removesuffix(SUFFIX): file.read_text("utf-8")
            for file in sorted((files("hamdist") / self.folder).iterdir(), key=lambda i: i.name)
            if file.name.endswith(SUFFIX)
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
                f"{Path(self.folder).name}: {', '.join(shipped)}"
            ) from None
        except (OSError, ValueError) as error:  # (a NUL or a surrogate in the path, no UTF-8)
            raise SettingsError(f"cannot read settings from {source!r}: {error}") from None


RECIPES = ShippedFiles("recipes", "recipe")


def recipes() -> dict[str, str]:
    """Return the shipped recipes in order, with their descriptions (first comments)."""
    return RECIPES.descriptions()


def load_settings(source: str, overrides: Sequence[Mapping[str, Any]] = ()) -> Settings:
    """Load the recipe `source`, or the file of that path, with `overrides`.

    Raises SettingsError if there is no such file or recipe, or its content is wrong.
    """
    return read_settings(*RECIPES.text(source), overrides)


def needed_files(recipe: str) -> str:
    """Return a line about the files that `recipe` reads: their path, or how to get missing ones.

    Args:
        recipe: the name of a shipped recipe.

    Returns:
        Empty if the recipe needs no files.
    """
    # (torch, which settings must not wait for, nor find imported: runtime/process/portable.py)
    from hamdist.streams.sources.images import IMAGE_FILES, find_images

    stream = load_settings(recipe).stream
    files = IMAGE_FILES.get(stream.source.value)
    if files is None:
        return ""
    try:
        return f"{files.title} (in {find_images(files, stream.path)})"
    except StreamError:
        return f"{files.title}: {files.install}"
