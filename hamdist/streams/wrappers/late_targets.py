"""Targets that come later than their inputs, and their assignment to their own samples.

j: samples by which a target comes late, n: number of a sample.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from hamdist.errors import SettingsError, StreamError
from hamdist.streams.sample import Sample, SampleSpec, Stream, Target, check_stream, report_of
from hamdist.streams.wrappers.chosen_targets import Derived
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
        """Yield the samples from sample 0 on."""
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


class LateLabels(Derived):
    """Stream whose samples are predicted when they come, and learned when their labels come.

    Every sample gives two passes: first sample n - delay again, with its target, to learn from (of
    the first `delay` samples their own input, without one), then sample n without a target, to be
    predicted. So n is predicted when the targets of 0 ... n - delay are learned: progressive
    validation with delay (Grzenda et al. 2020; river's `progressive_val_score(delay=...)`). The
    readout keeps `delay` predictions and scores each against its target (runtime/nodes/pulse.py),
    the stream as many inputs. A finite stream ends before its last `delay` targets come. Portable
    where the wrapped stream is.

    Args:
        stream: sample n has in `y` the target of sample n - delay.
        delay: number of samples by which targets come late.
        kept: a sample passes once, and blocks keep what they need of that until its label comes,
            with sample n + delay, which was predicted before that label is learned.

    Raises:
        SettingsError: the delay is below 1, or the stream is paced.
    """

    def __init__(self, stream: Stream, delay: int, *, kept: bool = False) -> None:
        _check_delay(delay)
        _check_unpaced("LateLabels", stream)
        super().__init__(stream)
        self._delay = delay
        self._kept = kept

    @property
    def spec(self) -> SampleSpec:
        """Return the spec of the wrapped stream, with the delay."""
        return replace(self._stream.spec, late=self._delay, kept=self._kept)

    def samples(self) -> Iterator[Sample]:
        """Yield the passes from sample 0 on: two for each sample; one with its trace kept."""
        if self._kept:
            yield from self._stream.samples()
            return
        waiting: deque[Sample] = deque()
        for n, current in enumerate(self._stream.samples()):
            waiting.append(replace(current, y=None))
            yield replace(waiting.popleft(), y=current.y) if n >= self._delay else waiting[-1]
            yield replace(current, y=None)


@dataclass(slots=True)
class _Waiting:
    """A sample and the targets that have come for it; settled: nothing more will come."""

    sample: Sample
    y: Target
    settled: bool


class Rejoin(Derived):
    """Stream in which each sample waits for the target that comes later.

    It is predicted and learned only then, so prequential scores are those of a stream without
    delay; `LateLabels` predicts it when it comes.

    Without `delay` targets are tagged: `Sample.late` of any later sample holds them by the number
    of their sample, in any order, several or none in a sample; a sample that has its target in `y`
    waits for none. Where readouts have targets of their own, a sample waits until each has one (or
    None).

    Samples leave in their order, each with its own target, as soon as that is there and all before
    it have left: j samples later than without delay, and otherwise the same. A target of None, with
    its tag, says that there will be none. Where more than `patience` samples wait, the oldest
    leaves without a target. At the end of the stream those that wait leave with what they have.
    Input, end mark and time stamp are a sample's own; at most `patience` + 1 samples are kept.

    `report`: `let_go`, samples that left without the target they waited for; `too_late`, targets
    that came after that; `awaiting_most`, the most samples that waited for a target, their own or
    that of one before them. Portable where the wrapped stream is.

    Args:
        stream: the stream with late targets.
        delay: j, if sample n of the stream has in `y` the target of sample n - j; None if targets
            are tagged.
        patience: largest number of samples that wait.

    Raises:
        SettingsError: a delay below 1, patience below 1 or below the delay, or a paced stream
            (samples that it drops have no number: rejoin first, then pace).
        StreamError: a tag that names a sample to come, a second target, or tags beside a delay.
    """

    def __init__(self, stream: Stream, delay: int | None = None, *, patience: int = 64) -> None:
        if delay is not None:
            _check_delay(delay)
        if patience < max(1, delay or 1):
            raise SettingsError(
                f"patience is {patience}; at least {max(1, delay or 1)} samples have to wait"
            )
        _check_unpaced("Rejoin", stream)
        super().__init__(stream)
        self._delay = delay
        self._patience = patience
        self._names = frozenset(stream.spec.targets or ())
        self._counts = _no_counts()

    def report(self) -> dict[str, int]:
        """Return the counts, with those of the wrapped stream."""
        return {**report_of(self._stream), **self._counts}

    def samples(self) -> Iterator[Sample]:
        """Yield the samples from number 0 on."""
        self._counts = _no_counts()
        waiting: deque[_Waiting] = deque()
        first = 0  # the number of the sample that has waited longest
        for n, current in enumerate(self._stream.samples()):
            own = None if self._delay is not None else current.y
            waiting.append(_Waiting(current, own, self._complete(own)))
            for number, y in self._arrivals(n, current).items():
                self._settle(n, number, y, waiting, first)
            while waiting and (waiting[0].settled or len(waiting) > self._patience):
                yield self._leave(waiting.popleft())
                first += 1
            self._counts["awaiting_most"] = max(self._counts["awaiting_most"], len(waiting))
        for left in waiting:
            yield self._leave(left)

    def _arrivals(self, n: int, current: Sample) -> Mapping[int, Target]:
        """Return the targets that come with sample n, by the number of their sample."""
        if self._delay is None:
            return current.late or {}
        if current.late is not None:
            raise StreamError(
                f"sample {n} brings tagged targets, but Rejoin was given the delay {self._delay}, "
                "which is for targets without tags: leave the delay out"
            )
        return {n - self._delay: current.y} if n >= self._delay else {}

    def _settle(self, n: int, number: int, y: Target, waiting: deque[_Waiting], first: int) -> None:
        if not 0 <= number <= n:
            raise StreamError(
                f"sample {n} brings the target of sample {number}, which has not come yet: samples "
                "are numbered from 0, and a target comes with its sample or later"
            )
        if number < first:
            self._counts["too_late"] += y is not None
            return
        entry = waiting[number - first]
        if isinstance(y, Mapping):
            known = entry.y if isinstance(entry.y, Mapping) else {}
            twice = sorted(known.keys() & y.keys())
            entry.y = {**known, **y}
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

    def _leave(self, entry: _Waiting) -> Sample:
        self._counts["let_go"] += not entry.settled
        return replace(entry.sample, y=entry.y, late=None)


def _no_counts() -> dict[str, int]:
    return {"let_go": 0, "too_late": 0, "awaiting_most": 0}


def _check_unpaced(wrapper: str, stream: Stream) -> None:
    if isinstance(stream, Paced):
        raise SettingsError(
            f"{wrapper} got a Paced stream, whose samples may have been dropped, so that targets "
            "no longer fit: rejoin first, then pace, as in Paced(Rejoin(stream), ...)"
        )
    check_stream(wrapper, stream)


def _check_delay(delay: int) -> None:
    if delay < 1:
        raise SettingsError(f"delay is {delay}; a target comes at least 1 sample late")
