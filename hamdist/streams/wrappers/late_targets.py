"""Targets that come later than their inputs, and their assignment to their own samples.

j: samples by which a target comes late, n: number of a sample.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from hamdist.errors import SettingsError, StreamError
from hamdist.streams.sample import (
    Emission,
    Emits,
    Sample,
    SampleSpec,
    Stream,
    Target,
    check_stream,
    report_of,
)
from hamdist.streams.wrappers.derived import Derived
from hamdist.streams.wrappers.pace import Paced


class Delayed(Derived):
    """Stream whose targets come `delay` samples after their inputs.

    Sample n keeps its input and gets the target of sample n - delay. The first `delay` samples
    have no target, and a finite stream ends before its last `delay` targets come. Portable where
    the wrapped stream is.

    Args:
        stream: the stream whose targets are delayed.
        delay: number of samples.
        tagged: True to tag the target with the number of its sample (`Sample.late`), False to give
            it as the sample's own `y`.

    Raises:
        SettingsError: the delay is below 1.
    """

    def __init__(self, stream: Stream, delay: int, *, tagged: bool = True) -> None:
        _check_delay(delay)
        check_stream("Delayed", stream)
        super().__init__(stream)
        self._delay = delay
        self._tagged = tagged
        self._names = tuple(stream.spec.targets or ())

    def samples(self) -> Iterator[Sample]:
        coming: deque[Target] = deque()
        for n, sample in enumerate(self._stream.samples()):
            coming.append(sample.y)
            due = coming.popleft() if len(coming) > self._delay else None
            if not self._tagged:
                yield replace(sample, y=due)
            elif n < self._delay:
                yield replace(sample, y=None)
            else:
                yield replace(sample, y=None, late={n - self._delay: self._whole(due)})

    def _whole(self, y: Target) -> Target:
        """Return `y` with None for the readouts that it leaves out: nothing more will come."""
        return {name: y.get(name) for name in self._names} if isinstance(y, Mapping) else y


@dataclass(slots=True)
class _Waiting:
    """A sample and the targets that have come for it; settled: nothing more will come."""

    sample: Sample
    y: Target
    settled: bool

    @property
    def learnable(self) -> bool:
        """Return True if all targets have come that will, and there are some."""
        y = list(self.y.values()) if isinstance(self.y, Mapping) else [self.y]
        return self.settled and any(t is not None for t in y)

    def emitted(self, y: Target, emission: Emission | None = None) -> Sample:
        """Return the sample with its target, as the stream emits it."""
        return replace(self.sample, y=y, late=None, emission=emission)


class _WaitingSamples:
    """The samples of a stream whose targets have not come, by number, and what was counted."""

    def __init__(self, names: Collection[str], delay: int | None, patience: int) -> None:
        self.entries: dict[int, _Waiting] = {}
        self.counts = {"let_go": 0, "too_late": 0, "awaiting_most": 0}
        self._names, self._delay, self._patience = frozenset(names), delay, patience
        self._numbers: dict[int | str, int] = {}  # of those that wait, by key
        self._keyed = False

    def take_in(self, n: int, current: Sample) -> list[int]:
        """Take in sample n and the targets that it brings; return whose those were."""
        key = n if current.key is None else current.key
        if key in self._numbers:
            raise StreamError(
                f"sample {n} has the key {key!r} of sample {self._numbers[key]}, which waits for "
                "its target: give each sample a key of its own"
            )
        self._keyed = self._keyed or current.key is not None
        self._numbers[key] = n
        target = None if self._delay is not None else current.y
        self.entries[n] = _Waiting(current, target, self._complete(target))
        came = []
        for tag, y in self._arrivals(n, current).items():
            number = self._numbers.get(tag)
            if number is not None:
                self._settle(n, number, y)
                came.append(number)
            elif not self._keyed and not (isinstance(tag, int) and 0 <= tag <= n):
                raise StreamError(
                    f"sample {n} brings the target of sample {tag!r}, which has not come yet: "
                    "samples are numbered from 0, or have keys, and a target comes with its sample "
                    "or later"
                )
            else:
                self.counts["too_late"] += y is not None
        return came

    def leave(self, number: int) -> _Waiting:
        """Let a sample go."""
        entry = self.entries.pop(number)
        self._numbers.pop(number if entry.sample.key is None else entry.sample.key)
        self.counts["let_go"] += not entry.settled
        return entry

    def oldest(self) -> _Waiting | None:
        """Return the sample that has waited longest, once it is settled or has to go."""
        entry = next(iter(self.entries.values()), None)
        due = entry is not None and (entry.settled or len(self.entries) > self._patience)
        return self.leave(next(iter(self.entries))) if due else None

    def count(self) -> None:
        """Note how many wait."""
        self.counts["awaiting_most"] = max(self.counts["awaiting_most"], len(self.entries))

    def _arrivals(self, n: int, current: Sample) -> Mapping[int | str, Target]:
        """Return the targets that come with sample n, by key."""
        if self._delay is None:
            return current.late or {}
        if current.late is not None or current.key is not None:
            raise StreamError(
                f"sample {n} brings tagged targets, or has a key, but the delay {self._delay} was "
                "given, which is for targets without tags: leave the delay out"
            )
        return {n - self._delay: current.y} if n >= self._delay else {}

    def _settle(self, n: int, number: int, y: Target) -> None:
        entry = self.entries[number]
        if isinstance(y, Mapping):
            settled = entry.y if isinstance(entry.y, Mapping) else {}
            twice = sorted(settled.keys() & y.keys())
            entry.y = {**settled, **y}
        else:
            twice = ["y"] if entry.settled else []
            entry.y = y
        if twice:
            raise StreamError(
                f"sample {n} brings a second target ({', '.join(twice)}) for sample {number}: give "
                "each sample its target once"
            )
        entry.settled = self._delay is not None or y is None or self._complete(entry.y)

    def _complete(self, y: Target) -> bool:
        return y.keys() >= self._names if isinstance(y, Mapping) else y is not None


class _LateTargets(Derived):
    """Base of the streams that bring late targets and their samples together."""

    def __init__(self, stream: Stream, delay: int | None = None, *, patience: int = 64) -> None:
        if delay is not None:
            _check_delay(delay)
        if patience < max(1, delay or 1):
            raise SettingsError(
                f"patience is {patience}; at least {max(1, delay or 1)} samples have to wait"
            )
        name = type(self).__name__
        if isinstance(stream, Paced):
            raise SettingsError(
                f"{name} got a Paced stream, whose samples may have been dropped, so that targets "
                "no longer fit: rejoin first, then pace, as in Paced(Rejoin(stream), ...)"
            )
        check_stream(name, stream)
        super().__init__(stream)
        self._delay = delay
        self._patience = patience
        self._waiting = self._new_queue()

    def _new_queue(self) -> _WaitingSamples:
        names = self._stream.spec.targets or ()
        self._waiting = _WaitingSamples(names, self._delay, self._patience)
        return self._waiting

    def report(self) -> dict[str, int]:
        return {**report_of(self._stream), **self._waiting.counts}


class LateLabels(_LateTargets):
    """Stream whose samples are predicted when they come, and learned when their labels come.

    Targets are tagged: `Sample.late` of any later sample holds them by the `key` of their sample,
    or by its number where it has none, in any order, several or none in a sample; a sample that has
    its target in `y` waits for none. Where readouts have targets of their own, a sample waits until
    each has one (or None). A target of None, with its tag, says that there will be none. Where more
    than `patience` samples wait, the oldest is let go.

    The targets that come with sample n are learned in their order, each with its sample (shown
    again, or of which blocks kept the trace), before sample n is predicted: progressive validation
    with delay (Grzenda et al. 2020; river's `progressive_val_score(delay=...)`). The readout keeps
    the predictions of the samples that wait, and scores each against its target
    (runtime/nodes/emissions.py); the stream keeps as many inputs. What has no target at the end of
    the stream is not learned. Portable where the wrapped stream is.

    `report`: `let_go`, samples let go without the target they waited for; `too_late`, targets of
    samples that wait for none, or no longer; `awaiting_most`, the most samples that waited.

    Args:
        stream: the stream with late targets.
        delay: j, if sample n of the stream has in `y` the target of sample n - j; None if targets
            are tagged.
        patience: largest number of samples that wait for tagged targets.
        kept: a sample is not shown again: blocks keep what they have of it until its label comes.

    Raises:
        SettingsError: a delay or patience below 1, or a paced stream (samples that it drops have no
            number: rejoin first, then pace).
        StreamError: the number of a sample to come, a second target, a key that waits already, or
            tags beside a delay.
    """

    def __init__(
        self, stream: Stream, delay: int | None = None, *, patience: int = 64, kept: bool = False
    ) -> None:
        super().__init__(stream, delay, patience=patience if delay is None else max(1, delay))
        self._keeps_traces = kept

    @property
    def spec(self) -> SampleSpec:
        """Return the spec of the wrapped stream, with what waits for targets."""
        # With a delay there is an emission for each target, idle where it is missing, so that
        # their number is known.
        emissions = None if self._delay is None else 2
        spec, most = self._stream.spec, self._patience
        return replace(spec, patience=most, kept=self._keeps_traces, emissions=emissions)

    def samples(self) -> Iterator[Sample]:
        """Yield the emissions from the first one on: samples, and earlier ones with targets."""
        waiting, shown = self._new_queue(), 0
        for n, current in enumerate(self._stream.samples()):
            idle = self._delay is not None
            for number in waiting.take_in(n, current):
                if number < n and waiting.entries[number].learnable:
                    entry, idle = waiting.leave(number), False
                    yield entry.emitted(entry.y, Emission(Emits.AGAIN, shown, number))
                    shown += 1
            entry = waiting.entries[n]
            if idle:
                yield entry.emitted(None, Emission(Emits.IDLE, shown, max(0, n - 1)))
            if entry.learnable:
                waiting.leave(n)
            y = entry.y if entry.learnable else None
            yield entry.emitted(y, Emission(Emits.SAMPLE, shown, n, waits=not entry.learnable))
            shown += 1
            if len(waiting.entries) > self._patience:
                waiting.leave(next(iter(waiting.entries)))
            waiting.count()


class Rejoin(_LateTargets):
    """Stream in which each sample waits for the target that comes later.

    It is predicted and learned only then, so prequential scores are those of a stream without
    delay; `LateLabels` predicts it when it comes. Targets come, and are counted, as there.

    Samples leave in their order, each with its own target, as soon as that is there and all before
    it have left: j samples later than without delay, and otherwise the same. At the end of the
    stream those that wait leave with what they have. Input, end mark and time stamp are a sample's
    own; at most `patience` + 1 samples are kept. Portable where the wrapped stream is.

    Args:
        stream: the stream with late targets.
        delay: j, if sample n of the stream has in `y` the target of sample n - j; None if targets
            are tagged.
        patience: largest number of samples that wait.

    Raises:
        SettingsError: a delay below 1, patience below 1 or below the delay, or a paced stream.
        StreamError: as `LateLabels`.
    """

    def samples(self) -> Iterator[Sample]:
        waiting = self._new_queue()
        for n, current in enumerate(self._stream.samples()):
            waiting.take_in(n, current)
            while (entry := waiting.oldest()) is not None:
                yield entry.emitted(entry.y)
            waiting.count()
        for number in list(waiting.entries):
            entry = waiting.leave(number)
            yield entry.emitted(entry.y)


def _check_delay(delay: int) -> None:
    if delay < 1:
        raise SettingsError(f"delay is {delay}; a target comes at least 1 sample late")
