"""Settings by name: a name itself goes first, then the first pattern (as in a shell) that fits."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from hamdist.errors import HamdistError, SettingsError


def fitting(name: str, patterns: Iterable[str]) -> str | None:
    """Return `name` if it is among the patterns, else the first pattern that fits it, else None."""
    patterns = list(patterns)
    if name in patterns:
        return name
    return next((p for p in patterns if fnmatchcase(name, p)), None)


def check_patterns(
    field: str,
    patterns: Iterable[str],
    names: Iterable[str],
    noun: str,
    error: type[HamdistError] = SettingsError,
) -> None:
    """Check that every pattern fits a name that no earlier pattern fits.

    field: of the settings; noun: kind of thing that is named; both for the message of `error`,
    which is raised for a pattern that fits no name, or none that is left.
    """
    patterns, names = list(patterns), list(names)
    for pattern in patterns:
        fits = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not fits:
            raise error(f"{field}.{pattern}: no such {noun}; known: {', '.join(names) or 'none'}")
        if all(fitting(name, patterns) != pattern for name in fits):
            raise error(
                f"{field}.{pattern}: every {noun} that it fits ({', '.join(fits)}) is taken by "
                "another pattern before it; list it earlier"
            )
