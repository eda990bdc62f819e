"""Samples that carry their number through the network, counted at both its ends."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hamdist.streams.sample import Sample, SampleSpec

FEATURES, WIDTH, CLASSES = 4, 8, 3
SEEN, NEXT, WRONG = 0, 1, 2
PAUSE_EVERY, PAUSE_SECONDS = 5000, 0.2  # of the stream; between two pauses it gives all at once
SLOW_EVERY, SLOW_SECONDS = 3001, 0.1  # of a block


class Counted(nn.Module):
    """Takes (batch, 1 + n), the number in front, and gives the same. counts: SEEN, how many
    samples; NEXT, the number that is due; WRONG, how often another one came. slow: sleeps now and
    then."""

    counts: Tensor

    def __init__(self, *, slow: bool) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64))
        self.slow = slow

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "meta":
            counts = self.counts.numpy()
            number = int(x.detach().numpy()[0, 0])
            counts[WRONG] += number != counts[NEXT]
            counts[SEEN] += 1
            counts[NEXT] = number + 1
            if self.slow and number % SLOW_EVERY == SLOW_EVERY - 1:
                time.sleep(SLOW_SECONDS)
        return x


class Beside(nn.Module):
    """`inner` for all but the number, which is passed on, or with `last` left out."""

    def __init__(self, inner: nn.Module, *, last: bool) -> None:
        super().__init__()
        self.inner = inner
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x[:, 1:])
        return y if self.last else torch.cat([x[:, :1].detach(), y], 1)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        first = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh())
        return nn.Sequential(
            nn.Sequential(Counted(slow=False), Beside(first, last=False)),
            nn.Sequential(Counted(slow=True), Beside(nn.Linear(WIDTH, CLASSES), last=True)),
        ).double()  # (whose numbers are exact up to 2^53)


class Bursts:
    """`items` samples of one row: as fast as they are taken, but for a pause now and then."""

    portable = True
    spec = SampleSpec((1, 1 + FEATURES), torch.float64, (1,), torch.int64, CLASSES)

    def __init__(self, items: int) -> None:
        self.items = items

    def samples(self) -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(3)
        rows = torch.randn(1000, FEATURES, generator=generator, dtype=torch.float64)
        for number in range(self.items):
            if number % PAUSE_EVERY == PAUSE_EVERY - 1:
                time.sleep(PAUSE_SECONDS)
            row = rows[number % len(rows)]
            u = torch.cat([torch.tensor([float(number)], dtype=torch.float64), row])
            yield Sample(u[None], row[:CLASSES].argmax()[None])
