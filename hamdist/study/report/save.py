"""Writes a finished run, or a comparison, into a folder, with the figures of its report.

K: recorded ticks, O: outputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from hamdist.config import Loss, Settings, to_yaml
from hamdist.display.figure import FigureCurve, PageFigure
from hamdist.display.table import Table, csv_text, latex
from hamdist.dynamics.blocks.energy import Records, hamiltonian, lagrangian, robust_hamiltonian
from hamdist.runtime.results.events import RunEvent, UpdatesAligned
from hamdist.study.report.aggregate import AggregateRow, aggregate
from hamdist.study.report.blocks import block_table, facts_of
from hamdist.study.report.digests_diff import digests_json
from hamdist.study.report.files import (
    comparison_summary,
    recorded,
    render,
    report_events,
    rows_csv,
    run_lines,
    run_summary,
    to_json,
)
from hamdist.study.report.table import comparison_table
from hamdist.study.run.baseline import CENTRALISED
from hamdist.study.run.measures import Trajectory, last_signals, records_npz, rms, seconds
from hamdist.study.run.run import Run
from hamdist.study.shared.result_folder import write_file
from hamdist.study.view.page import FIGURES, data_script
from hamdist.study.view.page import page as html_page


def save_run(folder: Path, run: Run, model: nn.Module, settings: Settings) -> None:
    """Write model.safetensors (the `state_dict`), settings.yaml and settings-all.yaml,
    metrics.jsonl and summary.json, in this order: a disk that gets full has the weights. Of
    averaged weights also plain.safetensors, the weights as they were in the end; of a run with
    `partition.delays: auto` the settings have the delays that were chosen; of one with
    `metrics.record` also records.npz and records.html; with `engine.digests` digests.json.

    Raises SettingsError where a file cannot be written.
    """
    save_weights(folder / "model.safetensors", model.state_dict())
    if run.plain is not None:
        save_weights(folder / "plain.safetensors", run.plain.state_dict())
    _write_settings(folder, as_it_was(settings, run))
    write_file(folder / "metrics.jsonl", run_lines([run]))
    write_file(folder / "summary.json", to_json(run_summary(run), indent=2))
    if run.records:
        write_file(folder / "records.npz", records_npz(run.records, settings))
        figures = record_figures(run.records, settings)
        if figures:
            title = escape(f"hamdist: what {settings.name} recorded")
            parts = [f"<h1>{title}</h1>", FIGURES]
            write_file(
                folder / "records.html", html_page(title, parts, [data_script(figures=figures)])
            )
    if run.digests:
        write_file(folder / "digests.json", digests_json(run.digests))


def _write_settings(folder: Path, settings: Settings) -> None:
    """Write settings.yaml with the changed values, so that it reads as these settings, and
    settings-all.yaml with all of them.
    """
    write_file(folder / "settings.yaml", to_yaml(settings, only_set=True))
    write_file(folder / "settings-all.yaml", to_yaml(settings))


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a `state_dict` as a safetensors file. Raises SettingsError if it cannot be written."""
    # Clones: safetensors refuses tensors that share memory (tied weights).
    write_file(path, save({key: t.detach().clone().contiguous() for key, t in state.items()}))


def as_it_was(settings: Settings, run: Run) -> Settings:
    """Return `settings` with the choices made at the start of `run`.

    Those are its delays, and that its signals went alone (runtime/placement/links.py); of level
    'auto' the level and its values.
    """
    settings = run.chosen or settings
    if settings.partition.delays != "auto":
        return settings
    engine = {"bundle": "off"} if settings.engine.bundle == "auto" else {}
    return settings.changed(partition={"delays": dict(run.delays)}, engine=engine)


def save_blocks(folder: Path, table: Table) -> None:
    """Write blocks.csv and blocks.tex. Raises SettingsError where a file cannot be written."""
    records = [dict(zip(table.titles, row, strict=True)) for row in table.rows]
    write_file(folder / "blocks.csv", csv_text(records))
    write_file(folder / "blocks.tex", latex(table))


def save_comparison(
    folder: Path, runs: Sequence[Run], settings: Settings, *, command: str, interrupted: bool
) -> None:
    """Write runs.jsonl, results.csv, results.tex, summary.json, settings.yaml and report.html, of
    a folder with the events of the runs blocks.csv and blocks.tex; with `engine.digests` also
    digests-LEVEL-SEED.json of every run of hamdist's.

    Raises SettingsError where a file cannot be written.
    """
    rows = aggregate(runs)
    table = comparison_table(rows)
    write_file(folder / "runs.jsonl", run_lines(runs))
    write_file(folder / "results.csv", rows_csv(rows))
    write_file(folder / "results.tex", latex(table))
    _write_settings(folder, settings)
    summary = comparison_summary(rows, interrupted=interrupted)
    write_file(folder / "summary.json", to_json(summary, indent=2))
    for run in runs:
        if run.digests:
            name = f"digests-{run.level}-{run.seed}.json"
            write_file(folder / name, digests_json(run.digests))
    events, seen = report_events(runs, folder), recorded(folder)
    blocks = block_table(facts_of(runs, seen))
    figures = gap_figures(rows) + alignment_figures(seen, {(run.level, run.seed) for run in runs})
    if blocks is not None:
        save_blocks(folder, blocks)
    page = render(
        settings, table, figures, command, interrupted=interrupted, events=events, blocks=blocks
    )
    write_file(folder / "report.html", page)


# -- figures ---------------------------------------------------------------------------------------


