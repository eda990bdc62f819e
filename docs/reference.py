"""Pages of the reference that are made from the code: all settings, and all commands."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from hamdist.config import Settings
from hamdist.launch.cluster_file import ClusterSettings
from hamdist.study.grid.settings import StudySettings
from hamdist.study.simulate.host_plan import HostPlanSettings

EXPERIMENTAL = "Experimental"
BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
LARGEST = 10**18  # a limit that only keeps sums inside 64 bits: not shown

SETTINGS = """# Settings

A settings file is YAML. `hamdist run FILE` reads it; `--set section.field=value` changes a field;
`hamdist.train` takes the same sections as keyword arguments. This page is generated from the code.

A field that is left out has the default in the table. *level* means that the level says it
([Levels](../concepts/levels.md)). Fields marked <span class="experimental">experimental</span> may
change without notice.
"""


def settings_page() -> str:
    """Return the page of all settings, a table for each section."""
    parts = [SETTINGS]
    for model, path, title in (
        (Settings, "", "Top level"),
        (StudySettings, "study", "Study files"),
        (ClusterSettings, "cluster", "Cluster files"),
        (HostPlanSettings, "plan", "Plans of hosts"),
    ):
        schema = model.model_json_schema()
        default = Settings().model_dump(mode="json") if model is Settings else None
        parts += _section(path, title, schema, schema.get("$defs", {}), default)
    return "\n\n".join(parts) + "\n"


def _section(
    path: str, title: str, schema: Any, defs: Any, defaults: Mapping[str, Any] | None
) -> Iterator[str]:
    """Yield heading, summary and table of a section, then those of the sections inside it."""
    yield f"{'#' * min(2 + path.count('.'), 4)} {title}" + (f" {{ #{path} }}" if path else "")
    if path and schema.get("description"):
        yield inspect.cleandoc(schema["description"])
    rows = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    inner: list[tuple[str, Any, Any]] = []
    for name, one in schema.get("properties", {}).items():
        full = f"{path}.{name}" if path else name
        for child, keyed in _sections(one, defs):
            inner.append((f"{full}.NAME" if keyed else full, child, (defaults or {}).get(name)))
        held = next(iter(_sections(one, defs)), ({}, False))[0]
        meaning = one.get("description", held.get("description", ""))
        if meaning.startswith(EXPERIMENTAL):
            meaning = f'<span class="experimental">experimental</span> {meaning.partition(". ")[2]}'
        default = _default(one, (defaults or {}).get(name), full)
        cells = (f"`{name}`", _type(one, defs, full), default, _cell(meaning))
        rows.append("| " + " | ".join(cells) + " |")
    yield "\n".join(rows)
    for full, child, value in inner:
        keyed = full.endswith(".NAME")
        yield from _section(
            full, f"`{full}`", child, defs, value if isinstance(value, dict) and not keyed else None
        )


def _sections(one: Any, defs: Any) -> Iterator[tuple[Any, bool]]:
    """Yield the sections that a field may hold, and whether it holds them by name."""
    for option in one.get("anyOf", [one]):
        if "$ref" in option:
            child = defs[option["$ref"].rpartition("/")[2]]
            if child.get("properties"):
                yield child, False
        elif isinstance(option.get("additionalProperties"), dict):
            for child, _ in _sections(option["additionalProperties"], defs):
                yield child, True


def _type(one: Any, defs: Any, full: str) -> str:
    """Return a field's type and range in words."""
    options = [o for o in one.get("anyOf", [one]) if o.get("type") != "null"]
    return " or ".join(dict.fromkeys(_one_type(o, defs, full) for o in options))


