"""Removes the targets of readouts from a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from hamdist.streams.replay import drops, passed_over, replays, samples_from
from hamdist.streams.sample import Sample, SampleSpec, Stream, report_of


def with_targets_of(stream: Stream, readouts: Collection[str]) -> Stream:
    """Return `stream` without the targets of other readouts.

    It is returned unchanged where it has no others, or where it lacks one of `readouts` (an error
    that later checks report).
    """
    known = stream.spec.targets
    if known is None or known.keys() <= set(readouts) or not set(readouts) <= known.keys():
        return stream
    return Chosen(stream, readouts)


class Derived(ABC):
    """Stream made of another one: portable where that is, and replaying where that does."""

    def __init__(self, stream: Stream) -> None:
        self.portable: bool = stream.portable
        self.replays = replays(stream)
        self._stream = stream

    @property
    def spec(self) -> SampleSpec:
        """Return the spec of the wrapped stream."""
        return self._stream.spec

    def report(self) -> dict[str, int]:
        """Return the counts of the wrapped stream."""
        return report_of(self._stream)

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """Yield the samples from sample 0 on."""


class Chosen(Derived):
    """Stream in which the targets of other readouts than these are left out."""

    def __init__(self, stream: Stream, readouts: Collection[str]) -> None:
        super().__init__(stream)
        self.drops = drops(stream)
        self._readouts = frozenset(readouts)

    @property
    def spec(self) -> SampleSpec:
        """Return the spec of the wrapped stream, without the targets of those readouts."""
        own = self._stream.spec
        kept = {n: one for n, one in (own.targets or {}).items() if n in self._readouts}
        some = SampleSpec.several(own.u_shape, own.u_dtype, kept)
        of_target = {n: getattr(some, n) for n in ("y_shape", "y_dtype", "classes", "targets")}
        return replace(own, **of_target)

    def samples(self) -> Iterator[Sample]:
        """Return the samples from sample 0 on."""
        return self.chosen(self._stream.samples())

    def passed(self) -> int:
        """Return the number of samples that the wrapped stream has dropped."""
        return passed_over(self._stream)

    def samples_behind(self, given: int, passed: int) -> Iterator[Sample]:
        """Return the samples of the wrapped stream behind `given` and `passed` ones."""
        return self.chosen(samples_from(self._stream, given, passed))

    def chosen(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """Yield `samples` as this stream gives them."""
        for sample in samples:
            if isinstance(sample.y, Mapping):
                y = {n: one for n, one in sample.y.items() if n in self._readouts}
                yield replace(sample, y=y)
            else:
                yield sample
