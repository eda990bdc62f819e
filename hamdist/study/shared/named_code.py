"""Digests of the files whose code settings and options name: `FILE.py:NAME`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hamdist.config import Settings

_OF_A_FILE = re.compile(r".+\.py:\w+")


def code_of(settings: Settings, *names: str | None) -> str:
    """Return digests of the files that `settings` and options have named; '' where none has."""
    named = [*names, *dict.fromkeys(_named(settings.model_dump(mode="json", exclude_unset=True)))]
    return "; ".join(f"{name} {_digest(name)}" for name in named if name is not None)


def _named(value: Any) -> Iterator[str]:
    if isinstance(value, str) and _OF_A_FILE.fullmatch(value):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _named(part)


def _digest(name: str) -> str:
    where = name.rpartition(":")[0]
    if not where.endswith(".py"):
        spec = find_spec(where)
        where = "" if spec is None or spec.origin is None else spec.origin
    file = Path(where)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
