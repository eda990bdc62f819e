"""The fields of `Settings` as keywords, for editors and type checkers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

Values = Mapping[str, Any]


class RunFields(TypedDict, total=False):
    """Keywords of `train` and `compare`: fields of `Settings` that are no arguments of theirs."""

    name: str
    seed: int
    dtype: Any
    steps: int | None
    level: Any
    ignore_index: int
    partition: Values | Callable[..., Any]
    locality: Values
    dynamics: Values
    learning: Values
    engine: Values
    metrics: Values
    snapshots: Values


class SettingsFields(RunFields, total=False):
    """Keywords of `train`: all fields of `Settings` that are no arguments of its own."""

    compare: Values
    levels: Values
