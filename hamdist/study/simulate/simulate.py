"""`hamdist simulate`: what a run would do on a cluster that a file describes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from hamdist.config import EngineKind, Settings, Spread
from hamdist.errors import ClusterError, SettingsError
from hamdist.runtime.placement.assign_blocks import groups_of, options_of_groups, place, split
from hamdist.runtime.placement.assign_hosts import HostInfo
from hamdist.runtime.placement.links import as_measured, least_delays
from hamdist.runtime.placement.step_costs import Unmeasured, costs_of, measure, source_host
from hamdist.runtime.plan.derived import exact_bytes, with_delays
from hamdist.runtime.plan.dtypes import block_settings
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.timing.cluster_model import ClusterModel
from hamdist.runtime.timing.disturbances import COPY_BYTES_PER_SECOND, Disturbances, SnapshotModel
from hamdist.runtime.timing.simulations import EventSimulation, Recursion
from hamdist.runtime.timing.timed_graph import Period, TimedGraph, TimingModel
from hamdist.study.run.export import starting_plan
from hamdist.study.run.own_data import OwnFunctions
from hamdist.study.run.run import Run, run_level

WORKER_BYTES = 170 * 2**20  # of an actor's process without blocks (docs: concepts/limits)
STEPS, EVENTS = 2_000_000, 100_000  # activities that are simulated, at most
MOST_PERIODS, LEAST_PERIODS = 5_000, 60
WINDOWS = 40  # over which the percentiles are taken
MOST_ACTORS = 32
MEASURING_SECONDS = 120.0  # at most
SAMPLES_TO_COUNT = 4096  # that are drawn to find the length of a sequence


@dataclass(frozen=True)
class PlacedRun:
    """A way to run settings on a cluster.

    Attributes:
        settings: of one level, for Ray.
        model: of the plan with the candidate's delays.
        placement: blocks of each actor; hosts: of each actor, by its place in `cluster`.
        period: by the model.
    """

    settings: Settings
    cluster: ClusterModel
    model: TimingModel
    placement: Sequence[Sequence[str]]
    hosts: Sequence[int]
    period: Period

    @property
    def rate(self) -> float:
        """Return the samples a second without disturbances."""
        return self.model.steps.samples / self.period.seconds

    def timed(self) -> TimedGraph:
        """Return the run's steps with their times on this cluster."""
        return self.model.timed(self.placement, self.hosts, self.cluster)

    @property
    def delays(self) -> dict[str, int]:
        """Return the delays of edges between blocks, in ticks."""
        return {e.name: e.delay for e in self.model.plan.graph.edges if not e.from_input}

    def memory(self) -> dict[str, int]:
        """Return the bytes that the actors of each host take, estimated: their processes, weights
        with costates and averages, stored states, and signals that wait."""
        by_host = dict.fromkeys((host.name for host in self.cluster.hosts), 0)
        sizes = _block_bytes(self.model.plan, self.settings)
        for blocks, host in zip(self.placement, self.hosts, strict=True):
            nbytes = sum(sizes[name] for name in blocks)
            by_host[self.cluster.hosts[host].name] += WORKER_BYTES + nbytes
        return by_host

    def too_full(self) -> list[str]:
        """Return the hosts whose memory does not suffice, in words."""
        limits = {host.name: host.memory for host in self.cluster.hosts}
        return [
            f"{name} needs about {size / 2**20:,.0f} MiB of its {limits[name] / 2**20:,.0f}"
            for name, size in self.memory().items()
            if size > limits[name]
        ]

    def chosen(self) -> Settings:
        """Return settings that run the candidate on a cluster with hosts of these names."""
        settings = self.settings
        pins = {
            name: block_settings(self.model.plan.graph, settings.engine)[name].model_copy(
                update={"host": self.cluster.hosts[host].name}
            )
            for blocks, host in zip(self.placement, self.hosts, strict=True)
            for name in blocks
            if len(self.cluster.hosts) > 1
        }
        engine = {
            "actors": "auto",
            "placement": tuple(map(tuple, self.placement)),
            "blocks": pins or settings.engine.blocks,
            "bundle": "off" if self.model.plan.engine.bundle == "auto" else settings.engine.bundle,
        }
        return settings.changed(engine=engine, partition={"delays": self.delays})


