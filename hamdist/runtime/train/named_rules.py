"""Rules as a user names them: an object, a built-in rule's name, or `rules.py:MyRule`.

A rule of a file is imported, so its code runs: settings that name one are a program. Names that
come out of a snapshot are not followed.
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


def make_rule(field: str, named: NamedRule) -> Rule:
    """Return the rule that `named` is or names; raise SettingsError, naming `field`, if it is none.

    named: a mapping has `name` and the arguments of the class.
    """
    arguments = dict(named) if isinstance(named, Mapping) else {"name": named}
    rule_name: object = arguments.pop("name", "")
    name = str(rule_name)
    if rule_name in HOMES:
        rule_name = built_in(name)
    elif isinstance(rule_name, str):
        if ":" not in rule_name:
            raise SettingsError(
                f"{field} {name!r} is no rule; built in: {', '.join(HOMES)}; your own: FILE.py:NAME"
                f"{did_you_mean(name, list(HOMES))}"
            )
        rule_name = load_function(field, rule_name)
    if callable(rule_name):
        check_call(field, name, rule_name, *arguments)
        rule_name = called(field, rule_name, **arguments)
    if not isinstance(rule_name, Rule):
        raise SettingsError(f"{field} {name!r}: give a hamdist.Rule, or the name of one")
    return rule_name