def _one_type(one: Any, defs: Any, full: str) -> str:
    if "$ref" in one:
        target = defs[one["$ref"].rpartition("/")[2]]
        return _one_type(target, defs, full) if "enum" in target else f"[section](#{full})"
    if "enum" in one:
        return ", ".join(f"`{value}`" for value in one["enum"])
    if "const" in one:
        return f"`{one['const']}`"
    kind = one.get("type")
    if kind == "array":
        return f"list of {_type(one['items'], defs, full) if 'items' in one else 'values'}"
    if kind == "object":
        inside = one.get("additionalProperties")
        names = one.get("propertyNames", {})
        held = _type(inside, defs, f"{full}.NAME") if isinstance(inside, dict) else "values"
        return f"mapping by {'level' if '$ref' in names else 'name'} of {held}"
    words = {"integer": "int", "number": "float", "string": "text", "boolean": "`true`, `false`"}
    return words.get(str(kind), "any") + _range(one)


def _range(one: Any) -> str:
    shown = [(key, sign) for key, sign in BOUNDS if one.get(key, LARGEST) != LARGEST]
    words = ", ".join(f"{sign} {one[key]:g}" for key, sign in shown)
    return f" {words}" if words else ""


def _default(one: Any, value: Any, full: str) -> str:
    if "default" not in one and value is None:
        return "required"
    if value is None:
        value = one.get("default")
    if value is None:
        return "*level*" if full.startswith("locality.") else "–"
    if isinstance(value, dict) and value:
        return "see there"
    return f'<span class="setting-default">`{json.dumps(value, ensure_ascii=False)}`</span>'


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


COMMANDS = """# Commands

`hamdist COMMAND --help` prints the same. Exit codes: [Exit codes](exit-codes.md). This page is
generated from the code.
"""


def commands_page() -> str:
    """Return the page of all commands, with their arguments and options."""
    import typer

    from hamdist.cli import app

    root = typer.main.get_command(app)
    return "\n\n".join([COMMANDS, *_commands(root, "hamdist")]) + "\n"


def _commands(command: Any, name: str) -> Iterator[str]:
    children = getattr(command, "commands", None)
    if children is not None:
        if " " in name:
            yield f"## {name}"
            yield inspect.cleandoc(command.help or "")
        for child, sub in children.items():
            yield from _commands(sub, f"{name} {child}")
        return
    yield f"{'##' if name.count(' ') == 1 else '###'} {name}"
    yield inspect.cleandoc(command.help or "")
    rows = list(_parameters(command.callback))
    if rows:
        yield "\n".join(["| | | meaning |", "| --- | --- | --- |", *rows])


def _parameters(function: Any) -> Iterator[str]:
    """Yield a row of the table for each parameter of the function behind a command."""
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        notes = getattr(hints[name], "__metadata__", ())
        info = next((note for note in notes if hasattr(note, "help")), None)
        if info is None:  # typer's context
            continue
        names = info.param_decls or ["--" + name.strip("_").replace("_", "-")]
        if type(info).__name__ == "ArgumentInfo":
            names = [info.metavar or name.upper()]
        shown, default = info.show_default, parameter.default
        if isinstance(shown, str):
            words = f" Default: {shown}."
        elif shown and default not in (None, False, inspect.Parameter.empty):
            words = f" Default: `{_plain(default)}`."
        else:
            words = ""
        forms = ", ".join(f"`{one}`" for one in names)
        yield f"| {forms} | {_kind(hints[name], info)} | {_cell((info.help or '') + words)} |"


def _kind(hint: Any, info: Any) -> str:
    """Return what a parameter takes, in words."""
    types = [hint.__origin__, *getattr(hint.__origin__, "__args__", ())]
    choices = next((t for t in types if isinstance(t, type) and issubclass(t, Enum)), None)
    if choices is not None:
        return ", ".join(f"`{one.value}`" for one in choices)
    if bool in types:
        return "flag"
    if info.metavar:
        return f"`{_cell(info.metavar)}`"
    least = f" ≥ {info.min:g}" if getattr(info, "min", None) is not None else ""
    names = {int: "int", float: "float", Path: "path", str: "text"}
    return next((word for kind, word in names.items() if kind in types), "text") + least


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
