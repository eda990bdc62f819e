"""Hosts and links as the timing of a run sees them, measured or imagined. Seconds and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from hamdist.runtime.timing.cycle_ratio import Reals

# What an actor spends on one message that it sends to or takes from another actor, and on its
# bytes, without any wait: in packing, the ring or socket, and encryption. Rough values, which no
# benchmark of this repository has set: `scripts/bench/prediction` shows how far they lead.
LOCAL_SECONDS, REMOTE_SECONDS = 50e-6, 120e-6
BYTES_PER_SECOND = 2e9
SEGMENT = 1448  # bytes of a signal in one packet
COVERED = 0.98  # of the signals come in time, by the delays that hide a link


@dataclass(frozen=True, slots=True)
class Link:
    """A direction between two hosts.

    Attributes:
        seconds: mean time of a small signal, one way.
        bytes_per_second: of the link.
        sigma: standard deviation of the time's logarithm; 0: it never varies.
        loss: share of packets that are sent a second time.
        outages_per_hour: in the mean; outage_seconds: of each, in which no signal leaves.
        lateness: instead of `sigma` and `loss`, what was measured: by how many seconds signals
            that were sent one after another came later (below 0: earlier) than `seconds`.
    """

    seconds: float = 0.0
    bytes_per_second: float = math.inf
    sigma: float = 0.0
    loss: float = 0.0
    outages_per_hour: float = 0.0
    outage_seconds: float = 0.0
    lateness: Sequence[float] = ()

    @property
    def varies(self) -> bool:
        """Return True if signals take different times."""
        return bool(self.sigma * self.seconds or self.loss or self.lateness)

    def lost(self, nbytes: int) -> float:
        """Return the probability that some packet of a signal is lost."""
        return 1 - float((1 - self.loss) ** max(1, -(-nbytes // SEGMENT)))

    @property
    def again(self) -> float:
        """Return the seconds that a retransmission takes: a round trip, after which the sender
        learns of the loss from the packets behind it (RFC 5681, 8985). A last packet waits for a
        timeout, which is left out."""
        return 2 * self.seconds

    def share_within(self, seconds: float, nbytes: int, every: float) -> float:
        """Return the share of signals that have come within `seconds`, with all before them.

        Signals of one connection arrive in order: one that is late, or sent again, holds up those
        behind it. With F the distribution of a single one, sent `every` seconds after the one
        before,

            P(x) = prod over k >= 0 of F(x + k every),
            F(y) = (1 - q) G(y) + q G(y - again),    q = lost(nbytes), G log-normal.
        """
        q = self.lost(nbytes)
        worst = self.again + self.seconds * math.exp(6 * self.sigma)
        number = min(10_000, math.ceil(worst / max(every, 1e-6)) + 1)
        later: Reals = seconds + every * np.arange(number, dtype=np.float64)
        single = (1 - q) * self._first_time(later) + q * self._first_time(later - self.again)
        return float(np.prod(single))

    def _first_time(self, seconds: Reals) -> Reals:
        """Return G: the share of signals that take so long at most, where none is lost."""
        if not self.sigma or not self.seconds:
            return (seconds >= self.seconds * (1 - 1e-12)).astype(float)
        levels = np.log(np.maximum(seconds, 1e-30) / self.seconds) / self.sigma + self.sigma / 2
        share: Reals = torch.special.ndtr(torch.from_numpy(levels)).numpy()
        return share

    def covering(self, nbytes: int, every: float) -> float:
        """Return the seconds within which the share COVERED of the signals have come, in order."""
        if self.lateness:
            return self.seconds + float(np.quantile(self.lateness, COVERED))
        low, high = 0.0, self.again + self.seconds * math.exp(6 * self.sigma)
        while self.varies and high - low > 1e-3 * high:
            middle = (low + high) / 2
            enough = self.share_within(middle, nbytes, every) >= COVERED
            low, high = (low, middle) if enough else (middle, high)
        return high if self.varies else self.seconds


@dataclass(frozen=True, slots=True)
class HostModel:
    """A host.

    Attributes:
        name: in texts and results.
        cores: processors.
        speed: of its steps, relative to the host whose seconds are given.
        memory: bytes; inf: any number.
        up, down: bytes a second that leave and reach it, over all links.
    """

    name: str = "this host"
    cores: float = math.inf
    speed: float = 1.0
    memory: float = math.inf
    up: float = math.inf
    down: float = math.inf


@dataclass(frozen=True, slots=True)
class FailureModel:
    """Failures of hosts.

    Attributes:
        per_hour: of each host, in the mean.
        detection: seconds until one is noticed; startup: until the replacement runs.
    """

    per_hour: float = 0.0
    detection: float = 10.0
    startup: float = 5.0


@dataclass(frozen=True)
class ClusterModel:
    """Hosts, and links by (sender, receiver); no time passes on a link that is not there.

    Attributes:
        pace: samples a second at which the stream gives them; inf: as fast as they are taken.
        changes: seconds from the start of a run, in order, and all links from then on.
    """

    hosts: Sequence[HostModel] = (HostModel(),)
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)
    failures: FailureModel = FailureModel()
    pace: float = math.inf
    changes: Sequence[tuple[float, Mapping[tuple[int, int], Link]]] = ()

    def link(self, sender: int, receiver: int) -> Link:
        """Return the link between two hosts; within one it takes no time."""
        return self.links.get((sender, receiver), _NO_LINK)

    def with_latencies(self, seconds: Callable[[tuple[int, int], Link], float]) -> ClusterModel:
        """Return the same cluster with links of other latencies, which never vary."""
        links = {
            pair: Link(seconds(pair, link), link.bytes_per_second)
            for pair, link in self.links.items()
        }
        return replace(self, links=links)

    def rate(self, sender: int, receiver: int) -> float:
        """Return the bytes a second of a single transfer."""
        link = self.link(sender, receiver).bytes_per_second
        if sender == receiver:
            return link
        return min(link, self.hosts[sender].up, self.hosts[receiver].down)


_NO_LINK = Link()
