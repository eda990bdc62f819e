"""A settings file with all settings, those that have their default as comments; the JSON schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from hamdist.config.sections.section import LARGEST
from hamdist.config.settings import Settings

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
# pydantic leaves a bound behind a validator by its own name, which editors do not know.
_STANDARD = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_HEAD = """\
# Settings of hamdist, of the recipe {recipe!r}. `hamdist run FILE` reads them.
# A line that begins with '#' has the default: take the '#' off to change it. `level` presets much
# of `locality`; what stands below `levels: {{NAME: {{...}}}}` holds at that level only.
"""


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the settings, without limits that only keep numbers in 64 bits."""
    schema: dict[str, Any] = _standard(Settings.model_json_schema())
    return schema


def _standard(part: Any) -> Any:
    if isinstance(part, list):
        return [_standard(entry) for entry in part]
    if not isinstance(part, dict):
        return part
    return {
        _STANDARD.get(key, key): _standard(value)
        for key, value in part.items()
        if not (key in ("le", "maximum") and value == LARGEST)
    }


def template(settings: Settings, recipe: str) -> str:
    """Return `settings` as YAML with every other field and its default as a comment.

    Read again, it is `settings`.
    """
    schema = json_schema()
    values = settings.model_dump(mode="json", exclude_unset=True)
    defaults = Settings().model_dump(mode="json")
    lines = _lines(schema, schema["$defs"], values, defaults, "")
    return _HEAD.format(recipe=recipe) + "\n" + "\n".join(lines) + "\n"


def _lines(
    schema: Mapping[str, Any],
    kinds: Mapping[str, Any],
    values: Mapping[str, Any],
    defaults: Mapping[str, Any],
    indent: str,
) -> Iterator[str]:
    """Yield the lines of one section. values: those that were set."""
    for name, field in schema["properties"].items():
        section = kinds[field["$ref"].rpartition("/")[2]] if "$ref" in field else {}
        words = _words(field, kinds)
        if isinstance(values.get(name, defaults[name]), dict) and "properties" in section:
            inner = values.get(name) or {}
            yield f"{indent}{name}:" if inner else f"{indent}# {name}:"
            yield from _lines(section, kinds, inner, defaults[name], indent + "  ")
        else:
            mark = "" if name in values else "# "
            value = json.dumps(values.get(name, defaults[name]), ensure_ascii=False)
            yield f"{indent}{mark}{name}: {value}" + (f"  # {words}" if words else "")


def _words(field: Mapping[str, Any], kinds: Mapping[str, Any]) -> str:
    """Return types and meaning of a field on one line."""
    kind = kinds[field["$ref"].rpartition("/")[2]] if "$ref" in field else field
    meaning = " ".join(str(field.get("description", "")).split())
    return "; ".join(filter(None, (" | ".join(dict.fromkeys(_types(kind, kinds))), meaning)))


def _types(kind: Mapping[str, Any], kinds: Mapping[str, Any]) -> Iterator[str]:
    """Yield the types of a schema in words."""
    if "$ref" in kind:
        kind = kinds[kind["$ref"].rpartition("/")[2]]
    if "anyOf" in kind:
        for choice in kind["anyOf"]:
            yield from _types(choice, kinds)
    elif "enum" in kind:
        yield from map(str, kind["enum"])
    elif "const" in kind:
        yield str(kind["const"])
    elif "properties" in kind:
        yield "{" + ", ".join(kind["properties"]) + "}"
    else:
        bounds = [f"{sign} {kind[key]:g}" for key, sign in _BOUNDS.items() if key in kind]
        word = str(kind.get("type", "any"))
        word = {"array": "list", "object": "{NAME: ...}"}.get(word, word)
        yield " ".join([word, *bounds])
