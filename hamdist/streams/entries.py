"""Calls to a live run, as entries of its journal, and the emission of the stream for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, Protocol

from hamdist.errors import StreamError
from hamdist.streams.sample import Emission, Emits, Sample, SampleSpec

ROOM = 64  # entries that wait for the network


class Entry(NamedTuple):
    """One call to a live run, with its data.

    Attributes:
        event: feed, teach, set or idle; pause and go_on are only for the record.
        number: of the sample (feed, teach); of the entries that the network got before (idle).
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
        """Write an entry; it is written when this returns."""

    def entries(self) -> Iterator[Entry]:
        """Yield the entries from the first one on."""


class EntryCourse:
    """Turns entries into emissions: the same in a live run and in its repetition.

    Args:
        spec: of the samples.
        nothing: an input to show before the first sample.

    Attributes:
        unlabelled: the latest samples that may still get a label, by number.
        open: a sequence is under way.
    """

    def __init__(self, spec: SampleSpec, nothing: Sample) -> None:
        self.unlabelled: dict[int, Sample] = {}
        self.fed, self.rate, self.open = 0, 1.0, False
        self._patience, self._latest, self._shown = spec.patience, nothing, 0

    def find(self, number: int) -> Sample:
        """Return a sample that waits for its label. Raises StreamError if it does not."""
        if number not in self.unlabelled:
            raise StreamError(
                f"sample {number} waits for no label: it came with one, has been taught, was never "
                f"fed, or more than {self._patience} unlabelled ones came after it (patience)"
            )
        return self.unlabelled[number]

    def emission(self, entry: Entry, *, snapshot: int = 0) -> Sample | None:
        """Return what the stream emits for an entry; None where it emits nothing."""
        if entry.event == "set":
            self.rate = entry.rate
        if entry.event == "idle":
            emission = Emission(Emits.IDLE, self._shown, max(0, self.fed - 1), self.rate, snapshot)
            return replace(self._latest, y=None, end=False, emission=emission)
        sample = entry.sample
        if sample is None:
            return None
        kind = Emits.SAMPLE if entry.event == "feed" else Emits.AGAIN
        if kind is Emits.AGAIN:
            sample = replace(self.find(entry.number), y=sample.y)
            del self.unlabelled[entry.number]
        else:
            self.fed, self.open, self._latest = entry.number + 1, not sample.end, sample
            if sample.y is None:
                self.unlabelled[entry.number] = sample
            if len(self.unlabelled) > self._patience:
                del self.unlabelled[next(iter(self.unlabelled))]
        self._shown += 1
        emission = Emission(
            kind, self._shown - 1, entry.number, self.rate, snapshot, sample.y is None
        )
        return replace(sample, emission=emission)
