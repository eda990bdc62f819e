"""What pydantic finds wrong, in the words of an error of ours."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping

from pydantic import ValidationError

_TYPE = re.compile(
    r"(constrained-\w+|str-enum\[\w+\]|literal\[.*\]|dict\[.*\]|float|int|str|[A-Z]\w*Settings)$"
)
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxlist, _repr.maxtuple = 4, 20, 20, 20
_repr.maxstring, _repr.maxother, _repr.maxlong = 200, 200, 40


def shown(value: object) -> str:
    """`value` as an error shows it: cut where it is long or deep."""
    return _repr.repr(value)


def describe(error: ValidationError) -> str:
    """One line per wrong field: its path, what is wrong, the value received. A field that may be
    of several types is wrong in one of these ways or the other."""
    found: dict[tuple[str, str], list[str]] = {}
    for item in error.errors(include_url=False):
        # pydantic names the types of a union inside the path, as no field is named
        path = [str(part) for part in item["loc"]]
        where = ".".join(part for part in path if not _TYPE.match(part)) or "settings"
        if item["type"] == "extra_forbidden":
            found.setdefault((where, ""), []).append("no such setting")
            continue
        value = item["input"]
        given = "" if isinstance(value, Mapping) else f" (received {shown(value)})"
        found.setdefault((where, given), []).append(item["msg"].removeprefix("Value error, "))
    return "\n".join(
        f"{where}: {', or: '.join(dict.fromkeys(reasons))}{given}"
        for (where, given), reasons in found.items()
    )
