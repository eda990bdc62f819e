"""What was said to a live run, entry by entry, and what the stream makes of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, Protocol

from hamdist.errors import StreamError
from hamdist.streams.sample import Emission, Emits, Sample, SampleSpec, Target


class Entry(NamedTuple):
    """What was said to a live run.

    Attributes:
        event: feed, teach, set or idle; pause, go_on and stop are only for the record.
        number: of the sample (feed, teach).
        sample: u, y and end of a fed one; of a label (teach) only y counts.
        rate: factor of the step size (set).
    """

    event: str
    number: int = 0
    sample: Sample | None = None
    rate: float = 1.0


class EntryLog(Protocol):
    """A journal (runtime/live/journal.py)."""

    def append(self, entry: Entry) -> None:
        """Write an entry, before the call that brings it returns."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Yield all entries that reach the network, from the first one on."""
        ...


class Unlabelled:
    """The latest `patience` samples that may still get a label."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._samples: OrderedDict[int, Sample] = OrderedDict()

    def add(self, number: int, sample: Sample) -> None:
        """Keep a sample, and let go of the one that has waited longest if there are too many."""
        self._samples[number] = sample
        if len(self._samples) > self._patience:
            self._samples.popitem(last=False)

    def take(self, number: int, y: Target) -> Sample:
        """Return the sample with its label, which it waits for no longer."""
        sample = self.find(number)
        del self._samples[number]
        return replace(sample, y=y)

    def find(self, number: int) -> Sample:
        """Return a sample. Raises StreamError if it does not wait for a label."""
        sample = self._samples.get(number)
        if sample is None:
            raise StreamError(
                f"sample {number} waits for no label: it came with one, has been taught, was never "
                f"fed, or more than {self._patience} unlabelled samples came after it (patience)"
            )
        return sample


class EntryCourse:
    """Turns entries into emissions: the same in a live run and in its repetition."""

    def __init__(self, spec: SampleSpec, nothing: Sample) -> None:
        self.unlabelled = Unlabelled(spec.live)
        self._latest = nothing
        self.fed = 0
        self.rate = 1.0
        self.open = False  # a sequence is under way
        self._index = 0

    def emission(self, entry: Entry, cut: int = 0) -> Sample | None:
        """Return what the stream emits for an entry; None where it emits nothing."""
        if entry.event == "set":
            self.rate = entry.rate
        if entry.event == "idle":
            told = Emission(Emits.IDLE, self._index, max(0, self.fed - 1), self.rate, cut)
            return replace(self._latest, y=None, end=False, emission=told)
        if entry.sample is None:
            return None
        if entry.event == "feed":
            self.open = not entry.sample.end
            self.fed, kind, sample = entry.number + 1, Emits.SAMPLE, entry.sample
            self._latest = sample
            if sample.y is None:
                self.unlabelled.add(entry.number, sample)
        else:
            kind = Emits.AGAIN
            sample = self.unlabelled.take(entry.number, entry.sample.y)
        self._index += 1
        told = Emission(kind, self._index - 1, entry.number, self.rate, cut)
        return replace(sample, emission=told)
