"""The recipes that are shipped with hamdist, and settings by path or by a recipe's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hamdist.config import Settings, read_settings
from hamdist.errors import SettingsError

SUFFIX = ".yaml"


def recipes() -> dict[str, str]:
    """Names of the shipped recipes, in order, with what each is for (its first comment)."""
    return {name: text.partition("\n")[0].lstrip("# ") for name, text in _texts().items()}


def load_settings(source: str, overrides: Sequence[Mapping[str, Any]] = ()) -> Settings:
    """Settings from the recipe `source`, or from the file of that path, with `overrides`.

    Raises SettingsError where there is no such file or recipe, or its content is wrong.
    """
    shipped = _texts()
    if source in shipped:
        return read_settings(shipped[source], f"recipe {source}", overrides)
    try:
        text = Path(source).read_text("utf-8")
    except FileNotFoundError:
        raise SettingsError(
            f"no settings file {source!r}, and no recipe of that name; "
            f"recipes: {', '.join(shipped)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read settings from {source!r}: {error}") from None
    return read_settings(text, source, overrides)


def _texts() -> dict[str, str]:
    """The recipes' YAML by name."""
    folder = files("hamdist") / "recipes"
    return {
        item.name.removesuffix(SUFFIX): item.read_text("utf-8")
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.name.endswith(SUFFIX)
    }
