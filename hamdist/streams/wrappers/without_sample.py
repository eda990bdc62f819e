"""A stream without one of its samples."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from hamdist.errors import StreamError
from hamdist.streams.replay import replays
from hamdist.streams.sample import Sample, Stream, check_stream
from hamdist.streams.wrappers.chosen_targets import Derived


class WithoutSample(Derived):
    """The first `number` samples of a stream (None: all), but for one."""

    def __init__(self, stream: Stream, sample: int, number: int | None) -> None:
        check_stream("WithoutSample", stream)
        if not replays(stream):
            raise StreamError(
                "--without-sample: the stream does not give the same samples again; give one that "
                "does (--stream)"
            )
        super().__init__(stream)
        self._sample, self._number = sample, number

    @property
    def unaltered(self) -> Stream:
        """Return the stream with that sample."""
        return self._stream

    def samples(self) -> Iterator[Sample]:
        """Yield the samples that are left, from the first one on."""
        for n, sample in enumerate(islice(self._stream.samples(), self._number)):
            if n != self._sample:
                yield sample
