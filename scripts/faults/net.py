"""A small network in whose blocks processes die, and its stream.

Every block counts its forward passes in a buffer, which is a part of the state that snapshots keep
and that is compared in the end: a pass that is lost or done twice shows there. What happens at a
pass happens once: a file in the folder of marks says that it has.
"""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from faults.events import BLOCKS, HANG, KILL, Event
from hamdist.streams.sample import Sample, SampleSpec

FEATURES, WIDTH, CLASSES, BATCH = 6, 16, 3, 4
DRIVER = "HAMDIST_FAULTS_DRIVER"  # the process in whose copies of the network nothing happens
BEATS = "beats"
_SIGNALS = {KILL: signal.SIGKILL, HANG: signal.SIGSTOP}


class Faulty(nn.Module):
    """Passes on what it gets. events: of this block. folder: of the marks; None: nothing happens.
    beats: the time of every pass is written there, once."""

    passes: Tensor

    def __init__(self, events: Sequence[Event], folder: str | None, *, beats: bool) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.events = {event.passes: event for event in events}
        self.folder = folder
        self.beats = beats
        self._file: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "meta":
            return x
        with torch.no_grad():
            self.passes += 1
        here = (str(os.getpid()), str(os.getppid()))  # the driver has the network measured first
        if self.folder is not None and os.environ.get(DRIVER) not in here:
            passes = int(self.passes)
            if self.beats:
                self._beat(passes)
            event = self.events.get(passes)
            if event is not None:
                happens(event, Path(self.folder))
        return x

    def _beat(self, passes: int) -> None:
        if self._file is None:
            self._file = os.open(f"{self.folder}/{BEATS}", os.O_CREAT | os.O_RDWR)
        at = 8 * (passes - 1)
        if os.fstat(self._file).st_size <= at:
            os.pwrite(self._file, struct.pack("d", time.time()), at)


def mark(event: Event, folder: Path) -> Path:
    return folder / f"{event.number}-{event.what}"


def happens(event: Event, folder: Path) -> None:
    """Once. What a process cannot do to itself is done by whoever waits for the mark."""
    try:
        os.close(os.open(mark(event, folder), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if event.what in _SIGNALS:
        threading.Timer(event.seconds, os.kill, (os.getpid(), _SIGNALS[event.what])).start()


def network(events: Sequence[Event], folder: str | None) -> nn.Sequential:
    """BLOCKS layers; what happens to a block happens behind its linear map."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        layers = []
        for i in range(BLOCKS):
            last = i == BLOCKS - 1
            layer = nn.Linear(WIDTH if i else FEATURES, CLASSES if last else WIDTH)
            own = [event for event in events if event.block == i]
            act = nn.Identity() if last else nn.Tanh()
            layers.append(nn.Sequential(layer, Faulty(own, folder, beats=last), act))
        return nn.Sequential(*layers)


class Numbered:
    """`items` batches, each made from its number alone, so that any of them can be the first."""

    portable = True
    spec = SampleSpec((BATCH, FEATURES), torch.float32, (BATCH,), torch.int64, CLASSES)

    def __init__(self, items: int) -> None:
        self.items = items

    def samples(self) -> Iterator[Sample]:
        return self.samples_from(0)

    def samples_from(self, n: int) -> Iterator[Sample]:
        for number in range(n, self.items):
            generator = torch.Generator().manual_seed(number)
            u = torch.randn(BATCH, FEATURES, generator=generator)
            yield Sample(u, u[:, :CLASSES].argmax(1))
