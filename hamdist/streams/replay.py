"""Continues a stream at the sample where a run stopped."""

from __future__ import annotations

from collections.abc import Iterator
from traceback import clear_frames
from typing import Protocol, runtime_checkable

from hamdist.errors import StreamError
from hamdist.streams.sample import Sample, Stream


@runtime_checkable
class Seekable(Protocol):
    """Stream that can begin at any sample without making those before it."""

    def samples_from(self, n: int) -> Iterator[Sample]:
        """Return `samples()` without its first n samples."""
        ...


@runtime_checkable
class Passing(Protocol):
    """Stream that may drop samples, such as those that arrive while the run is busy."""

    def passed(self) -> int:
        """Return the number of samples dropped up to the latest one yielded."""
        ...

    def samples_behind(self, drawn: int, passed: int) -> Iterator[Sample]:
        """Return the samples after `drawn` yielded and `passed` dropped ones."""
        ...


def passed_over(stream: Stream) -> int:
    """Return the number of samples of its source that a stream has dropped so far."""
    return stream.passed() if isinstance(stream, Passing) else 0


def replays(stream: Stream) -> bool:
    """Return True if the stream yields the same samples at every call of `samples()`.

    Portable streams do, unless their attribute `replays` is False, and so do lists.
    """
    return bool(getattr(stream, "replays", stream.portable))


def drops(stream: Stream) -> bool:
    """Return True if the stream goes on behind its last sample, the next being the clock's."""
    return bool(getattr(stream, "drops", False))


def samples_from(stream: Stream, n: int, passed: int = 0) -> Iterator[Sample]:
    """Return the samples of a stream from sample n on.

    A stream that does not yield the same samples again continues with its next sample. passed:
    number of samples that it has dropped before. Raises StreamError where the stream ends before
    sample n.
    """
    if isinstance(stream, Passing):
        return stream.samples_behind(n, passed)
    if n == 0 or not replays(stream):
        return iter(stream.samples())
    if isinstance(stream, Seekable):
        return stream.samples_from(n)
    drawn = iter(stream.samples())
    for samples in range(n):
        if next(drawn, None) is None:
            raise StreamError(
                f"the stream has {samples} samples, but the snapshot was taken {n} samples behind "
                "its start: give the stream that the run had"
            )
    return drawn


def next_sample(
    samples: Iterator[Sample], n: int, passing: type[Exception] = StreamError
) -> Sample | None:
    """Return sample n; None at the end. Raises StreamError for all that a stream raises but that,
    and what is `passing`."""
    try:
        return next(samples, None)
    except (StreamError, passing):
        raise
    except Exception as error:
        # (What the error's frames hold, as the processes of a DataLoader, ends here, in order; as
        # garbage it would keep whoever collects it waiting for 5 s a process.)
        clear_frames(error.__traceback__)
        raise StreamError(
            f"sample {n}: the stream raised {type(error).__name__}: {error}"
        ) from error
