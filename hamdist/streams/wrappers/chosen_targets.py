"""A stream with the targets of some of its readouts alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from hamdist.streams.replay import drops, passed_over, replays, samples_from
from hamdist.streams.sample import Sample, SampleSpec, Stream, report_of


def with_targets_of(stream: Stream, readouts: Collection[str]) -> Stream:
    """`stream` without the targets of other readouts; itself where it has none of these, or where
    it lacks one that is asked for (which others have to say)."""
    known = stream.spec.targets
    if known is None or known.keys() <= set(readouts) or not set(readouts) <= known.keys():
        return stream
    return Chosen(stream, readouts)


class Derived(ABC):
    """A stream made of another one: portable where that is, and it yields the same items again
    where that does."""

    def __init__(self, stream: Stream) -> None:
        self.portable: bool = stream.portable
        self.replays = replays(stream)
        self._stream = stream

    @property
    def spec(self) -> SampleSpec:
        """That of the wrapped stream."""
        return self._stream.spec

    def report(self) -> dict[str, int]:
        """The counts of the wrapped stream."""
        return report_of(self._stream)

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """The items from item 0 on."""


class Chosen(Derived):
    """A stream in which the targets of other readouts than these are left out."""

    def __init__(self, stream: Stream, readouts: Collection[str]) -> None:
        super().__init__(stream)
        self.drops = drops(stream)
        self._readouts = frozenset(readouts)

    @property
    def spec(self) -> SampleSpec:
        """That of the wrapped stream, without what those readouts are compared with."""
        own = self._stream.spec
        kept = {n: one for n, one in (own.targets or {}).items() if n in self._readouts}
        some = SampleSpec.several(own.u_shape, own.u_dtype, kept)
        return replace(
            some, late=own.late, tokens=own.tokens, inputs=own.inputs, example=own.example
        )

    def samples(self) -> Iterator[Sample]:
        """The items from item 0 on."""
        return self._chosen(self._stream.samples())

    def passed(self) -> int:
        """Those of the wrapped stream."""
        return passed_over(self._stream)

    def samples_behind(self, given: int, passed: int) -> Iterator[Sample]:
        """The wrapped stream's."""
        return self._chosen(samples_from(self._stream, given, passed))

    def _chosen(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            if isinstance(sample.y, Mapping):
                y = {n: one for n, one in sample.y.items() if n in self._readouts}
                yield replace(sample, y=y)
            else:
                yield sample
