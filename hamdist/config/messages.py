"""The errors of pydantic in the words of a SettingsError."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from pydantic import BaseModel, ValidationError

_TYPE = re.compile(
    r"(constrained-\w+|(str-enum|literal|dict|function-\w+)\[.*\]|float|int|str|[A-Z]\w*Settings)$"
)
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxlist, _repr.maxtuple = 4, 20, 20, 20
_repr.maxstring, _repr.maxother, _repr.maxlong = 200, 200, 40


def shown(value: object) -> str:
    """Return `value` as an error shows it, cut where it is long or deep."""
    return _repr.repr(value)


def describe(error: ValidationError) -> str:
    """Return one line per wrong field: its path, what is wrong, the value received.

    A field with several possible types has one line for each of them.
    """
    messages: dict[tuple[str, str], list[str]] = {}
    for fault in error.errors(include_url=False):
        # pydantic names the types of a union inside the path, as no field is named
        path = [str(part) for part in fault["loc"]]
        whole = "settings: " if error.title == "Settings" else ""
        where = ".".join(part for part in path if not _TYPE.match(part))
        where = f"{where}: " if where else whole
        if fault["type"] == "extra_forbidden":
            text = f"no such setting{_known_instead(error.title, path)}"
            messages.setdefault((where, ""), []).append(text)
            continue
        value = fault["input"]
        if fault["type"] == "too_short" and len(value) >= fault["ctx"]["min_length"]:
            continue  # what is wrong with its items is said
        received = "" if isinstance(value, Mapping) else f" (received {shown(value)})"
        text = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "enum" and isinstance(value, str):
            text += did_you_mean(value, re.findall(r"'([^']+)'", fault["ctx"]["expected"]))
        messages.setdefault((where, received), []).append(text)
    return "\n".join(
        f"{where}{', or: '.join(dict.fromkeys(reasons))}{received}"
        for (where, received), reasons in messages.items()
    )


def did_you_mean(word: str, words: Sequence[str]) -> str:
    """Return the hint of an error about an unknown name: the nearest of `words`, if any."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _known_instead(root: str, path: Sequence[str]) -> str:
    """Return a hint for the last name of `path`; root: name of the section that was read."""
    *parents, wrong = path
    sections = [section for section in _below(BaseModel) if section.__name__ == root]
    for name in parents:  # a name that no section has is a key of a mapping, or pydantic's own
        inside = [
            section.model_fields[name] for section in sections if name in section.model_fields
        ]
        sections = [s for f in inside for s in _named_in(f.annotation)] if inside else sections
    fields = {name: field for section in sections for name, field in section.model_fields.items()}
    deeper = [
        f"{name}.{wrong}"
        for name, field in fields.items()
        if any(wrong in section.model_fields for section in _named_in(field.annotation))
    ]
    names = list(fields)
    close = difflib.get_close_matches(wrong, names, n=1) or deeper[:1]
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def _below(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for subclass in section.__subclasses__():
        yield subclass
        yield from _below(subclass)


def _named_in(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the sections that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _named_in(part)
