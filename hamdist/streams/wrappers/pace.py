"""Samples that arrive in real time, whether the network has time for them or not."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from hamdist.config import Late
from hamdist.errors import SettingsError, StreamError
from hamdist.streams.replay import samples_from
from hamdist.streams.sample import Sample, Stream, check_stream, report_of
from hamdist.streams.wrappers.derived import Derived

LOOK_AT = 1000  # samples taken in at once, from which on a source is watched for being too slow


class Paced(Derived):
    """Stream whose samples arrive at their times, on a clock that runs while the network works.

    Sample n arrives n * `period` seconds after the first one; with `period=None` at its own time
    stamp, counted from the first sample's. The first one arrives when it is requested. A request
    before the next sample has arrived waits for it. A request after several have arrived returns

        late = drop    the newest of them; the others are dropped, with their targets
        late = keep    the oldest of them; the others wait in a queue without bound

    The end of a sequence is never lost: the sample that is given in place of dropped ones carries
    the `end` of any of them, so that what follows is not taken for the same sequence.

    `report`: `dropped`, number of dropped samples; or `waiting_most`, the most that had arrived and
    waited behind the one given. Samples on their way to the blocks (engine.queue) count as given.

    A run that continues from a snapshot continues behind the sample that was given last, if the
    wrapped stream replays; the clock starts again with the next one, as if none had arrived
    meanwhile. With `keep` it gets every sample once; with `drop` the clock decides which. Portable
    where the wrapped stream is.

    Args:
        period: seconds between samples; None to use their time stamps.
        late: drop or keep samples that the network is too slow for.

    Raises:
        SettingsError: a period that is not above 0.
        StreamError: a sample without a time stamp where it needs one, or a source that takes longer
            to make its samples than they take to arrive.
    """

    def __init__(
        self,
        stream: Stream,
        period: float | None,
        late: Late = Late.DROP,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if period is not None and not (period > 0 and math.isfinite(period)):
            raise SettingsError(
                f"period is {period}; samples arrive every so many seconds, above 0"
            )
        check_stream("Paced", stream)
        super().__init__(stream)
        self.drops = self.replays and late is Late.DROP
        self.replays = self.replays and late is Late.KEEP
        self._period = period
        self._late = late
        self._clock = clock
        self._sleep = sleep
        self._counts = self._no_counts()

    def report(self) -> dict[str, int]:
        return {**report_of(self._stream), **self._counts}

    def samples(self) -> Iterator[Sample]:
        """Return the samples from the first one on; the clock starts with it."""
        return self.samples_behind(0, 0)

    def passed(self) -> int:
        """Return the number of dropped samples."""
        return self._counts.get("dropped", 0)

    def samples_behind(self, drawn: int, passed: int) -> Iterator[Sample]:
        """Return the samples after those that came before; the next one arrives at once.

        Args:
            drawn: samples that were given to the network.
            passed: samples that were dropped.
        """
        self._counts = self._no_counts()
        if passed:
            self._counts["dropped"] = passed
        return self._samples(drawn + passed)

    def _samples(self, n: int) -> Iterator[Sample]:
        arrivals = self._arrivals(n)
        arrived: deque[Sample] = deque()
        coming = next(arrivals, None)
        start = self._clock()
        while arrived or coming is not None:
            coming = self._take_in(coming, arrivals, arrived, start)
            if arrived:
                self._count("waiting_most", len(arrived) - 1)
                yield arrived.popleft()
            elif coming is not None:
                self._sleep(max(0.0, start + coming[0] - self._clock()))

    def _arrivals(self, skip: int) -> Iterator[tuple[float, Sample]]:
        """Yield each sample from sample `skip` on with the seconds after the first of them."""
        first = None
        for n, sample in enumerate(samples_from(self._stream, skip)):
            if self._period is not None:
                yield n * self._period, sample
                continue
            if sample.time is None:
                raise StreamError(
                    f"sample {skip + n} has no time stamp to arrive at: give every sample its time "
                    "in seconds, or set stream.pace.period to the seconds between two samples"
                )
            first = sample.time if first is None else first
            yield sample.time - first, sample

    def _take_in(
        self,
        coming: tuple[float, Sample] | None,
        arrivals: Iterator[tuple[float, Sample]],
        arrived: deque[Sample],
        start: float,
    ) -> tuple[float, Sample] | None:
        """Move the samples that have arrived by now to `arrived`; return the first that has not."""
        since = self._clock()
        earliest = None if coming is None else coming[0]
        drawn = 0
        while coming is not None and start + coming[0] <= since:
            self._arrive(coming[1], arrived)
            drawn += 1
            if drawn >= LOOK_AT and earliest is not None:
                self._check_source(drawn, self._clock() - since, coming[0] - earliest)
            coming = next(arrivals, None)
        return coming

    def _check_source(self, drawn: int, making: float, arriving: float) -> None:
        """Raise StreamError where samples arrive faster than the source makes them.

        Each request would then take longer than the one before.
        """
        if making > arriving:
            raise StreamError(
                f"the source took {making:.3g} s to make {drawn} samples that arrive within "
                f"{arriving:.3g} s: it cannot keep up with its own pace; use a longer "
                "stream.pace.period, or a source that is faster"
            )

    def _arrive(self, sample: Sample, arrived: deque[Sample]) -> None:
        if self._late is Late.DROP and arrived:
            passed = arrived.popleft()
            self._counts["dropped"] += 1
            sample = replace(sample, end=True) if passed.end else sample
        arrived.append(sample)

    def _count(self, name: str, value: int) -> None:
        if name in self._counts:
            self._counts[name] = max(self._counts[name], value)

    def _no_counts(self) -> dict[str, int]:
        return {"dropped": 0} if self._late is Late.DROP else {"waiting_most": 0}
