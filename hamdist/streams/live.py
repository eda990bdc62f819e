"""The stream of a live run: what is said to it while it runs, in an order that can be repeated.

A call of a user becomes an entry: a sample, the label of an earlier one, another step size. Entries
are accepted in one order, in which they enter the journal (if there is one) and the network. Where
nothing waits, the stream emits idle ticks, until what is under way has come to its end; each of
them is an entry of the journal, too. So the journal is the stream, and repeats it.

In one process (`lockstep`) either the caller works or the engine does: a call returns when all that
it has brought about is done. Random numbers are then drawn in one order, and a silence is made up
for at the next call.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hamdist.errors import StreamError
from hamdist.streams.entries import Entry, EntryCourse, EntryLog
from hamdist.streams.sample import Emits, Sample, SampleSpec

ROOM = 64  # entries that wait for the network
LOOK_SECONDS = 0.05  # between two looks at what else the waiting thread has to do


def _nothing() -> None:
    pass


def _dropped(*_: object) -> None:
    pass


class LiveStream:
    """The stream of a live run: `say` and the like for the callers, `samples` for the engine.

    for the engine's; all else is in between.

    Args:
        spec: of the samples; its `live` is how many unlabelled samples wait for a label.
        nothing: an input to show before the first sample.
        idle: seconds of silence after which idle ticks begin; None: only where somebody waits.
        lockstep: see above.
        log: the journal; what it holds already comes first.
        room: entries that wait, at most; `feed` waits for room.

    Attributes:
        serve: called by the engine's thread while it waits for an entry.
        look: makes a cut at once (in one process); else the next emission asks for it.
        tick: of the next emission; drain: idle ones until nothing is under way (both are set by the
            engine). Sequences, which nothing of the next one may enter, have `whole` set.
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
        room: int = ROOM,
    ) -> None:
        self.spec = spec
        self.replays = log is not None
        self.serve: Callable[[], None] = _nothing
        self.look: Callable[[], Mapping[str, Any]] | None = None
        self.tick = self.drain = 0
        self.whole = False
        self._idle, self._lockstep, self._log, self._room = idle, lockstep, log, room
        self._nothing = nothing
        self._changed = threading.Condition()
        self._queue: deque[Entry] = deque()
        self._course = EntryCourse(spec, nothing)
        self._accepted = EntryCourse(spec, nothing)  # what callers have said, emitted or not
        self._known = 0
        for entry in () if log is None else log.entries():
            self._accepted.emission(entry)
            self._known += 1
        self._drawn = 0  # entries that the engine has
        self._parked = self._closed = self._over = self._paused = False
        self._error: BaseException | None = None
        self._latest = time.monotonic()  # emission of a sample
        self._under_way = 0  # idle emissions that are due
        self._open = False  # a sequence has begun
        self._drains = False
        self._until_tick = 0
        self.awaited: set[int] = set()  # numbers of samples whose answers somebody waits for
        self._cuts: dict[int, dict[str, Any]] = {}
        self._cut = self._cuts_sent = 0
        self.blocks: tuple[str, ...] = ()
        self.send: Callable[[Any], None] = _dropped  # takes what blocks have for the driver
        self.started: Callable[..., None] = _dropped  # called before the first tick
        self._wants_snapshot = False
        self._saved: str | Exception | None = None

    # -- callers -------------------------------------------------------------------------------

    @property
    def fed(self) -> int:
        """Return the number of samples that were accepted."""
        return self._accepted.fed

    @property
    def waiting(self) -> int:
        """Return the number of entries that wait for the network."""
        return len(self._queue)

    def unlabelled(self, number: int) -> Sample:
        """Return a sample that waits for its label. Raises StreamError if it does not."""
        with self._changed:
            return self._accepted.unlabelled.find(number)

    @property
    def rests(self) -> bool:
        """Return True if nobody waits for anything: that nothing moves is no stall."""
        return self._parked and not self.awaited and not self._cuts

    def say(
        self,
        entry: Entry,
        *,
        awaits: bool = False,
        wait: bool = True,
        noted: Callable[[int], object] = _dropped,
    ) -> int:
        """Accept an entry, in the order of the calls; return the number of its sample.

        Args:
            entry: its number is filled in where a sample is fed.
            awaits: the caller waits for the answer to it.
            wait: for room; else BlockingIOError where there is none.
            noted: called with the number, before anything comes back of it.
        """
        with self._changed:
            self._check()
            silent = time.monotonic() - self._latest
            if self._lockstep and self._idle is not None and silent >= self._idle:
                self._drains = True
                self._work()
            if len(self._queue) >= self._room and not wait:
                raise BlockingIOError(f"{self._room} entries wait")
            self._wait(lambda: len(self._queue) < self._room)
            if entry.event == "feed":
                entry = entry._replace(number=self._accepted.fed)
            self._accepted.emission(entry)  # (refuses a label that nobody waits for)
            self._write(entry)
            self._queue.append(entry)
            noted(entry.number)
            if awaits:
                self.awaited.add(entry.number)
            self._work()
            return entry.number

    def hold(self, *, paused: bool) -> None:
        """Stop emitting, or go on. What is accepted meanwhile waits."""
        with self._changed:
            self._check()
            self._write(Entry("pause" if paused else "go_on", self.fed))
            self._paused = paused
            self._work()

    def _write(self, entry: Entry) -> None:
        if self._log is not None:
            self._log.append(entry)

    def _work(self) -> None:
        """Let the engine go on; in lockstep wait until it has no more to do."""
        self._parked = False
        self._changed.notify_all()
        if self._lockstep:
            self._wait(lambda: self._parked)

    def _wait(self, done: Callable[[], bool], *, parks: bool = True) -> None:
        while not done():
            self._check()
            if parks and self._lockstep and self._parked:
                why = "the run is paused: go_on() first" if self._paused else "nothing moves"
                raise StreamError(f"this call would wait for ever: {why}")
            self._changed.wait(1.0)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise StreamError("the run has been stopped: start another one")

    def wait(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Return True once `done()` holds; False after `timeout` seconds, or if the run is over.

        Raises the error that has ended the run.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._parked = False
            self._changed.notify_all()
            while not done():
                if self._error is not None:
                    raise self._error
                left = 1.0 if end is None else min(1.0, end - time.monotonic())
                if self._over or left <= 0:
                    return False
                self._changed.wait(left)
            return True

    def drained(self) -> None:
        """Emit idle ticks until nothing is under way."""
        with self._changed:
            self._check()
            self._drains = True
            self._work()
            self._wait(lambda: not self._drains)

    def idle_until(self, tick: int) -> None:
        """Emit idle ticks until the emission of `tick` (of a snapshot); from any thread."""
        with self._changed:
            self._until_tick = max(self._until_tick, tick)
            self._parked = False
            self._changed.notify_all()

    def cut(self) -> dict[str, Any]:
        """Return the states of all blocks at one emission, without a halt."""
        with self._changed:
            self._check()
            if self.whole and self._accepted.open and self.look is None:
                raise StreamError("weights, evaluate: a sequence is under way: feed its end first")
            self._cut += 1
            number = self._cut
            self._cuts[number] = {}
            self._work()
            self._wait(lambda: len(self._cuts[number]) >= len(self.blocks))
            return self._cuts.pop(number)

    def snapshot(self) -> str:
        """Return the snapshot that is taken at this call. Raises SnapshotError if it fails."""
        with self._changed:
            self._check()
            if self.whole and self._accepted.open:
                raise StreamError("snapshot: a sequence is under way: feed its end first")
            self._wants_snapshot, self._saved = True, None
            self._changed.notify_all()
            self._wait(lambda: self._saved is not None, parks=False)
            if isinstance(self._saved, Exception):
                raise self._saved
            return str(self._saved)

    def wants_snapshot(self) -> bool:
        """Return True, once, if a snapshot is asked for."""
        wanted, self._wants_snapshot = self._wants_snapshot, False
        return wanted

    def saved(self, snapshot: str | Exception) -> None:
        """Note a complete snapshot, or that one has failed."""
        with self._changed:
            self._saved = snapshot
            self._changed.notify_all()

    def close(self, error: BaseException | None = None) -> None:
        """End the stream behind what was accepted, or at once with an error."""
        with self._changed:
            self._closed = True
            self._error = self._error or error
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
        if self._log is not None or n == 0:
            self._course = EntryCourse(self.spec, self._nothing)
            emitted = 0
            entries = iter(()) if self._log is None else self._log.entries()
            for _ in range(self._known if self._drawn == 0 else self._drawn):
                sample = self._course.emission(next(entries))
                if sample is not None:
                    emitted += 1
                    if emitted > n:
                        yield sample
                        self._note(sample)
            self._drawn = max(self._drawn, self._known)
        while (live := self._next()) is not None:
            yield live

    def _next(self) -> Sample | None:
        while True:
            with self._changed:
                while (entry := self._due()) is not None:
                    self._drawn += 1
                    cut = self._cut if self._cut > self._cuts_sent and self.look is None else 0
                    sample = self._course.emission(entry, cut)
                    if sample is not None:
                        self._cuts_sent = max(self._cuts_sent, cut)
                        self._note(sample)
                        self._changed.notify_all()
                        return sample
                if self._closed and not self._queue:
                    return None
                if self._cut > self._cuts_sent and self.look is not None:
                    self._cuts_sent = self._cut
                    self._cuts[self._cut] = dict(self.look())
                self._drains = False
                self._parked = True
                self._changed.notify_all()
                self._changed.wait(LOOK_SECONDS)
            self.serve()

    def _note(self, sample: Sample) -> None:
        told = sample.emission
        if told is None or told.kind is Emits.IDLE:
            self._under_way = (
                max(0, self._under_way - 1) if not told or not told.cut else self.drain
            )
            return
        self._under_way, self._open = self.drain, not sample.end
        self._latest = time.monotonic()

    def _due(self) -> Entry | None:
        """Return the next entry; None where there is nothing to emit now."""
        if self._paused and not self._closed:
            return None
        if self._queue:
            return self._queue.popleft()
        if (self.whole and self._open) or not self._idles():
            return None
        entry = Entry("idle")
        self._accepted.emission(entry)
        self._write(entry)
        return entry

    def _idles(self) -> bool:
        """Return True if an idle tick is due."""
        if self._closed:
            return False
        if self.tick < self._until_tick or (self.look is None and self._cut > self._cuts_sent):
            return True
        if not self._under_way:
            return False
        if self._drains or self.awaited or (self.look is None and self._cuts):
            return True
        silent = time.monotonic() - self._latest
        return not self._lockstep and self._idle is not None and silent >= self._idle

    def answered(self, number: int) -> None:
        """Note that an answer is there."""
        with self._changed:
            self.awaited.discard(number)
            self._changed.notify_all()

    def handed(self, cut: int, block: str, state: Any) -> None:
        """Note the state that a block has handed over for a cut."""
        with self._changed:
            if cut in self._cuts:
                self._cuts[cut][block] = state
                self._changed.notify_all()


def live_of(stream: object) -> LiveStream | None:
    """Return the live stream that a stream is made of, if it is one."""
    while not isinstance(stream, LiveStream):
        inner = getattr(stream, "_stream", None)
        if inner is None:
            return None
        stream = inner
    return stream
