"""Trackers: a run's events as scalars in TensorBoard, MLflow, W&B, Prometheus, Ray's metrics, CSV,
or as spans of OpenTelemetry.

Each needs its own package (an extra of hamdist's, of the same name), csv none.
"""

from __future__ import annotations

import csv
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from hamdist.config import EngineKind, Settings, TrackerKind, to_yaml
from hamdist.errors import HamdistWarning, SettingsError, need_package
from hamdist.runtime.results.events import (
    ActorReplaced,
    ActorsMeasured,
    BlocksMeasured,
    EdgesMeasured,
    Evaluated,
    EventListener,
    FolderEnded,
    PhaseBegun,
    RunBegun,
    RunEvent,
    RunFinished,
    RunProgressed,
    SnapshotComplete,
    UpdatesAligned,
    Warned,
    WindowFull,
)
from hamdist.runtime.results.measured import Histogram
from hamdist.runtime.results.run_events import cut_off

LOOPBACK = "127.0.0.1"
REPORT = "report.html"
Log = Callable[[str, dict[str, float], int], object]  # run, values by name, samples
LogHistograms = Callable[[str, Mapping[str, Histogram], int], object]


def scalars(event: RunEvent) -> Iterator[tuple[str, float | None]]:
    """Yield the scalars of an event by name."""
    if isinstance(event, (WindowFull, Evaluated)):
        head = event.readout if isinstance(event, WindowFull) else "held_out"
        head += "/" if head else ""  # (centralised training has no readout)
        yield from ((f"{head}loss", event.loss), (f"{head}accuracy", event.accuracy))
    elif isinstance(event, RunProgressed) and event.seconds > 0:
        yield "samples_per_second", (event.samples - event.resumed) / event.seconds
    elif isinstance(event, BlocksMeasured):
        for block, norms in event.norms.items():
            values = norms._asdict()
            yield f"dead/{block}", values.pop("dead")
            yield from ((f"norm/{block}/{name}", x) for name, x in values.items())
        for block, late in event.staleness.items():
            updates = sum(n * times for n, times in late.items())
            yield f"staleness/{block}", updates / sum(late.values())
    elif isinstance(event, UpdatesAligned):
        yield from ((f"alignment/{block}", x) for block, x in event.cosines.items())
        yield from ((f"feedback/{block}", x) for block, x in event.feedback.items())
    elif isinstance(event, ActorsMeasured):
        yield from ((f"memory/{actor}", size) for actor, size in event.memory.items())
        for actor, spent in event.seconds.items():
            yield from ((f"seconds/{actor}/{kind}", x) for kind, x in spent.items())
    elif isinstance(event, EdgesMeasured):
        for edge, counts in event.edges.items():
            names = ("bytes", "queued", "waited")
            yield from ((f"edge/{edge}/{name}", getattr(counts, name)) for name in names)


@dataclass
class Tracker:
    """A listener that logs the scalars of events, counted in samples, until the folder ends.

    gauges: what is not finite is logged, too, for the value before would stay.
    """

    log: Log
    begin: Callable[[str, str], object] = lambda *_: None  # run, settings as YAML
    close: Callable[[], object] = lambda: None
    histograms: LogHistograms = lambda *_: None
    samples: int = 0
    gauges: bool = False

    def __call__(self, event: RunEvent) -> None:
        run = "-".join(str(part) for part in (event.level, event.seed) if part is not None)
        if isinstance(event, RunBegun):
            self.begin(run, to_yaml(Settings.model_validate(dict(event.settings)), only_set=True))
        elif isinstance(event, RunProgressed):
            self.samples = event.samples
        at = self.samples
        if isinstance(event, WindowFull):
            at = event.last + 1
        elif isinstance(event, UpdatesAligned):
            at = event.sample + 1
        elif isinstance(event, Evaluated):
            at = event.samples
        pairs = [(n, v) for n, v in scalars(event) if v is not None]
        values = {n: v for n, v in pairs if self.gauges or math.isfinite(v)}
        if values:
            self.log(run, values, at)
        if isinstance(event, BlocksMeasured) and event.histograms:
            parts = event.histograms.items()
            named = {
                f"{block}/{kind}": x for block, by_kind in parts for kind, x in by_kind.items()
            }
            self.histograms(run, named, at)
        if isinstance(event, FolderEnded):
            self.close()


def _csv(folder: Path, _: Settings) -> Tracker:
    file = (folder / "metrics.csv").open("a", newline="", encoding="utf-8", buffering=1)
    writer = csv.writer(file, lineterminator="\n")
    if cut_off(folder / "metrics.csv"):
        file.write("\n")
    if not file.tell():
        writer.writerow(("run", "name", "value", "samples"))

    def log(run: str, values: dict[str, float], at: int) -> None:
        writer.writerows((run, name, value, at) for name, value in values.items())

    return Tracker(log, close=file.close)


