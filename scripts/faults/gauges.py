"""Memory, open files, sockets and threads of a process and all that it started, over a run."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass, field

import psutil

MIB = 1 << 20
MOST_OF = 0.8  # of the looks: a process that was there for fewer came or went meanwhile
SETTLED = 0.3  # of a run: what comes before does not count for the slope
NEAR = 0.05  # of a run before a point of it: the looks whose mean stands for that point


@dataclass
class Gauge:
    """One process. ticks: of the run at each look; memory: MiB of its own (anonymous) memory."""

    name: str
    ticks: list[int] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    sockets: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def settled(self, values: list[float] | list[int], whole: int) -> list[tuple[int, float]]:
        """The looks of the later part of a run of `whole` ticks."""
        pairs = zip(self.ticks, values, strict=True)
        return [(k, float(v)) for k, v in pairs if k >= SETTLED * whole]

    def at(self, values: list[float] | list[int], whole: int, share: float) -> float:
        """Mean of the looks shortly before that share of the run; where there are none, the look
        that is nearest to it."""
        pairs = list(zip(self.ticks, values, strict=True))
        near = [v for k, v in pairs if (share - NEAR) * whole <= k <= share * whole]
        if not near:
            near = [min(pairs, key=lambda pair: abs(pair[0] - share * whole))[1]]
        return sum(near) / len(near)

    def end_at(self, last: int) -> None:
        """Forgets the looks after the first one at the tick `last`: the run was over then."""
        if last in self.ticks:
            many = self.ticks.index(last) + 1
            for looks in (self.ticks, self.memory, self.files, self.sockets, self.threads):
                del looks[many:]

    def slope(self, values: list[float] | list[int], whole: int) -> float:
        """Of the later part by least squares, per 10^5 ticks."""
        pairs = self.settled(values, whole)
        n = len(pairs)
        if n < 2:
            return 0.0
        x, y = sum(k for k, _ in pairs) / n, sum(v for _, v in pairs) / n
        square = sum((k - x) ** 2 for k, _ in pairs)
        return 1e5 * sum((k - x) * (v - y) for k, v in pairs) / square if square else 0.0


class Gauges:
    """A context; looks every `seconds` in a thread. tick: where the run is, by who follows it."""

    def __init__(self, seconds: float) -> None:
        self.tick = 0
        self._seconds = seconds
        self._found: dict[int, Gauge] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Gauges:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def all(self, whole: int) -> list[Gauge]:
        """Of the processes that were there throughout the later part, while the run went on."""
        for gauge in self._found.values():
            gauge.end_at(self.tick)
        looks = [len(g.settled(g.memory, whole)) for g in self._found.values()]
        most = max(looks, default=0)
        return [
            g for g, n in zip(self._found.values(), looks, strict=True) if n >= MOST_OF * most > 0
        ]

    def _follow(self) -> None:
        while not self._over.wait(self._seconds):
            own = psutil.Process()
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.Error, OSError):
                    self._look(process, "driver" if process == own else _name(process))

    def _look(self, process: psutil.Process, name: str) -> None:
        files = [os.readlink(f.path) for f in os.scandir(f"/proc/{process.pid}/fd")]
        gauge = self._found.setdefault(process.pid, Gauge(name))
        gauge.name = name  # (an actor's process has another one before it is one)
        gauge.memory.append(_anonymous(process) / MIB)
        gauge.files.append(len(files))
        gauge.sockets.append(sum(f.startswith("socket:") for f in files))
        gauge.threads.append(process.num_threads())
        gauge.ticks.append(self.tick)


def _anonymous(process: psutil.Process) -> int:
    with open(f"/proc/{process.pid}/status") as lines:
        line = next((line for line in lines if line.startswith("RssAnon")), None)
    if line is None:  # (a killed process, until its parent has heard of it)
        raise psutil.ZombieProcess(process.pid)
    return int(line.split()[1]) * 1024


def _name(process: psutil.Process) -> str:
    """'actor' for hamdist's; what Ray calls its own."""
    command = process.cmdline()
    if command and command[0].startswith("ray::"):
        return "actor" if "WorkerActor" in command[0] else command[0]
    script = next((word for word in command if word.endswith(".py")), None)
    return process.name() if script is None else os.path.basename(script)
