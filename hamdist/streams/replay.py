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


def replays(stream: Stream) -> bool:
    """Whether the stream yields the same items whenever it is asked: portable ones do, unless they
    say otherwise (`replays`), and so does what was made of a list."""
    return bool(getattr(stream, "replays", stream.portable))


def samples_from(stream: Stream, n: int) -> Iterator[Sample]:
    """The samples of a stream from item n on; one that does not yield the same items again goes on
    with what it has.

    Raises StreamError where the stream ends before.
    """
    if n == 0 or not replays(stream):
        return iter(stream.samples())
    if isinstance(stream, Seekable):
        return stream.samples_from(n)
    drawn = iter(stream.samples())
    for passed in range(n):
        if next(drawn, None) is None:
            raise StreamError(
                f"the stream has {passed} items, but the snapshot was taken {n} items behind its "
                "start: give the stream that the run had"
            )
    return drawn
