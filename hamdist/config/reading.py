"""Settings from YAML and from `--set`, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from hamdist.config.merge import lay_over
from hamdist.config.messages import describe, shown
from hamdist.config.safe_yaml import MAX_NESTING, plain_values, read_yaml
from hamdist.config.settings import Settings
from hamdist.errors import SettingsError

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
