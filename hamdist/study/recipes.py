"""The recipes that are shipped with hamdist, and settings by path or by a recipe's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hamdist.config import Settings, read_settings
from hamdist.study.shipped import Shipped

RECIPES = Shipped("recipes", "recipe")


def recipes() -> dict[str, str]:
    """Names of the shipped recipes, in order, with what each is for (its first comment)."""
    return RECIPES.descriptions()


def load_settings(source: str, overrides: Sequence[Mapping[str, Any]] = ()) -> Settings:
    """Settings from the recipe `source`, or from the file of that path, with `overrides`.

    Raises SettingsError where there is no such file or recipe, or its content is wrong.
    """
    return read_settings(*RECIPES.text(source), overrides)
