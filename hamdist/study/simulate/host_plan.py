"""The file of `hamdist simulate --hosts`: hosts, links, failures, and the pace of the stream.

hosts:
  - {name: a, cores: 4, memory: 4GiB, up: 50Mbit/s, down: 100Mbit/s}
  - {name: b, machine: raspberry-pi-4}            # estimated (MACHINES)
  - {name: c, cores: 2, product: 0.0021}          # measured there, by `hamdist profile`
  - {name: d, speed: 0.3}                         # relative to this host
links: {latency: 0.02, jitter: 0.2, loss: 0.001, bandwidth: 100Mbit/s, "a->b": {latency: 0.1},
        outages: {per_hour: 2, seconds: 20}, changes: [{at: 30s, bandwidth: 5Mbit/s}]}
failures: {per_hour: 0.1, detection: 10, startup: 20}
pace: 50                                          # samples a second
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from hamdist.config import Above0, Rate, Section, checked, mapping, read_mapping
from hamdist.errors import SettingsError
from hamdist.runtime.process.threads import product_seconds
from hamdist.runtime.timing.cluster_model import ClusterModel, FailureModel, HostModel, Link

# Cores, memory and seconds of `product_seconds`: estimates, not measured.
MACHINES: dict[str, dict[str, Any]] = {
    "raspberry-pi-4": {"cores": 4, "memory": "4GiB", "product": 4.2e-3},
    "raspberry-pi-5": {"cores": 4, "memory": "8GiB", "product": 1.6e-3},
    "laptop": {"cores": 8, "memory": "16GiB", "product": 0.4e-3},
    "laptop-old": {"cores": 4, "memory": "8GiB", "product": 0.9e-3},
    "cloud-2": {"cores": 2, "memory": "8GiB", "product": 0.6e-3},
    "cloud-8": {"cores": 8, "memory": "32GiB", "product": 0.5e-3},
}
_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}


def _quantity(ending: str, example: str) -> BeforeValidator:
    """Return a validator of a number of bytes (a second) with its unit."""

    def read(value: object) -> object:
        number = r"([0-9.]+(?:e[0-9]+)?) ?([kMG]i?|)(bit|B)"
        match = re.fullmatch(number + re.escape(ending), str(value))
        try:
            amount = float(match[1]) * _UNITS[match[2]] if match else math.nan
        except ValueError:
            amount = math.nan
        if match is None or not amount > 0 or (match[3] == "bit" and not ending):
            raise ValueError(f"write it with its unit, as {example}")
        return amount / 8 if match[3] == "bit" else amount

    return BeforeValidator(read)


def _seconds(value: object) -> object:
    return value.removesuffix("s") if isinstance(value, str) else value


Bytes = Annotated[float, _quantity("", "2GiB or 512MB")]
ByteRate = Annotated[float, _quantity("/s", "100Mbit/s or 12.5MB/s")]


class LatencySettings(Section):
    """A latency that varies, log-normal. Seconds, one way."""

    median: Above0
    """Half of the signals are faster."""
    p95: Above0
    """95 % of the signals are faster."""

    @model_validator(mode="after")
    def _in_order(self) -> LatencySettings:
        if self.p95 < self.median:
            raise ValueError(f"'p95' is {self.p95:g}, less than 'median' {self.median:g}")
        return self


class OutageSettings(Section):
    """Times in which a direction carries nothing."""

    per_hour: Rate = 0.0
    """In the mean."""
    seconds: Above0 = 10.0
    """Of each."""


class LinkSettings(Section):
    """A direction between two hosts."""

    latency: Rate | LatencySettings = 0.0
    """Seconds, one way; or their distribution."""
    jitter: Rate = 0.0
    """Standard deviation of the latency, as a share of it."""
    bandwidth: ByteRate = math.inf
    """100Mbit/s, or 12.5MB/s."""
    loss: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of packets lost, and sent again."""
    outages: OutageSettings = OutageSettings()
    """Signals wait for their ends."""
    at: Annotated[float, BeforeValidator(_seconds), Field(ge=0)] = 0.0
    """Of a change: seconds from the start of the run, 30 or 30s."""

    @model_validator(mode="after")
    def _once(self) -> LinkSettings:
        if self.jitter and isinstance(self.latency, LatencySettings):
            raise ValueError("give 'jitter', or a latency with 'median' and 'p95', not both")
        return self

    def link(self) -> Link:
        """Return the link: log-normal, with sigma^2 = ln(1 + jitter^2)."""
        if isinstance(self.latency, LatencySettings):
            sigma = math.log(self.latency.p95 / self.latency.median) / 1.6449
            seconds = self.latency.median * math.exp(sigma**2 / 2)
        else:
            seconds, sigma = self.latency, math.sqrt(math.log1p(self.jitter**2))
        outages = (self.outages.per_hour, self.outages.seconds)
        return Link(seconds, self.bandwidth, sigma, self.loss, *outages)


