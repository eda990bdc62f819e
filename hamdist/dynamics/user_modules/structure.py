"""Values that hold others: tuples, lists, dicts, namedtuples and dataclasses."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Path: TypeAlias = tuple[Any, ...]  # keys and indices that lead to a part


class Field(str):
    """Key of a part that is an attribute."""

    __slots__ = ()


class Built(NamedTuple):
    """A namedtuple or dataclass of class `kind`, in a template: its parts by key."""

    kind: type
    parts: tuple[tuple[Any, Any], ...]


def built(parts: Sequence[Any], kind: type, keys: Sequence[Any]) -> Any:
    """Return a namedtuple or dataclass of class `kind` of its parts."""
    if issubclass(kind, tuple):
        return kind(*parts)
    if issubclass(kind, dict):
        pairs = dict(zip(keys, parts, strict=True))
        return pairs if kind is dict else kind(**pairs)
    new = object.__new__(kind)
    for name, part in zip(keys, parts, strict=True):  # (of a frozen one, too)
        object.__setattr__(new, name, part)
    return new


def parts_of(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the parts by key; None for a value without parts."""
    if _is_leaf(type(value)):  # type: ignore[arg-type]  # (to mypy a class has no hash)
        return None
    if isinstance(value, Built):
        return list(value.parts)
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None)
        keys = range(len(value)) if names is None else map(Field, names)
        return list(zip(keys, value, strict=True))
    return [(Field(f.name), getattr(value, f.name)) for f in dataclasses.fields(value)]


@lru_cache(1024)
def _is_leaf(kind: type) -> bool:
    """Return True if objects of this class have no parts."""
    place = kind.__module__.startswith("hamdist.")  # in a template
    is_dataclass = dataclasses.is_dataclass(kind) and not place
    return not is_dataclass and not issubclass(kind, (Built, dict, tuple, list))


def filled(value: Any, parts: Sequence[Any]) -> Any:
    """Return a template like `value`, with other parts."""
    if type(value) is tuple:
        return tuple(parts)
    by_fields = hasattr(value, "_fields") or dataclasses.is_dataclass(value)
    if not by_fields and not isinstance(value, dict):  # (a torch.Size becomes a tuple)
        return list(parts) if isinstance(value, list) else tuple(parts)
    by_key = tuple(zip([key for key, _ in parts_of(value) or ()], parts, strict=True))
    if not by_fields:
        return dict(by_key)
    return Built(value.kind if isinstance(value, Built) else type(value), by_key)


def getter(key: Any) -> Callable[[Any, Any], Any]:
    """Return the function that takes the part of this key out of a value."""
    return getattr if isinstance(key, Field) else operator.getitem


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, dicts and the like."""
    for _, tensor in paths_of_tensors(value):
        yield tensor


def paths_of_tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield the tensors in a value with the keys that lead to each."""
    if isinstance(value, Tensor):
        yield path, value
    elif type(value) is slice:
        for inner in (value.start, value.stop, value.step):
            yield from paths_of_tensors(inner, path)
    else:
        for key, inner in parts_of(value) or ():
            yield from paths_of_tensors(inner, (*path, key))
