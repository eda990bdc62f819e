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


def make_rule(field: str, given: NamedRule) -> Rule:
    """Return the rule that `given` is or names; raise SettingsError, naming `field`, if it is none.

    given: a mapping has `name` and the arguments of the class.
    """
    arguments = dict(given) if isinstance(given, Mapping) else {"name": given}
    made: object = arguments.pop("name", "")
    name = str(made)
    if made in HOMES:
        made = built_in(name)
    elif isinstance(made, str):
        if ":" not in made:
            raise SettingsError(
                f"{field} {name!r} is no rule; built in: {', '.join(HOMES)}; your own: FILE.py:NAME"
                f"{did_you_mean(name, list(HOMES))}"
            )
        made = load_function(field, made)
    if callable(made):
        check_call(field, name, made, *arguments)
        made = called(field, made, **arguments)
    if not isinstance(made, Rule):
        raise SettingsError(f"{field} {name!r}: give a hamdist.Rule, or the name of one")
    return made