class HostSettings(Section):
    """A host."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """In links and results; of a cluster, what `engine.blocks.NAME.host` may be."""
    machine: str | None = None
    """A usual machine, whose figures are estimated; what else is given goes before."""
    cores: Above0 = 1
    """Processors."""
    memory: Bytes = math.inf
    """2GiB, or 512MB."""
    speed: Above0 | None = None
    """Of one core, relative to the host that simulates."""
    product: Above0 | None = None
    """Seconds of a fixed product, as `hamdist profile` measures them."""
    up: ByteRate = math.inf
    """Bandwidth of all that leaves it."""
    down: ByteRate = math.inf
    """Bandwidth of all that reaches it."""

    @model_validator(mode="before")
    @classmethod
    def _of_machine(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("machine") is None:
            return raw
        if raw["machine"] not in MACHINES:
            raise ValueError(f"'machine' {raw['machine']!r} is none of {', '.join(MACHINES)}")
        usual = dict(MACHINES[raw["machine"]])
        if "speed" in raw:
            del usual["product"]
        return usual | raw

    @model_validator(mode="after")
    def _one_speed(self) -> HostSettings:
        if self.speed is not None and self.product is not None:
            raise ValueError("give 'speed' or 'product', not both")
        return self


class FailureSettings(Section):
    """Failures of hosts."""

    per_hour: Rate = 0.0
    """Of each host, in the mean."""
    detection: Rate = 10.0
    """Seconds until one is noticed."""
    startup: Rate = 5.0
    """Seconds until the replacement runs."""


class HostPlanSettings(Section):
    """The file of `hamdist simulate --hosts`."""

    hosts: Annotated[tuple[HostSettings, ...], Field(min_length=1)]
    """All hosts."""
    links: dict[str, Any] = Field(default_factory=dict)
    """Fields of all links (`latency` ... `outages`), and of single ones by `a->b`. `changes`: a
    list of fields that are others from a time `at` on."""
    failures: FailureSettings = FailureSettings()
    """Of hosts."""
    pace: Above0 | None = None
    """Samples a second that the stream gives; not given: as many as are taken."""

    @model_validator(mode="after")
    def _names_once(self) -> HostPlanSettings:
        names = [host.name for host in self.hosts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two hosts are named {twice!r}")
        for key in (key for key in self.links if "->" in key):
            if not {*key.split("->")} <= {*names}:
                raise ValueError(f"links: {key!r} is no pair of the hosts {', '.join(names)}")
        return self


def read_host_plan(path: Path) -> tuple[ClusterModel, list[str]]:
    """Read a plan of hosts, and return the cluster and warnings.

    Raises SettingsError naming the file, and the line or the field.
    """
    origin = f"--hosts {str(path)!r}"
    plan = checked(HostPlanSettings, read_mapping(path, origin), origin)
    named = list(enumerate(plan.hosts))
    pairs = {(i, j): f"{a.name}->{b.name}" for i, a in named for j, b in named if i != j}
    courses = {pair: _course(plan.links, key, origin) for pair, key in pairs.items()}
    times = sorted({at for course in courses.values() for at in course})
    links = [
        (at, {pair: course[max(t for t in course if t <= at)] for pair, course in courses.items()})
        for at in times or [0.0]
    ]
    here = product_seconds() if any(host.product for host in plan.hosts) else 1.0
    speeds = [h.speed or 1.0 if h.product is None else here / h.product for h in plan.hosts]
    hosts = [
        HostModel(h.name, h.cores, speed, h.memory, h.up, h.down)
        for h, speed in zip(plan.hosts, speeds, strict=True)
    ]
    failures = FailureModel(**dict(plan.failures))
    guessed = [f"{host.name} ({host.machine})" for host in plan.hosts if host.machine is not None]
    notes = [f"estimated, not measured: {', '.join(guessed)}; `hamdist profile` measures a host"]
    cluster = ClusterModel(hosts, links[0][1], failures, plan.pace or math.inf, links[1:])
    return cluster, notes if guessed else []


def _course(links: dict[str, Any], key: str, origin: str) -> dict[float, Link]:
    """Return a link by the seconds from which on it is so; the first at 0."""
    where = f"{origin}: links.{key}" if key in links else f"{origin}: links"
    usual = {name: value for name, value in links.items() if "->" not in name}
    of_pair = mapping(links.get(key, {}), where)
    # (A latency of its own has a jitter of its own.)
    fields = {k: v for k, v in usual.items() if k != "jitter" or "latency" not in of_pair} | of_pair
    changes = fields.pop("changes", [])
    if not isinstance(changes, list):
        raise SettingsError(f"{where}.changes: a list such as [{{at: 30s, loss: 0.1}}]")
    course, latest = {0.0: checked(LinkSettings, fields, where).link()}, 0.0
    for n, change in enumerate(changes):
        fields = fields | mapping(change, f"{where}.changes.{n}")
        settings = checked(LinkSettings, fields, f"{where}.changes.{n}")
        if settings.at <= latest:
            raise SettingsError(
                f"{where}.changes.{n}.at is {settings.at:g}; give times in order, above 0"
            )
        latest = settings.at
        course[latest] = settings.link()
    return course
