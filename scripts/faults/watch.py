"""Starts a run, brings about what its processes cannot do to themselves, and repairs that."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from faults.events import DRIVER, HOST, LINK, RAYLET, Event
from faults.net import BEATS, mark

LOOK_SECONDS = 0.02
GONE_SECONDS = 15.0
STILL_SECONDS = 1.0  # between two results: longer than without any harm
DRIVE = Path(__file__).with_name("drive.py")


class Driver(Protocol):
    """The process of `drive.py`."""

    def start(self) -> None: ...

    def kill(self) -> None:
        """SIGKILL, and waits for its end."""

    def close(self) -> None:
        """Ends it, and waits for the end of all that it and those before it have started."""

    def code(self) -> int | None:
        """Its exit status, if it has ended."""

    @property
    def text(self) -> str:
        """What it has printed."""


class Local:
    """On this host, with a Ray of its own. What it leaves when it is killed lies in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._orphans: list[psutil.Process] = []

    def start(self) -> None:
        (self._folder / "t").mkdir(exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(DRIVE), str(self._folder)],
                env={**os.environ, **environment(), "TMPDIR": str(self._folder / "t")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        if self._process is None:
            return
        children = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._orphans += children

    def close(self) -> None:
        if self.code() is None:
            self.kill()
        _, left = psutil.wait_procs(self._orphans, timeout=GONE_SECONDS)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=GONE_SECONDS)

    def code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def text(self) -> str:
        return self._log.read_text(errors="replace")


class OnHosts:
    """On host 0 of tests/hosts/namespaces.py."""

    def __init__(self, world: Any, folder: Path) -> None:
        self._world = world
        self._folder = folder
        self._job: Any = None
        self._before = ""

    def start(self) -> None:
        command = [sys.executable, str(DRIVE), str(self._folder)]
        self._job = self._world.start(0, command, **environment())

    def kill(self) -> None:
        if self._job is not None:
            self._before += self._job.text
            self._job.kill()

    def close(self) -> None:
        if self.code() is None:
            self.kill()

    def code(self) -> int | None:
        return None if self._job is None else self._job.process.poll()

    @property
    def text(self) -> str:
        return self._before + ("" if self._job is None else self._job.text)


def environment() -> dict[str, str]:
    """What a driver needs to find its modules."""
    own = [str(Path(__file__).parents[1]), *(path for path in sys.path if path)]
    return {"PYTHONPATH": os.pathsep.join(own), "OMP_NUM_THREADS": "1"}


@dataclass
class Log:
    """When the events happened (by number, seconds of time.time()), when another driver was started
    after those that have lost one, and the exit status of the last."""

    times: dict[int, float] = field(default_factory=dict)
    restarts: dict[int, float] = field(default_factory=dict)
    code: int | None = None


def watch(
    driver: Driver,
    events: Sequence[Event],
    folder: Path,
    seconds: float,
    world: Any = None,
    told: Callable[[str], None] = lambda _: None,
) -> Log:
    """Runs `driver` to its end; ends it after `seconds`. world: the hosts that events name."""
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    log = Log()
    end = time.monotonic() + seconds
    mended: dict[int, float] = {}  # by host: when its cable is mended
    driver.start()
    try:
        while (code := driver.code()) is None and time.monotonic() < end:
            for host in [h for h, when in mended.items() if time.monotonic() >= when]:
                world.mend(host)
                del mended[host]
            for event in events:
                if event.number in log.times or not mark(event, marks).exists():
                    continue
                log.times[event.number] = mark(event, marks).stat().st_mtime
                told(f"{event.what} at pass {event.passes} of block {event.block}")
                if event.what == DRIVER:
                    driver.kill()
                    log.restarts[event.number] = time.time()
                    driver.start()
                elif event.what == LINK:
                    world.cut(event.host)
                    mended[event.host] = time.monotonic() + event.seconds
                elif event.what in (RAYLET, HOST):
                    _lose(world, event)
                    mended.pop(event.host, None)
            time.sleep(LOOK_SECONDS)
        log.code = code
    finally:
        for host in mended:
            world.mend(host)
        driver.close()
    for host in {e.host for e in events if e.what in (RAYLET, HOST) and e.number in log.times}:
        world.await_ray(host)
    for event in events:  # (the last ones may have happened since the last look)
        if mark(event, marks).exists():
            log.times.setdefault(event.number, mark(event, marks).stat().st_mtime)
    return log


def _lose(world: Any, event: Event) -> None:
    """A host without its raylet, or without anything; and then it is there again."""
    if event.what == RAYLET:
        world.mend(event.host)  # (a cut cable would keep it from coming back)
        world.kill_ray(event.host)
    else:
        world.kill(event.host)
        world.boot(event.host)
    world.start_ray(event.host, wait=False)


def lost_seconds(
    times: Mapping[int, float], restarts: Mapping[int, float], folder: Path
) -> dict[int, float]:
    """By event: the longest time without a new result of the last block that it has brought about.

    times: when it happened; restarts: when another driver was started, for the loss of one. What
    the lost one had started goes on for a while; the first silence of more than STILL_SECONDS that
    ends after the start is the lost driver's, from its loss on, and whatever happened from that
    loss to the end of the silence has cost nothing more (0). A silence into which the next event
    falls is that event's, unless it had lasted for STILL_SECONDS: then the earlier one was still
    being mended. Infinite where no result followed.
    """
    data = (folder / "marks" / BEATS).read_bytes()
    beats = [b for (b,) in struct.iter_unpack("d", data[: len(data) // 8 * 8])]
    silences = list(itertools.pairwise(beats))
    ordered = sorted(times.items(), key=lambda item: item[1])
    gaps = {
        number: next(
            ((a, b) for a, b in silences if b > start and b - a > STILL_SECONDS),
            (times[number], float("inf")),
        )
        for number, start in restarts.items()
    }
    down = [(times[number], end) for number, (_, end) in gaps.items()]
    found = {}
    for i, (number, at) in enumerate(ordered):
        if number in restarts:
            begin, end = gaps[number]
            found[number] = end - max(begin, at)
        elif any(lost <= at < end for lost, end in down):
            found[number] = 0.0
        else:
            after, until = ordered[i + 1] if i + 1 < len(ordered) else (None, float("inf"))
            ends = after in restarts
            shares = (_share(a, b, at, until, ends=ends) for a, b in silences if b > at)
            found[number] = max(shares, default=float("inf"))
    return found


def _share(begin: float, end: float, at: float, until: float, *, ends: bool) -> float:
    """Of a silence, what belongs to an event at `at`, which another one follows at `until`. ends:
    that is the loss of the driver, after which nothing is mended any more."""
    if begin >= until:
        return 0.0
    still = until - max(begin, at) >= STILL_SECONDS
    if end > until and (ends or not still):
        end = until
    return end - max(begin, at)
