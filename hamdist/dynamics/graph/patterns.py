"""Settings by name: a name itself goes first, then the first pattern (as in a shell) that fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from hamdist.errors import HamdistError, SettingsError


def fitting(name: str, patterns: Iterable[str], *others: str) -> str | None:
    """Return `name` if it is among the patterns, else the first pattern that fits it, else None.

    others: further names of the same thing.
    """
    patterns, names = list(patterns), (name, *others)
    exact = next((n for n in names if n in patterns), None)
    return exact or next((p for p in patterns if any(fnmatchcase(n, p) for n in names)), None)


def check_patterns(
    field: str,
    patterns: Iterable[str],
    names: Iterable[str],
    noun: str,
    error: type[HamdistError] = SettingsError,
    others: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Check that every pattern fits a name that no earlier pattern fits.

    field: of the settings; noun: kind of thing that is named; both for the message of `error`,
    which is raised for a pattern that fits no name, or none that is left. others: further names.
    """
    patterns = list(patterns)
    others = others or dict.fromkeys(names, ())
    for pattern in patterns:
        fits = [name for name in others if fitting(name, [pattern], *others[name])]
        if not fits:
            raise error(f"{field}.{pattern}: no such {noun}; known: {', '.join(others) or 'none'}")
        if all(fitting(name, patterns, *others[name]) != pattern for name in fits):
            raise error(
                f"{field}.{pattern}: every {noun} that it fits ({', '.join(fits)}) is taken by "
                "another pattern before it; list it earlier"
            )
