"""Values that hold others: tuples, lists, dicts, namedtuples and dataclasses."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class Field(str):
    """Key of a part that is an attribute."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Built:
    """A namedtuple or dataclass of class `kind`, in a template: its parts by key."""

    kind: type
    parts: tuple[tuple[Any, Any], ...]

    def value(self) -> Any:
        """Return the object itself, of parts that are no templates."""
        parts = dict(self.parts)
        if issubclass(self.kind, tuple):
            return self.kind(*parts.values())
        if issubclass(self.kind, dict):
            return self.kind(**parts)
        new = object.__new__(self.kind)
        for name, part in parts.items():  # (of a frozen one, too)
            object.__setattr__(new, name, part)
        return new


def parts_of(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the parts by key; None for a value without parts."""
    if isinstance(value, Built):
        return list(value.parts)
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None)
        keys = range(len(value)) if names is None else map(Field, names)
        return list(zip(keys, value, strict=True))
    place = type(value).__module__.startswith("hamdist.")  # in a template
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not place:
        return [(Field(f.name), getattr(value, f.name)) for f in dataclasses.fields(value)]
    return None


def filled(value: Any, parts: Sequence[Any]) -> Any:
    """Return a template like `value`, with other parts."""
    if type(value) is list or type(value) is tuple:
        return type(value)(parts)
    keys = [key for key, _ in parts_of(value) or ()]
    by_key = tuple(zip(keys, parts, strict=True))
    if isinstance(value, Built):
        return Built(value.kind, by_key)
    if isinstance(value, dict) and not dataclasses.is_dataclass(value):
        return dict(by_key)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):  # a torch.Size
        return tuple(parts)
    return Built(type(value), by_key)


def getter(key: Any) -> Callable[[Any, Any], Any]:
    """Return the function that takes the part of this key out of a value."""
    return getattr if isinstance(key, Field) else operator.getitem


def part_of(value: Any, key: Any) -> Any:
    """Return one part, by its key."""
    return getter(key)(value, key)


def objects(value: Any) -> Any:
    """Return a template without places, with its namedtuples and dataclasses as objects."""
    parts = parts_of(value)
    if parts is None:
        return value
    built = filled(value, [objects(part) for _, part in parts])
    return built.value() if isinstance(built, Built) else built


def has_built(template: Any) -> bool:
    """Return True if a template makes a namedtuple or a dataclass."""
    inner = (part for _, part in parts_of(template) or ())
    return isinstance(template, Built) or any(map(has_built, inner))
