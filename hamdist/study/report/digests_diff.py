"""Differences between two runs, by their digests (runtime/results/digests.py)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from typing import TypeAlias

from pydantic import TypeAdapter, ValidationError

from hamdist.errors import SettingsError
from hamdist.runtime.results.digests import DigestMap, DigestTrack

KINDS = ("sent", "taken", "weights")
RunDigests: TypeAlias = Mapping[str, DigestMap]
_SCHEMA: TypeAdapter[dict[str, DigestMap]] = TypeAdapter(dict[str, dict[str, DigestTrack]])


@dataclasses.dataclass(frozen=True, slots=True)
class Parting:
    """The point at which one channel, or the weights of one block, differ in two runs.

    Attributes:
        kind: 'sent', 'taken' (both of a channel) or 'weights'.
        name: the channel ('state u->block0') or the block.
        tick: where the digests differ for the first time (of signals the sender's); None if only
            the latest ones do.
        equal: the last tick before at which they are known to be equal.
    """

    kind: str
    name: str
    equal: int | None
    tick: int | None

    def __str__(self) -> str:
        text = f"weights of block {self.name}"
        if self.kind != "weights":
            direction, edge = self.name.split(" ", 1)
            text = f"{direction} on edge {edge}, as {self.kind}"
        where = "in the end" if self.tick is None else f"at tick {self.tick}"
        last = "" if self.equal is None else f" (equal at tick {self.equal})"
        return f"{text}: differ {where}{last}"


def partings(a: RunDigests, b: RunDigests) -> list[Parting]:
    """Return all differences, the earliest first.

    Raises SettingsError for runs of which one has edges or blocks that the other lacks.
    """
    for kind in KINDS:
        alone = sorted(a.get(kind, {}).keys() ^ b.get(kind, {}).keys())
        if alone:
            raise SettingsError(
                f"the runs cannot be compared: only one of them has {kind} digests of {alone[0]!r} "
                "(other cuts, another level, or a run that was called off)"
            )
        of = next((i.of, b[kind][n].of) for n, i in a[kind].items()) if a.get(kind) else (1, 1)
        if of[0] != of[1]:
            raise SettingsError(
                f"the runs cannot be compared: one hashed one in {of[0]} signals, the other one in "
                f"{of[1]} (engine.digests)"
            )
    differences = [
        parting
        for kind in KINDS
        for name, track in a.get(kind, {}).items()
        for parting in _parting(kind, name, track, b[kind][name])
    ]
    return sorted(differences, key=lambda p: inf if p.tick is None else p.tick)


def _parting(kind: str, name: str, a: DigestTrack, b: DigestTrack) -> Iterator[Parting]:
    there = dict(b.marks)
    equal: int | None = None
    for tick, digest in a.marks:
        if there.get(tick, digest) != digest:
            yield Parting(kind, name, equal, tick)
            return
        if tick in there:
            equal = tick
    if (a.count, a.last) != (b.count, b.last):
        yield Parting(kind, name, equal, None)


def digests_json(digests: RunDigests) -> str:
    """Return the content of the file that `read_digests` reads."""
    plain = {
        kind: {name: dataclasses.asdict(track) for name, track in tracks.items()}
        for kind, tracks in digests.items()
    }
    return json.dumps(plain) + "\n"


def read_digests(run: Path) -> dict[str, RunDigests]:
    """Read the digests of a run's or a comparison's folder by file name, or of one file (name '').

    Raises SettingsError if there are none, or a file holds something else.
    """
    files = {"": run} if run.is_file() else {p.name: p for p in sorted(run.glob("digests*.json"))}
    if not files:
        raise SettingsError(
            f"{str(run)!r}: no digests there; run with --set engine.digests=true --out DIR"
        )
    return {name: _read(path) for name, path in files.items()}


def _read(path: Path) -> RunDigests:
    try:
        digests = _SCHEMA.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise SettingsError(f"{str(path)!r}: no file of digests ({first})") from None
    if set(digests) != set(KINDS):
        raise SettingsError(f"{str(path)!r}: no file of digests (it has {sorted(digests)})")
    return digests


def compared(first: Path, second: Path) -> dict[str, list[Parting]]:
    """Return the partings of two runs, or of all runs common to two comparisons, by file name.

    Raises SettingsError if the two have none in common.
    """
    a, b = read_digests(first), read_digests(second)
    if len(a) == len(b) == 1:  # whatever the files are called
        return {next(iter(a)): partings(*a.values(), *b.values())}
    both = [name for name in a if name in b]
    if not both:
        raise SettingsError(f"{first} has digests of {', '.join(a)}, {second} of {', '.join(b)}")
    return {name: partings(a[name], b[name]) for name in both}