def _tensorboard(folder: Path, _: Settings) -> Tracker:
    need_package("tensorboard", "tensorboard", "trackers: tensorboard")
    module: Any = import_module("torch.utils.tensorboard")
    writer = module.SummaryWriter(str(folder / "tensorboard"))

    def log(run: str, values: dict[str, float], at: int) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{run}/{name}", value, at)

    def histograms(run: str, named: Mapping[str, Histogram], at: int) -> None:
        for name, h in named.items():
            edges, total = h.edges, sum(h.counts)
            middles = [(a + b) / 2 for a, b in pairwise(edges)]
            sums = [sum(n * m**p for n, m in zip(h.counts, middles, strict=True)) for p in (1, 2)]
            writer.add_histogram_raw(
                f"{run}/{name}", h.low, h.high, total, *sums, edges[1:], list(h.counts), at
            )

    return Tracker(
        log,
        lambda run, text: writer.add_text(f"{run}/settings", f"```\n{text}```"),
        writer.close,
        histograms,
    )


def _mlflow(folder: Path, settings: Settings) -> Tracker:
    need_package("mlflow", "mlflow", "trackers: mlflow")
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    there = client.get_experiment_by_name(settings.name)
    files = (folder / "mlflow").resolve().as_uri()
    experiment = there.experiment_id if there else client.create_experiment(settings.name, files)
    runs: dict[str, str] = {}

    def begin(run: str, text: str) -> None:
        runs[run] = client.create_run(experiment, run_name=run).info.run_id
        client.log_text(runs[run], text, "settings.yaml")

    def log(run: str, values: dict[str, float], at: int) -> None:
        now = int(1000 * time.time())
        names = {re.sub(r"[^\w ./-]", "_", name): value for name, value in values.items()}
        client.log_batch(runs[run], [Metric(name, v, now, at) for name, v in names.items()])

    def close() -> None:
        for run in runs.values():
            if (folder / REPORT).is_file():
                client.log_artifact(run, str(folder / REPORT))
            client.set_terminated(run)

    return Tracker(log, begin, close)


def _wandb(folder: Path, settings: Settings) -> Tracker:
    need_package("wandb", "wandb", "trackers: wandb")
    import wandb

    mode: Any = os.environ.get(
        "WANDB_MODE", "online" if "WANDB_API_KEY" in os.environ else "offline"
    )
    config = settings.model_dump(mode="json", exclude_unset=True)
    begun_here = wandb.run is None  # (else `init` gives the run that is open, which stays open)
    run: Any = wandb.init(
        project="hamdist", name=settings.name, dir=folder, mode=mode, config=config
    )

    def log(name: str, values: Mapping[str, Any], at: int) -> None:
        run.log({**{f"{name}/{key}": value for key, value in values.items()}, "samples": at})

    def histograms(name: str, named: Mapping[str, Histogram], at: int) -> None:
        shown = {n: (list(h.counts), h.edges) for n, h in named.items()}
        log(name, {n: wandb.Histogram(np_histogram=h) for n, h in shown.items()}, at)

    def close() -> None:
        if (folder / REPORT).is_file():
            run.log_artifact(str(folder / REPORT), name="report", type="report")
        if begun_here:
            run.finish()

    return Tracker(log, close=close, histograms=histograms)


def _prometheus(_: Path, settings: Settings) -> Tracker:
    need_package("prometheus_client", "prometheus", "trackers: prometheus")
    from prometheus_client import CollectorRegistry, Gauge, start_http_server

    registry, port = CollectorRegistry(), settings.metrics.prometheus_port
    gauge = Gauge("hamdist", "The latest value.", ["run", "name"], registry=registry)
    try:
        server, _thread = start_http_server(port, LOOPBACK, registry)
    except OSError as error:
        raise SettingsError(f"metrics.prometheus_port {port}: {error.strerror}") from None

    def log(run: str, values: dict[str, float], _: int) -> None:
        for name, value in values.items():
            gauge.labels(run, name).set(value)

    return Tracker(log, close=server.shutdown, gauges=True)


def _ray(_: Path, settings: Settings) -> Tracker:
    """Make the tracker for the `/metrics` of a Ray cluster, which its hosts' agents serve."""
    need_package("aiohttp_cors", "'hamdist[cluster]'", "trackers: ray")
    if settings.engine.kind is not EngineKind.RAY:
        raise SettingsError("trackers: ray has no Ray to tell: use engine.kind ray, or prometheus")
    ray, metrics = import_module("ray"), import_module("ray.util.metrics")
    gauge = metrics.Gauge("hamdist", "The latest value.", ("run", "name"))

    def log(run: str, values: dict[str, float], _: int) -> None:
        for name, value in values.items() if ray.is_initialized() else ():
            gauge.set(value, {"run": run, "name": name})

    return Tracker(log, gauges=True)


