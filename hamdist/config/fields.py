"""The fields of `Settings` as keywords, for editors and type checkers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

Values = Mapping[str, Any]


class SettingsFields(TypedDict, total=False):
    """Keywords of `train`: the fields of `Settings` that are no arguments of its own."""

    name: str
    seed: int
    dtype: Any
    steps: int | None
    level: str
    ignore_index: int
    partition: Values | Callable[..., Any]
    locality: Values
    dynamics: Values
    learning: Values
    engine: Values
    metrics: Values
    snapshots: Values
    compare: Values
    levels: Values
