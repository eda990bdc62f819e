"""What streams that are made of another one have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from hamdist.streams.replay import replays
from hamdist.streams.sample import Sample, SampleSpec, Stream, report_of


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
