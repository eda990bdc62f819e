"""Settings from YAML and from `--set`, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from hamdist.config.merge import lay_over
from hamdist.config.messages import describe, shown
from hamdist.config.settings import Settings
from hamdist.errors import SettingsError

# More than any settings have; beyond it a few lines of text could take minutes or the whole stack.
MAX_NESTING = 50
MAX_VALUES = 10_000
_LEADING_ZERO = re.compile(r"[-+]?0[\d_]+")  # which YAML 1.1 reads as octal


class _PlainLoader(yaml.SafeLoader):
    """Loader of plain values, without the surprises of YAML.

    1:30 is no 90, 010 no 8, no name is given twice, no tag names a type, and an alias counts as
    many values as it repeats.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[str, int] = {}  # by anchor
        self._values = self._nesting = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line, anchor, before = event.start_mark.line + 1, event.anchor, self._values
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"line {line}: the tag {event.tag!r}: settings are plain values")
        value = getattr(event, "value", "")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"line {line}: {value!r} has a lone surrogate, which is no character")
        if getattr(event, "style", "") is None and _LEADING_ZERO.fullmatch(value):
            raise ValueError(
                f"line {line}: {value}: some read a number that begins with 0 as octal; write it "
                f"without, or '{value}' if it is text"
            )
        if isinstance(event, yaml.AliasEvent) and anchor not in self._sizes:
            raise ValueError(f"line {line}: *{anchor} stands before the end of &{anchor}")
        self._values += self._sizes[anchor] if isinstance(event, yaml.AliasEvent) else 1
        self._nesting += 1
        if self._values > MAX_VALUES or self._nesting > MAX_NESTING + 1:  # (the innermost: a value)
            raise ValueError(
                f"line {line}: more than {MAX_VALUES:,} values, or {MAX_NESTING} inside each other"
            )
        node = super().compose_node(parent, index)
        self._nesting -= 1
        if anchor is not None:
            self._sizes[anchor] = self._values - before
        return node

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        of_time = kind is yaml.ScalarNode and tag.endswith((":int", ":float")) and ":" in value
        return "tag:yaml.org,2002:str" if of_time else tag

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    line = key.start_mark.line + 1
                    raise ValueError(f"line {line}: {key.value!r} is given twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def plain_values(text: str) -> Any:
    """Return the values of YAML `text`.

    Raises ValueError with the reason for which it cannot hold settings: besides text that is no
    YAML, tags (which name types), and text that is small and becomes large by its aliases.
    """
    try:
        loader = _PlainLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ValueError(f"{where}no valid YAML: {problem}") from None


def read_yaml(text: str, origin: str) -> Any:
    """Return the plain values of YAML `text`; raise SettingsError naming `origin` and the line."""
    try:
        return plain_values(text)
    except ValueError as error:
        raise SettingsError(f"{origin}, {error}") from None


SettingsModel = TypeVar("SettingsModel", bound=BaseModel)


def read_settings(text: str, origin: str, overrides: Sequence[Mapping[str, Any]] = ()) -> Settings:
    """Read settings from YAML `text`, with `overrides` laid over it in order (`lay_over`).

    Args:
        text: the YAML.
        origin: name of the file, for errors.
        overrides: mappings such as those of `parse_override`.

    Raises:
        SettingsError: names `origin`, and the line or the field.
    """
    raw = read_yaml(text, origin)
    if raw is None:
        raise SettingsError(f"{origin}: is empty; `hamdist recipes` lists settings to begin with")
    raw = mapping(raw, origin)
    for override in overrides:
        raw = lay_over(raw, override)
    return checked(Settings, raw, origin)


def mapping(raw: object, origin: str, kind: str = "settings") -> dict[str, Any]:
    """Return `raw` if it is a mapping; raise SettingsError naming `origin` if not."""
    if raw is None:
        raise SettingsError(f"{origin}: is empty")
    if not isinstance(raw, dict):
        raise SettingsError(f"{origin}: {kind} are a mapping of names to values, not {shown(raw)}")
    return raw


def checked(kind: type[SettingsModel], raw: Mapping[str, Any], origin: str) -> SettingsModel:
    """Return `raw` as settings of `kind`; raise SettingsError naming `origin` and wrong fields."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(f"{origin}: {describe(error)}") from None


def parse_override(text: str) -> dict[str, Any]:
    """Return `stream.batch=8` as {'stream': {'batch': 8}}; the value is read as YAML.

    Raises SettingsError where there is no '=' or the value is no YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SettingsError(f"--set {text!r}: write it as key=value, for example stream.batch=8")
    try:
        parsed: Any = plain_values(value)
    except ValueError as error:
        raise SettingsError(f"--set {text!r}: the value is no YAML: {error}") from None
    parts = key.split(".")
    if len(parts) > MAX_NESTING:
        raise SettingsError(f"--set {text!r}: a key of {len(parts)} parts")
    return nested(parts, parsed)


def nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return ('stream', 'batch'), 8 as {'stream': {'batch': 8}}."""
    for part in reversed(path):
        value = {part: value}
    return dict(value)


def read_mapping(path: Path, origin: str) -> dict[str, Any]:
    """Read a YAML file that is a mapping. Raises SettingsError that begins with `origin`."""
    try:
        return mapping(read_yaml(path.read_text("utf-8-sig"), origin), origin)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{origin}: cannot be read: {error}") from None


def to_yaml(settings: Settings, *, only_set: bool = False) -> str:
    """Return the settings as YAML for `read_settings`.

    only_set: without those that have their default, which level 'auto' may choose.
    """
    values = settings.model_dump(mode="json", exclude_unset=only_set)
    text: str = yaml.safe_dump(values, sort_keys=False)
    return text
