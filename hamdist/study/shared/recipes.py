"""The recipes that are shipped with hamdist, and settings by path or by a recipe's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hamdist.config import Settings, read_settings
from hamdist.errors import StreamError
from hamdist.study.shared.shipped import ShippedFiles

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
