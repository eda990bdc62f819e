"""Mappings of settings laid over each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hamdist.config.sections.section import Section


class LevelOverrides(Section):
    """Changes of a level to the rest of the settings."""

    partition: dict[str, Any] = {}
    """Fields of `partition`."""
    locality: dict[str, Any] = {}
    """Fields of `locality`."""
    dynamics: dict[str, Any] = {}
    """Fields of `dynamics`."""
    learning: dict[str, Any] = {}
    """Fields of `learning`."""


_SECTIONS = frozenset(LevelOverrides.model_fields)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the entries of `over` laid over it, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return result


def lay_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `merge` for overrides by a user, which hold at every level.

    They also hold where `levels` says otherwise, unless they set `levels` themselves.
    """
    merged = merge(base, over)
    sections = {k: v for k, v in over.items() if k in _SECTIONS and isinstance(v, Mapping)}
    levels = merged.get("levels")
    if sections and isinstance(levels, Mapping):
        merged["levels"] = {
            level: merge(fields, sections) if isinstance(fields, Mapping) else fields
            for level, fields in levels.items()
        }
        merged = merge(merged, {k: v for k, v in over.items() if k == "levels"})
    return merged
