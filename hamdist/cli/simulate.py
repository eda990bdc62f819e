"""`hamdist simulate`: a run on a cluster that a file describes; `hamdist profile`: its entries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hamdist.cli.console import note, print_facts, print_rows, report, say, warn
from hamdist.cli.options import (
    JsonFileOption,
    OverwriteOption,
    RunOptions,
    SettingsArgument,
    json_file,
    level_names,
    option,
)
from hamdist.config import EngineKind, Level
from hamdist.errors import SettingsError
from hamdist.study.shared.result_folder import free_folder, results_of

if TYPE_CHECKING:
    from hamdist.study.simulate.simulate import PlacedRun, Planner

SHOWN = 8  # blocks of an actor


def simulate(
    settings: SettingsArgument,
    *,
    hosts: Annotated[Path, option("The cluster (how-to: simulate).", "FILE")],
    learn: Annotated[bool, option("Learn in one process what the cluster would learn.")] = False,
    sweep: Annotated[bool, option("Try cuts, placements, delays and codecs.")] = False,
    levels: Annotated[str | None, option("Levels for --sweep to try, too.", "A,B")] = None,
    out: Annotated[
        Path | None, option("Folder of --sweep.", shown="results/NAME-simulated")
    ] = None,
    overwrite: OverwriteOption = False,
    json_: JsonFileOption = None,
    options: Annotated[RunOptions, "level seed steps set_ model stream"],
) -> None:
    """Predict a run on a cluster before there is one: throughput, limits, memory, and weights."""
    if not sweep and (levels or out or overwrite):
        raise SettingsError("--levels, --out and --overwrite belong to --sweep")
    json_ = json_file(json_)
    loaded = options.load(settings, engine={"kind": EngineKind.RAY.value})

    from hamdist.study.report.files import to_json
    from hamdist.study.run.export import at_one_level
    from hamdist.study.shared.result_folder import write_file
    from hamdist.study.simulate.host_plan import read_host_plan
    from hamdist.study.simulate.simulate import Planner
    from hamdist.study.simulate.simulate import learn as learn_it
    from hamdist.study.simulate.simulate import simulate as simulated

    laid = at_one_level(loaded, loaded.level)
    cluster, notes = read_host_plan(hosts)
    for text in notes:
        warn(text)
    own = options.functions(laid)
    planner = Planner(cluster, own)
    folder = out or results_of(f"{laid.name}-simulated")
    if sweep:
        others = level_names(levels) if levels else []
        folder = free_folder(folder, overwrite=overwrite, say=note)
        placed, result = _swept(planner, loaded, others, folder)
    else:
        placed = planner.best(laid)
        result = simulated(placed, laid.seed)
    for text in placed.too_full():
        warn(f"memory: {text}")
    if learn:
        note("learning in one process with these delays ...")
        _, learned = learn_it(placed, result["stages"], own)
        result |= learned
    _print(result)
    report(**result)
    if json_ is not None:
        write_file(json_, to_json(result, indent=2))


def _swept(
    planner: Planner, laid: Any, others: Sequence[Level | str], folder: Path
) -> tuple[PlacedRun, dict[str, Any]]:
    """Return the winner of the sweep and its simulation; all settings are written."""
    from hamdist.study.simulate.simulate import simulate as simulated
    from hamdist.study.simulate.sweep import sweep, write_sweep

    pairs = [(p, simulated(p, laid.seed)) for p in sweep(laid, planner, others, note)]
    pairs.sort(key=lambda pair: -pair[1]["samples_per_second"])
    files = write_sweep(folder, [placed for placed, _ in pairs])
    rows = [["samples/s", "level", "blocks", "actors", "codec", "largest delay", "settings"]]
    rows += [
        [
            f"{result['samples_per_second']:,.1f}",
            placed.settings.level_name,
            str(len(placed.model.plan.graph.blocks)),
            str(len(placed.placement)),
            str(getattr(placed.settings.engine.compress, "value", "by edge")),
            str(max(placed.delays.values(), default=1)),
            str(file),
        ]
        for (placed, result), file in zip(pairs, files, strict=True)
    ]
    print_rows("Sweep", rows)
    return pairs[0]


def _in_short(blocks: Sequence[str]) -> str:
    if len(blocks) <= SHOWN:
        return ", ".join(blocks)
    return f"{', '.join(blocks[: SHOWN - 1])} ... {blocks[-1]} ({len(blocks)})"


def _print(result: dict[str, Any]) -> None:
    p = result["percentiles"]
    facts = {
        "samples/s": f"{result['samples_per_second']:,.1f} (p5 {p['p5']:,.1f}, p50 {p['p50']:,.1f},"
        f" p95 {p['p95']:,.1f}; undisturbed {result['undisturbed']:,.1f})",
        "critical": result["critical"],
        **{
            f"from {stage['at']:g} s": f"{stage['samples_per_second']:,.1f} samples/s, "
            f"{stage['critical']}"
            for stage in result["stages"][1:]
        },
        "delays, ticks": ", ".join(f"{e} {d}" for e, d in result["delays"].items() if d != 1),
        "staleness": f"{result['staleness']} samples",
        "memory, MiB": ", ".join(f"{h} {n / 2**20:,.0f}" for h, n in result["memory"].items()),
        "lost, s/h": ", ".join(
            f"{cause} {s:,.1f}" for cause, s in result["lost_seconds_per_hour"].items() if s
        ),
    }
    if "digest" in result:
        score, name = result["accuracy"], "accuracy"
        if score is None:
            score, name = result["loss"], "loss"
        facts[f"held-out {name}"] = "none" if score is None else f"{score:.4f}"
        facts["digest of the weights"] = result["digest"]
    print_facts("Simulated", {name: fact for name, fact in facts.items() if fact})
    rows = [["actor", "host", "busy, %", "waiting, %", "blocks"]]
    rows += [
        [
            str(i),
            actor["host"],
            f"{100 * actor['busy']:.0f}",
            f"{100 * actor['waiting']:.0f}",
            _in_short(actor["blocks"]),
        ]
        for i, actor in enumerate(result["actors"])
    ]
    print_rows("Actors", rows)
    links = [["link", "KiB per sample", "of its bandwidth, %"]]
    links += [
        [name, f"{link['bytes_per_sample'] / 1024:,.1f}", f"{100 * link['share']:.0f}"]
        for name, link in result["links"].items()
    ]
    if links[1:]:
        print_rows("Links", links)


def profile() -> None:
    """Measure this host, and print its entry for the file of `hamdist simulate --hosts`."""
    import socket

    import psutil

    from hamdist.runtime.process.threads import cores, product_seconds

    memory = psutil.virtual_memory().total
    entry = {
        "name": socket.gethostname(),
        "cores": cores(),
        "memory": f"{memory / 2**30:.1f}GiB",
        "product": float(f"{product_seconds():.3g}"),
    }
    report(**entry)
    text = ", ".join(f"{name}: {value}" for name, value in entry.items())
    say(f"- {{{text}}}")