BINS = 200
MOST_BLOCKS = 5
MOST_POINTS = 4000  # of a curve


def record_figures(records: Mapping[str, Records], settings: Settings) -> list[PageFigure]:
    """Return the figures of energies, of weights and, of a run with mse and trajectories, of the
    target and the output; none if nothing was recorded.
    """
    if not records or not all(len(r.tick) > 1 for r in records.values()):
        return []
    ticks, total = lagrangian(records)
    times, label = _time(ticks.double().numpy(), settings)
    energies = [
        _curve("robust Hamiltonian H'", times, robust_hamiltonian(records)[1].numpy(), None),
        _curve("Lagrangian", times, total.numpy(), (0, 0)),
        _curve("Hamiltonian H", times, hamiltonian(records)[1].numpy(), (1, 1)),
    ]
    figures = [PageFigure("Energy of all blocks", label, "energy", energies)]
    squares = torch.zeros(len(ticks), dtype=torch.float64)
    for of_block in records.values():
        squares += of_block.theta_norm[torch.isin(of_block.tick, ticks)].square()
    norms = [_curve("all blocks", times, squares.sqrt().numpy(), None)]
    for i, (name, of_block) in enumerate(records.items() if len(records) <= MOST_BLOCKS else ()):
        own_times, _ = _time(of_block.tick.double().numpy(), settings)
        norms.append(_curve(name, own_times, of_block.theta_norm.double().numpy(), (i, i)))
    figures.append(PageFigure("Norm of the weights", label, "norm", norms))
    signals = last_signals(records) if settings.loss is Loss.MSE else None
    return figures if signals is None else figures + _tracking(*signals, settings)


def _tracking(
    ticks: Trajectory, y: Trajectory, target: Trajectory, settings: Settings
) -> list[PageFigure]:
    """Return the first output with its target, and the error in BINS parts of the run."""
    times, label = _time(ticks, settings)
    curves = [_curve("target", times, target[:, 0], None), _curve("output", times, y[:, 0], (0, 0))]
    value = "value" if y.shape[1] == 1 else "value of the first output"
    parts = np.array_split(np.arange(len(times)), min(BINS, len(times)))
    size, error = rms(target), y - target
    shares = np.array([100 * rms(error[part]) / size if size else 0.0 for part in parts])
    middles = np.array([times[part].mean() for part in parts])
    title = f"Error, rms in {len(parts)} parts of the run"
    whole = [_curve("error", middles, shares, (1, 0))]
    return [
        PageFigure("Target and output", label, value, curves),
        PageFigure(title, label, "% of the target's rms", whole, log_y=True),
    ]


def _curve(
    name: str, times: Trajectory, values: Trajectory, style: tuple[int, int] | None
) -> FigureCurve:
    step = -(-len(times) // MOST_POINTS)
    return FigureCurve(name, times[::step].tolist(), values[::step].tolist(), style=style)


def _time(ticks: Trajectory, settings: Settings) -> tuple[Trajectory, str]:
    """Return the horizontal axis and its label."""
    times = seconds(ticks, settings)
    return (ticks, "tick") if times is None else (times, "time, s")


def alignment_figures(
    events: Iterable[RunEvent], runs: Collection[tuple[str | None, int | None]]
) -> list[PageFigure]:
    """Return the alignments of updates, and of feedback matrices, over time: by block, of the first
    seed of each level or rule. runs: the levels and seeds that are shown.
    """
    groups: dict[str | None, list[UpdatesAligned]] = {}
    for event in events:
        if isinstance(event, UpdatesAligned) and (event.level, event.seed) in runs:
            of_level = groups.setdefault(event.level, [])
            if not of_level or event.seed == of_level[0].seed:
                of_level.append(event)
    figures = []
    for level, group in groups.items():
        for title, part in (
            ("Updates and gradients of backpropagation", "cosines"),
            ("Feedback matrices and weights", "feedback"),
        ):
            cosines = [getattr(event, part) for event in group]
            blocks = dict.fromkeys(name for by_block in cosines for name in by_block)
            curves = [
                FigureCurve(
                    name,
                    [event.sample for event in group],
                    [by_block.get(name) for by_block in cosines],
                    style=(place, place),
                )
                for place, name in enumerate(blocks)
            ]
            if len(group) > 1 and curves:
                figures.append(PageFigure(f"{title}: {level}", "sample", "cosine", curves))
    return figures


# -- figures of comparisons ------------------------------------------------------------------------


def gap_figures(rows: Sequence[AggregateRow]) -> list[PageFigure]:
    """Return the gap to centralised training by level: mean over seeds and standard deviation;
    none of a level of which a run left the finite range, as in the table."""
    real_valued = all(row.held_out_accuracy is None for row in rows)
    levels = [row for row in rows if row.level != CENTRALISED]
    curves = []
    for place, row in enumerate(levels):
        gap, spread = row.loss_gap, row.loss_gap_spread
        if not real_valued:
            gap, spread = row.gap_to_backprop, row.gap_spread
        if gap is not None and math.isfinite(gap):
            unit, style = 1 if real_valued else 100, (place, place)
            bar = [unit * (spread or 0.0)]
            curves.append(FigureCurve(row.level, [place], [unit * gap], bar, style, points=True))
    worse = "above" if real_valued else "below"
    title = f"Gap to centralised backpropagation ({worse} 0: worse than it)"
    y_label = "held-out loss above centralised" if real_valued else "points of accuracy"
    ticks = [row.level for row in levels]
    return [PageFigure(title, "level", y_label, curves, ticks=ticks)] if curves else []
