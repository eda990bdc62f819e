"""The stream of a live run: what is said to it while it runs, in an order that can be repeated.

What a user says (a sample, the label of an earlier one, another step size) is an entry. Entries
are accepted in one order, in which they enter the journal and the network. While nothing is said,
idle ticks are emitted until what is under way has come to its end; each is an entry, too. So the
journal is the stream, and repeats it.

In one process (`lockstep`) either the caller works or the engine does: a call returns when all that
follows from it is done, random numbers are drawn in one order, and a silence is made up for at the
next call.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from hamdist.errors import StreamError
from hamdist.streams.entries import ROOM, Entry, EntryCourse, EntryLog
from hamdist.streams.sample import Emits, Sample, SampleSpec

LOOK_SECONDS = 0.05  # between two looks of the waiting engine at what else it has to do


class LiveStream:
    """The stream of a live run: `say` and the like for callers, `samples` for the engine.

    Args:
        spec: of the samples; its `patience` is how many unlabelled samples wait for a label.
        nothing: an input to show before the first sample.
        idle: seconds of silence after which idle ticks begin; None: only where somebody waits.
        lockstep: see above.
        log: the journal; what it holds already comes first.

    Attributes:
        accepted: the course of what was said, emitted or not.
        awaited: numbers of samples whose answers somebody waits for.
        serve: called by the engine while it waits for an entry.
        look: returns the states of all blocks at once (in one process).
        wanted: 'cut' or 'snapshot', while somebody waits for it.
        tick: of the next emission; drain: idle ones until nothing is under way; whole: nothing may
            be emitted within a sequence but its tokens. The engine sets these.
        ran_out: who feeds it has no more to give, and was not told to stop.
    """

    portable = False

    def __init__(
        self,
        spec: SampleSpec,
        nothing: Sample,
        *,
        idle: float | None = 0.01,
        lockstep: bool = True,
        log: EntryLog | None = None,
    ) -> None:
        self.spec = spec
        self.replays = log is not None
        self.accepted = EntryCourse(spec, nothing)
        self.awaited: set[int] = set()
        self.serve: Callable[[], object] = lambda: None
        self.read_states: Callable[[], Any] | None = None
        self.send: Callable[[Any], object] = lambda _: None  # takes what blocks have for the driver
        self.started: Callable[..., object] = lambda *_: None  # called before the first tick
        self.tick = self.drain = self.blocks = 0
        self.whole = self.ran_out = False
        self._idle, self._lockstep, self._log, self._nothing = idle, lockstep, log, nothing
        self._changed = threading.Condition()
        self._queue: deque[Entry] = deque()
        self._course = EntryCourse(spec, nothing)
        self._drawn = 0  # entries that the engine has, or had in an earlier process
        for entry in [] if log is None else log.entries():
            self.accepted.emission(entry)
            self._drawn += 1
        self.paused = self._parked = self._closed = self._over = False
        self._error: BaseException | None = None
        self._latest = time.monotonic()  # emission of a sample
        self._under_way, self._until_tick = 0, -1
        self._drains = False
        self._one_request = threading.Lock()
        self.wanted: str | None = None
        self._states: dict[str, Any] | None = None  # of the blocks, of the present cut
        self._cuts = self._before_snapshot = 0  # of cuts; of samples before the latest snapshot
        self._stops_between = False  # sequences: a snapshot waits for the end of the present one
        self._answer: Any = None

    # -- callers -------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Return the number of entries that wait for the network."""
        return len(self._queue)

    @property
    def rests(self) -> bool:
        """Return True if nobody waits for anything: that nothing moves is no stall."""
        return self._parked and not self.awaited and self._states is None

    def say(self, entry: Entry, *, asks: set[int] | None = None, wait: bool = True) -> int:
        """Accept an entry; return the number of its sample.

        Args:
            entry: its number is filled in where a sample is fed.
            asks: gets the number, before anything comes of it; its answer is waited for.
            wait: for room; else BlockingIOError where there is none.
        """
        with self._changed:
            self._check()
            silent = time.monotonic() - self._latest
            if self._lockstep and self._idle is not None and silent >= self._idle:
                self._drains = True
                self._work()
            if len(self._queue) >= ROOM and (not wait or self.paused):
                pause = ", and the run is paused: go_on() first" if self.paused else ""
                raise BlockingIOError(f"{ROOM} entries wait for the network{pause}")
            self.wait(lambda: len(self._queue) < ROOM)
            if entry.event == "feed":
                entry = entry._replace(number=self.accepted.fed)
            self.accepted.emission(entry)  # (refuses a label that nobody waits for)
            self._write(entry)
            self._queue.append(entry)
            if asks is not None:
                asks.add(entry.number)
                self.awaited.add(entry.number)
            self._work()
            return entry.number

    def hold(self, *, paused: bool) -> None:
        """Stop emitting, or go on. What is accepted meanwhile waits."""
        with self._changed:
            self._check()
            self._write(Entry("pause" if paused else "go_on", self.accepted.fed))
            self.paused = paused
            self._work()

    def _write(self, entry: Entry) -> None:
        if self._log is not None:
            self._log.append(entry)

    def _work(self) -> None:
        """Let the engine go on; in lockstep wait until it has no more to do."""
        self.wait(lambda: self._parked or not self._lockstep, begin=True)

    def wait(self, done: Callable[[], bool], *, begin: bool = False) -> bool:
        """Return True once `done()` holds, False if the run is over before.

        begin: there is something new for the engine. Raises the error that has ended the run.
        """
        with self._changed:
            self._parked = self._parked and not begin
            self._changed.notify_all()
            while not done():
                if self._error is not None:
                    raise self._error
                if self._over:
                    return False
                self._changed.wait(1.0)
            return True

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed or self._over:
            raise StreamError("the run has been stopped: start another one")

    def settle(self) -> None:
        """Emit idle ticks until nothing is under way."""
        with self._changed:
            self._check()
            self._drains = True
            self._work()
            self.wait(lambda: not self._drains)

    def request(self, kind: str) -> Any:
        """Return a cut (the states of all blocks at one emission), or take a snapshot.

        Raises the error with which that failed.
        """
        with self._one_request, self._changed:
            self._check()
            if self.whole and self.accepted.open and not (self.read_states and kind == "cut"):
                raise StreamError(f"{kind}: a sequence is under way: feed its end first")
            self._answer, self.wanted = None, kind
            try:
                if not self.wait(lambda: self._answer is not None, begin=True):
                    raise StreamError(f"{kind}: the run has ended before")
            finally:
                self.wanted = self._states = None
            if isinstance(self._answer, Exception):
                raise self._answer
            return self._answer

    def give(self, kind: str, result: Any) -> None:
        """Answer the present request, if it is of this kind, with an error where it failed."""
        with self._changed:
            if self.wanted == kind:
                self._answer, self.wanted, self._states = result, None, None
                self._changed.notify_all()

    def begin_again(self) -> None:
        """Ask all blocks for their states once more: one may have been lost with its own."""
        with self._changed:
            self._states = None

    def free(self, *, wanted: bool) -> bool:
        """Return True if a snapshot can be taken now: not within a sequence.

        There only tokens may be emitted, and blocks that stop at a tick would wait for tokens to
        come. So the next sequence waits until `idle_until` is called. wanted: a user waits for the
        snapshot; else there is one only if samples came since the latest.
        """
        with self._changed:
            self._stops_between = self.whole and (
                wanted or self._course.fed > self._before_snapshot
            )
            return not self.whole or (self._stops_between and not self._course.open)

    def idle_until(self, tick: int) -> None:
        """Emit idle ticks until the emission of `tick`, at which a snapshot is taken."""
        with self._changed:
            self._stops_between, self._before_snapshot = False, self._course.fed
            self._until_tick = max(self._until_tick, tick)
            self._changed.notify_all()

    def handed(self, snapshot: int, block: str, state: Any) -> None:
        """Note the state that a block has handed over for the present snapshot."""
        with self._changed:
            if self._states is not None and snapshot == self._cuts:
                self._states[block] = state
                if len(self._states) == self.blocks:
                    self.give("cut", self._states)

    def answered(self, number: int) -> None:
        """Note that an answer is there."""
        with self._changed:
            self.awaited.discard(number)
            self._changed.notify_all()

    def close(self) -> None:
        """End the stream behind what was accepted."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def finished(self, error: BaseException | None) -> None:
        """Note that the engine has ended."""
        with self._changed:
            self._over = self._parked = True
            self._error = error
            self._changed.notify_all()

    # -- engine --------------------------------------------------------------------------------

    def samples(self) -> Iterator[Sample]:
        """Yield the emissions from the first one on."""
        return self.samples_from(0)

    def samples_from(self, n: int) -> Iterator[Sample]:
        """Yield the emissions from number n on: those of the journal, then live ones."""
        if self._log is not None:
            self._course = EntryCourse(self.spec, self._nothing)
            entries, emitted = self._log.entries(), 0
            for _ in range(self._drawn):
                sample = self._course.emission(next(entries))
                emitted += sample is not None
                if sample is not None and emitted > n:
                    self._note(sample)
                    yield sample
        while (live := self._next()) is not None:
            yield live

    def _next(self) -> Sample | None:
        while True:
            with self._changed:
                while (entry := self._due()) is not None:
                    self._drawn += 1
                    reaches = entry.sample is not None or entry.event == "idle"
                    snapshot = reaches and self._cut_is_due()
                    self._cuts += snapshot
                    sample = self._course.emission(entry, snapshot=self._cuts if snapshot else 0)
                    self._states = {} if snapshot else self._states
                    if sample is not None:
                        self._note(sample)
                        self._changed.notify_all()
                        return sample
                if self._closed and not self._queue:
                    return None
                if self.read_states is not None and self.wanted == "cut":
                    self.give("cut", self.read_states())
                if not self._stops_between or self._course.open:
                    self._drains, self._parked = False, True
                self._changed.notify_all()
                self._changed.wait(LOOK_SECONDS)
            self.serve()

    def _note(self, sample: Sample) -> None:
        emission = sample.emission
        if emission is not None and (emission.kind is not Emits.IDLE or emission.snapshot):
            self._under_way, self._latest = self.drain, time.monotonic()
        else:
            self._under_way = max(0, self._under_way - 1)

    def _due(self) -> Entry | None:
        """Return the next entry; None where there is nothing to emit now."""
        between = self.whole and not self._course.open and not self._closed
        waits = between and (self._stops_between or self.tick < self._until_tick)
        if self._queue and not waits and (not self.paused or self._closed):
            return self._queue.popleft()
        if self._closed or (self.whole and self._course.open) or not self._idles():
            return None
        idle = Entry("idle", self._drawn)  # (before what waits in the queue)
        self._write(idle)
        return idle

    def _cut_is_due(self) -> bool:
        return self.read_states is None and self.wanted == "cut" and self._states is None

    def _idles(self) -> bool:
        """Return True if an idle tick is due, in a pause only for those who look at the run."""
        if self.tick < self._until_tick or self._cut_is_due():
            return True
        if self._lockstep and self._stops_between:
            return True  # (the step behind it takes the snapshot)
        if not self._under_way or self._states is not None:
            return self._under_way > 0
        if self.paused or self._drains or self.awaited:
            return not self.paused
        silent = time.monotonic() - self._latest
        return not self._lockstep and self._idle is not None and silent >= self._idle


def live_of(stream: object) -> LiveStream | None:
    """Return the live stream that a stream is made of, if it is one."""
    while stream is not None and not isinstance(stream, LiveStream):
        stream = getattr(stream, "_stream", None)
    return stream