def _block_bytes(plan: Plan, settings: Settings) -> dict[str, int]:
    """Return the bytes that each block needs."""
    copies = 2 + (settings.learning.adaptive is not None) + (settings.learning.average != "off")
    stored = getattr(plan.schedule, "stored", lambda _: 1)
    sizes = {
        name: copies * sum(p.numel() * p.element_size() for p in block.module.parameters())
        for name, block in plan.graph.blocks.items()
    }
    by_edge: dict[tuple[str, str], int] = {}
    for channel in plan.channels.all():
        if channel.receiver in sizes:
            nbytes = exact_bytes(plan, channel)
            by_edge[channel.receiver, channel.edge] = nbytes
            sizes[channel.receiver] += channel.capacity * nbytes
    for (name, _), nbytes in by_edge.items():
        sizes[name] += (stored(name) + 1) * nbytes
    return sizes


class Planner:
    """Plans settings on a cluster; measures their steps on this host.

    Args:
        cluster: hosts and links.
        own: makes the model and the stream, instead of those that the settings name.
    """

    def __init__(self, cluster: ClusterModel, own: OwnFunctions) -> None:
        self.cluster, self._own = cluster, own

    def model(self, settings: Settings) -> TimingModel:
        """Return the measured steps of settings.

        Raises SettingsError where they cannot be measured, and what `train` raises before a start.
        """
        plan, stream = starting_plan(settings, self._own)
        tokens = {}
        if plan.knobs.sequence:
            drawn = zip(range(SAMPLES_TO_COUNT), stream.samples(), strict=False)
            tokens = {
                "tokens": next((n + 1 for n, sample in drawn if sample.end), SAMPLES_TO_COUNT)
            }
        try:
            seconds = measure(plan, limit=MEASURING_SECONDS)
        except Unmeasured as reason:
            raise SettingsError(f"the blocks' steps could not be measured here: {reason}") from None
        return TimingModel(plan, seconds, source_host(plan) if stream.portable else None, **tokens)

    def candidates(self, settings: Settings, model: TimingModel) -> Iterator[PlacedRun]:
        """Yield the ways to place the blocks on the cluster, with the delays of the settings.

        They are those that `engine` leaves open: the number of actors, and their hosts.
        Raises ClusterError if the cluster has no room for any.
        """
        engine, graph = settings.engine, model.plan.graph
        costs, fault = costs_of(model), None
        cpus = int(sum(min(host.cores, MOST_ACTORS) for host in self.cluster.hosts))
        groups = [place(graph, engine, max(1, cpus), costs)]
        if engine.actors == "auto" and engine.placement is None:
            names = list(graph.blocks)
            for parts in range(1, min(len(names) // engine.interleave, cpus, MOST_ACTORS) + 1):
                starts = split(costs, parts * engine.interleave)
                groups.append(groups_of(names, starts, parts))
        auto = (Spread.PACKED, Spread.SPREAD, Spread.PROFILE)
        seen: list[Any] = []
        for group in groups:
            for spread in auto if engine.spread is Spread.AUTO else (engine.spread,):
                try:
                    hosts = self._hosts(model, settings, group, spread)
                except (ClusterError, SettingsError) as error:
                    fault = error
                    continue
                if (group, hosts) not in seen:
                    seen.append((group, hosts))
                    yield self._candidate(settings, model, group, hosts)
        if not seen and fault is not None:
            raise fault

    def _hosts(
        self, model: TimingModel, settings: Settings, group: list[list[str]], spread: Spread
    ) -> list[int]:
        hosts = self.cluster.hosts
        infos = [HostInfo(str(i), h.name, h.name, h.cores) for i, h in enumerate(hosts)]
        graph, speeds = model.plan.graph, {str(i): 1 / h.speed for i, h in enumerate(hosts)}
        work = [sum(model.seconds[name].values()) for name in graph.blocks]
        options = options_of_groups(graph, settings.engine, group, infos, spread, work, speeds)
        return [int(o.node or 0) for o in options]

    def _candidate(
        self, settings: Settings, model: TimingModel, group: list[list[str]], hosts: list[int]
    ) -> PlacedRun:
        period = model.timed(group, hosts, self.cluster).period()
        return PlacedRun(settings, self.cluster, model, group, hosts, period)

    def with_least_delays(self, placed: PlacedRun) -> PlacedRun:
        """Return the candidate with the fewest delays that keep every actor busy."""
        settings = placed.settings
        if settings.engine.bundle == "auto":  # (a bundle would use the delays up, as in a run)
            settings = settings.changed(engine={"bundle": "off"})
        plan = dataclasses.replace(placed.model.plan, engine=settings.engine)
        model = dataclasses.replace(placed.model, plan=plan)
        cluster = as_measured(model, placed.placement, placed.hosts, self.cluster)
        delays = least_delays(model, placed.placement, placed.hosts, cluster)
        model = dataclasses.replace(model, plan=with_delays(plan, delays))
        return self._candidate(settings, model, [*map(list, placed.placement)], [*placed.hosts])

    def best(self, settings: Settings) -> PlacedRun:
        """Return the fastest way to run settings, by the model, that the hosts have memory for."""
        placed = fastest_first(self.candidates(settings, self.model(settings)))
        if settings.partition.delays == "auto":
            placed = fastest_first(map(self.with_least_delays, placed))
        return next((one for one in placed if not one.too_full()), placed[0])


def fastest_first(runs: Iterable[PlacedRun]) -> list[PlacedRun]:
    """Return the candidates by the samples a second of the model."""
    return sorted(runs, key=lambda placed: -placed.rate)


def simulate(placed: PlacedRun, seed: int = 0) -> dict[str, Any]:
    """Simulate a candidate, with what disturbs it, and return the figures as plain values.

    Where links change, every stage between two changes is simulated as if it lasted: its rate is in
    'stages', the samples a second are those of the whole run, the other figures of the first stage.
    """
    result = _stage(placed, seed)
    results = [(0.0, result)]
    for at, links in placed.cluster.changes:
        cluster = dataclasses.replace(placed.cluster, links=links)
        period = placed.model.timed(placed.placement, placed.hosts, cluster).period()
        later = dataclasses.replace(placed, cluster=cluster, period=period)
        results.append((at, _stage(later, seed)))
    shown = ("samples_per_second", "critical")
    result["stages"] = [{"at": at, **{key: r[key] for key in shown}} for at, r in results]
    if len(results) > 1:
        samples = placed.settings.steps
        rate = results[-1][1]["samples_per_second"]  # (of an endless run)
        rate = rate if samples is None else samples / seconds_after(samples, result["stages"])
        result["samples_per_second"] = rate
    return result


def seconds_after(samples: float, stages: Sequence[Mapping[str, Any]]) -> float:
    """Return when so many samples are done, by the rates of the stages of a run."""
    ends = [*(stage["at"] for stage in stages[1:]), math.inf]
    for stage, end in zip(stages, ends, strict=True):
        rate = stage["samples_per_second"]
        done = rate * (end - stage["at"])
        if done >= samples:
            return float(stage["at"] + samples / rate)
        samples -= done
    raise ValueError("the last stage has no end")


def _stage(placed: PlacedRun, seed: int) -> dict[str, Any]:
    timed = placed.timed()
    each = len(timed.owner)
    most = (EVENTS if timed.shared else STEPS) // each
    periods = max(LEAST_PERIODS, min(MOST_PERIODS, most))
    disturbances = Disturbances(timed, seed, _snapshots(placed, timed))
    kind = EventSimulation if timed.shared else Recursion
    ends = kind(timed, disturbances).run(periods).max(axis=1)
    steady = ends[periods // 5 :]  # (the network has filled)
    seconds = float(steady[-1] - steady[0])
    period = seconds / (len(steady) - 1)
    marks = steady[np.linspace(0, len(steady) - 1, WINDOWS + 1).astype(int)]
    counts = np.diff(np.linspace(0, len(steady) - 1, WINDOWS + 1).astype(int)) * timed.samples
    rates = counts / np.maximum(np.diff(marks), 1e-12)
    hosts = placed.cluster.hosts
    return {
        "samples_per_second": timed.samples / period,
        "percentiles": dict(
            zip(("p5", "p50", "p95"), map(float, np.percentile(rates, [5, 50, 95])), strict=True)
        ),
        "undisturbed": placed.rate,
        "critical": placed.period.words,
        "delays": placed.delays,
        "staleness": placed.model.plan.staleness,
        "actors": [
            {
                "blocks": list(blocks),
                "host": hosts[host].name,
                "busy": min(1.0, timed.busy[i] / period),
                "waiting": max(0.0, 1 - timed.busy[i] / period),
            }
            for i, (blocks, host) in enumerate(zip(placed.placement, placed.hosts, strict=True))
        ],
        "links": {
            f"{hosts[a].name}->{hosts[b].name}": {
                "bytes_per_sample": n / timed.samples,
                "bytes_per_second": n / period,
                "share": n / period / placed.cluster.rate(a, b),
            }
            for (a, b), n in timed.nbytes.items()
        },
        "memory": placed.memory(),
        "lost_seconds_per_hour": {
            cause: 3600 * lost / float(ends[-1])
            for cause, lost in disturbances.lost_seconds.items()
        },
        "failures": disturbances.failures,
        "simulated_by": "events" if timed.shared else "recursion",
    }


def _snapshots(placed: PlacedRun, timed: TimedGraph) -> SnapshotModel | None:
    """Return the snapshots that the settings ask for."""
    snapshots = placed.settings.snapshots
    if snapshots.path is None:
        return None
    every = math.inf if snapshots.every is None else snapshots.every / timed.ticks
    if snapshots.seconds is not None or snapshots.every is None:
        every = min(every, (snapshots.seconds or 30.0) / placed.period.seconds)
    blocks = placed.model.plan.graph.blocks
    sizes = [
        sum(2 * p.numel() * p.element_size() for b in names for p in blocks[b].module.parameters())
        for names in placed.placement
    ]
    sizes += [0] * (len(timed.resources) - len(sizes))
    return SnapshotModel(max(1, round(every)), [size / COPY_BYTES_PER_SECOND for size in sizes])


def learn(
    placed: PlacedRun, stages: Sequence[Mapping[str, Any]], own: OwnFunctions
) -> tuple[Run, dict[str, Any]]:
    """Learn in one process what the candidate will, and return the run and its figures.

    The digest is that of all weights; seconds are those of the cluster, by `stages` of `simulate`.
    """
    engine: dict[str, Any] = {"kind": EngineKind.INPROCESS, "placement": None, "digests": True}
    blocks = placed.settings.engine.blocks
    settings = placed.chosen().changed(engine={**engine, "blocks": blocks})
    run, _ = run_level(settings, own=own)
    curve = [
        {"seconds": seconds_after(w.last + 1, stages), "loss": w.mean_loss, "accuracy": w.accuracy}
        for w in run.windows
    ]
    accuracy = None if run.held_out is None else run.held_out.accuracy
    loss = None if run.held_out is None else run.held_out.loss
    digest = digest_of({name: track.last for name, track in run.digests["weights"].items()})
    return run, {"accuracy": accuracy, "loss": loss, "digest": digest, "curve": curve}


def digest_of(weights: Mapping[str, str]) -> str:
    """Return one digest of the digests of the weights, by block (runtime/results/digests.py)."""
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(weights.items()))
    return blake2b(text.encode(), digest_size=16).hexdigest()
