"""Rules as a user names them: an object, a built-in rule's name, or `rules.py:MyRule`.

A rule of a file is imported, so its code runs: a settings file that names one is a program. Names
that come out of a snapshot are not followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from hamdist.config import did_you_mean
from hamdist.dynamics.rules.names import HOMES, built_in
from hamdist.dynamics.rules.rule import Rule
from hamdist.errors import SettingsError
from hamdist.loading import called, check_call, load_function

NamedRule: TypeAlias = "Rule | str | Mapping[str, Any]"


def make_rules(rules: Mapping[str, NamedRule]) -> dict[str, Rule]:
    """Return the rules by block or pattern.

    Args:
        rules: by block or pattern a `Rule`, the name of one, or a mapping with its name and the
            arguments of its class: `{"name": "sign-symmetry", "magnitude": "uniform"}`.

    Raises:
        SettingsError: one of them is none; names the entry.
    """
    return {pattern: make_rule(f"rules.{pattern}", one) for pattern, one in rules.items()}


def make_rule(field: str, given: NamedRule) -> Rule:
    """Return the rule that `given` is or names. field: where it was given, for errors."""
    arguments: dict[str, Any] = {}
    if isinstance(given, Mapping):
        arguments = dict(given)
        given = arguments.pop("name", "")
    made: object = given
    if isinstance(given, str):
        made = _named(field, given)
    if callable(made):
        check_call(field, str(given), made, *arguments)
        made = called(field, made, **arguments)
    if not isinstance(made, Rule):
        raise SettingsError(
            f"{field} is {given!r}; give a hamdist.Rule, the name of a built-in one "
            f"({', '.join(HOMES)}), or FILE.py:NAME of a class that derives from hamdist.Rule"
        )
    return made


def _named(field: str, name: str) -> object:
    if ":" in name:
        return load_function(field, name)
    if name in HOMES:
        return built_in(name)
    raise SettingsError(
        f"{field} {name!r} is no rule; built in: {', '.join(HOMES)}; your own: FILE.py:NAME"
        f"{did_you_mean(name, list(HOMES))}"
    )