class SpanTracker:
    """A listener that makes spans of a run, the phases of its start, and its recoveries.

    Snapshots and warnings are events of the run's span. tracer: of OpenTelemetry.
    """

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self._run: Any = None  # the spans that are open
        self._phase: Any = None

    def __call__(self, event: RunEvent) -> None:
        if isinstance(event, RunBegun):
            about = {"level": event.level, "seed": event.seed, "engine": event.engine}
            self._run = self._span("run", event.time, about)
        if self._run is None:
            return
        if isinstance(event, (PhaseBegun, RunProgressed, RunFinished)) and self._phase is not None:
            self._phase.end(_ns(event.time))
            self._phase = None
        if isinstance(event, PhaseBegun):
            self._phase = self._span(f"start: {event.phase}", event.time)
        elif isinstance(event, ActorReplaced):
            about = {"actor": event.actor, "tick": event.since, "replayed": event.replayed}
            self._span("recovery", event.time - event.seconds, about).end(_ns(event.time))
        elif isinstance(event, SnapshotComplete):
            self._run.add_event("snapshot", {"path": event.path}, _ns(event.time))
        elif isinstance(event, Warned):
            self._run.add_event("warning", {"text": event.text}, _ns(event.time))
        elif isinstance(event, RunFinished):
            self._run.set_attribute("samples", event.samples)
            if event.failure is not None:
                codes: Any = import_module("opentelemetry.trace").StatusCode
                self._run.set_status(codes.ERROR, event.failure)
            self._run.end(_ns(event.time))
            self._run = None

    def _span(self, name: str, begin: float, about: Mapping[str, Any] | None = None) -> Any:
        """Return a new span from `begin` on, a child of the run's, if there is one."""
        trace: Any = import_module("opentelemetry.trace")
        parent = None if self._run is None else trace.set_span_in_context(self._run)
        attributes = {f"hamdist.{n}": x for n, x in (about or {}).items() if x is not None}
        return self._tracer.start_span(name, parent, attributes=attributes, start_time=_ns(begin))


def _ns(seconds: float) -> int:
    return int(1e9 * seconds)


def _opentelemetry(_: Path, settings: Settings) -> SpanTracker:  # noqa: ARG001
    need_package("opentelemetry", "opentelemetry", "trackers: opentelemetry")
    trace: Any = import_module("opentelemetry.trace")
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        text = (
            "trackers: opentelemetry has nowhere to send spans: set a tracer provider, or start "
            "the program with `opentelemetry-instrument`"
        )
        warnings.warn(text, HamdistWarning, stacklevel=2)
    return SpanTracker(trace.get_tracer("hamdist"))


_MAKERS: Mapping[TrackerKind, Callable[[Path, Settings], EventListener]] = {
    TrackerKind.CSV: _csv,
    TrackerKind.TENSORBOARD: _tensorboard,
    TrackerKind.MLFLOW: _mlflow,
    TrackerKind.WANDB: _wandb,
    TrackerKind.PROMETHEUS: _prometheus,
    TrackerKind.RAY: _ray,
    TrackerKind.OPENTELEMETRY: _opentelemetry,
}


def open_trackers(settings: Settings, folder: Path) -> list[EventListener]:
    """Return the trackers of `settings.trackers`, with their files in `folder`.

    Raises SettingsError if a package is missing.
    """
    kinds = dict.fromkeys(settings.trackers)
    return [_until_it_fails(kind.value, _MAKERS[kind](folder, settings)) for kind in kinds]


def _until_it_fails(name: str, tracker: EventListener) -> EventListener:
    """Return a tracker whose first error (a full disk, a server that is gone) ends it, with a
    warning, and not the run."""
    failed = False

    def take(event: RunEvent) -> None:
        nonlocal failed
        if failed and not isinstance(event, FolderEnded):  # (it is closed, though)
            return
        try:
            tracker(event)
        except Exception as error:  # noqa: BLE001 (of packages whose errors have no common root)
            first, failed = not failed, True
            text = f"trackers: {name} has failed, and gets no more: {type(error).__name__}: {error}"
            if first:
                warnings.warn(text, HamdistWarning, stacklevel=2)

    return take


def listeners_of(
    settings: Settings, trackers: Sequence[str | EventListener], folder: Path | None = None
) -> list[EventListener]:
    """Return the functions among `trackers`, and the trackers of `settings.trackers`.

    Their files lie in `folder`, or in results/NAME-TIME. Raises SettingsError.
    """
    functions = [tracker for tracker in trackers if not isinstance(tracker, str)]
    if not settings.trackers:
        return functions
    where = folder or _folder(settings.name)
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"trackers: {str(where)!r}: {error.strerror or error}") from None
    return [*open_trackers(settings, where), *functions]


def _folder(name: str) -> Path:
    """Make a folder of this run alone, results/NAME-TIME: runs may begin in the same second."""
    where = first = Path("results") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count(2):
        try:
            where.mkdir(parents=True)
        except FileExistsError:
            where = first.with_name(f"{first.name}-{number}")
        else:
            break
    return where
