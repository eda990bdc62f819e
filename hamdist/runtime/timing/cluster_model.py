"""Hosts and links as the timing of a run sees them, measured or imagined. Seconds and bytes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

# What an actor spends on one message that it sends to or takes from another actor, and on its
# bytes, without any wait: in packing, the ring or socket, and encryption. On one host they are set
# by `scripts/bench/prediction` (how-to: simulate); between hosts they are rough.
LOCAL_SECONDS, REMOTE_SECONDS = 15e-6, 120e-6
BYTES_PER_SECOND = 4e9
RETRANSMISSION = (
    0.2  # seconds: TCP's least timeout (RFC 6298 as Linux has it), besides a round trip
)
SEGMENT = 1448  # bytes of a signal in one packet


@dataclass(frozen=True, slots=True)
class Link:
    """A direction between two hosts.

    Attributes:
        seconds: mean time of a small signal, one way.
        bytes_per_second: of the link.
        sigma: standard deviation of the time's logarithm; 0: it never varies.
        loss: share of packets that are sent a second time.
        outages_per_hour: in the mean; outage_seconds: of each, in which no signal leaves.
    """

    seconds: float = 0.0
    bytes_per_second: float = math.inf
    sigma: float = 0.0
    loss: float = 0.0
    outages_per_hour: float = 0.0
    outage_seconds: float = 0.0

    def of(self, nbytes: int) -> float:
        """Return the mean seconds of a signal of so many bytes."""
        return self.seconds + nbytes / self.bytes_per_second + self.lost(nbytes) * self.again

    def lost(self, nbytes: int) -> float:
        """Return the probability that some packet of a signal is lost."""
        return 1 - float((1 - self.loss) ** max(1, -(-nbytes // SEGMENT)))

    def within(self, share: float, nbytes: int, every: float) -> float:
        """Return the seconds, without those of the bytes, within which a share of the signals come.

        TCP keeps their order: one that is sent t seconds behind one that was lost waits for it,
        and comes again - t late. So the share 1 - (1 - p)^(1 + (again - x) / every) of the signals
        is late by more than x, where p of them are lost.

        Args:
            share: below 1.
            nbytes: of a signal.
            every: seconds between two.
        """
        level = statistics.NormalDist().inv_cdf(share)
        seconds = self.seconds * math.exp(self.sigma * level - self.sigma**2 / 2)
        if lost := self.lost(nbytes):
            signals = math.log(share) / math.log1p(-lost) if lost < 1 else 0.0
            seconds += min(self.again, max(0.0, self.again - every * (signals - 1)))
        return seconds

    @property
    def again(self) -> float:
        """Return the seconds that a retransmission takes."""
        return RETRANSMISSION + 2 * self.seconds


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

    def slowed(self, factor: float) -> ClusterModel:
        """Return the same cluster with latencies `factor` times as long."""
        links = {
            pair: replace(link, seconds=factor * link.seconds) for pair, link in self.links.items()
        }
        return replace(self, links=links)

    def without_links(self) -> ClusterModel:
        """Return the same hosts, between which signals take no time."""
        hosts = [replace(host, up=math.inf, down=math.inf) for host in self.hosts]
        return replace(self, hosts=hosts, links={})

    def rate(self, sender: int, receiver: int) -> float:
        """Return the bytes a second of a single transfer."""
        link = self.link(sender, receiver).bytes_per_second
        if sender == receiver:
            return link
        return min(link, self.hosts[sender].up, self.hosts[receiver].down)


_NO_LINK = Link()
