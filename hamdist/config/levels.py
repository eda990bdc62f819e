"""The section `levels`: what is otherwise at one level only."""

from __future__ import annotations

from typing import Any

from hamdist.config.section import Section


class LevelOverrides(Section):
    """What a level changes in the rest of the settings."""

    partition: dict[str, Any] = {}
    locality: dict[str, Any] = {}
    dynamics: dict[str, Any] = {}
    learning: dict[str, Any] = {}
