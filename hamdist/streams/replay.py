"""A stream that goes on where it was left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from hamdist.errors import StreamError
from hamdist.streams.sample import Sample, Stream


@runtime_checkable
class Seekable(Protocol):
    """A stream that can begin at any item without making those before it."""

    def samples_from(self, n: int) -> Iterator[Sample]:
        """As `samples()`, without its first n items."""
        ...


@runtime_checkable
class Passing(Protocol):
    """A stream that may pass over items of its source: those that came while nobody asked, say."""

    def passed(self) -> int:
        """How many, up to the latest item that was given."""
        ...

    def samples_behind(self, given: int, passed: int) -> Iterator[Sample]:
        """What follows after so many items were given, and so many passed over."""
        ...


def passed_over(stream: Stream) -> int:
    """Items of its source that a stream has passed over so far."""
    return stream.passed() if isinstance(stream, Passing) else 0


def replays(stream: Stream) -> bool:
    """Whether the stream yields the same items whenever it is asked: portable ones do, unless they
    say otherwise (`replays`), and so does what was made of a list."""
    return bool(getattr(stream, "replays", stream.portable))


def drops(stream: Stream) -> bool:
    """Whether the stream can be gone on with behind the item that was given last, though which ones
    it gives depends on the clock."""
    return bool(getattr(stream, "drops", False))


def samples_from(stream: Stream, n: int, passed: int = 0) -> Iterator[Sample]:
    """The samples of a stream from item n on; one that does not yield the same items again goes on
    with what it has. passed: items that it has passed over on the way.

    Raises StreamError where the stream ends before.
    """
    if isinstance(stream, Passing):
        return stream.samples_behind(n, passed)
    if n == 0 or not replays(stream):
        return iter(stream.samples())
    if isinstance(stream, Seekable):
        return stream.samples_from(n)
    drawn = iter(stream.samples())
    for items in range(n):
        if next(drawn, None) is None:
            raise StreamError(
                f"the stream has {items} items, but the snapshot was taken {n} items behind its "
                "start: give the stream that the run had"
            )
    return drawn
