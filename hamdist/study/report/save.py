"""Writes a finished run, or a comparison, into a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from hamdist.config import Settings, to_yaml
from hamdist.display.table import Table, csv_text, latex
from hamdist.study.report.aggregate import aggregate
from hamdist.study.report.blocks import block_table, facts_of
from hamdist.study.report.digests_diff import digests_json
from hamdist.study.report.figures import alignment_figures, gap_figures, record_figures
from hamdist.study.report.files import (
    comparison_summary,
    recorded,
    report_events,
    rows_csv,
    run_lines,
    run_summary,
    to_json,
)
from hamdist.study.report.html import render
from hamdist.study.report.table import comparison_table
from hamdist.study.run.run import Run
from hamdist.study.run.tracking import records_npz
from hamdist.study.shared.result_folder import write_file
from hamdist.study.view.page import FIGURES, baked
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
            write_file(folder / "records.html", html_page(title, parts, [baked(figures=figures)]))
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
    partition = settings.partition.model_copy(update={"delays": dict(run.delays)})
    engine = settings.engine
    if engine.bundle == "auto":
        engine = engine.model_copy(update={"bundle": "off"})
    return settings.model_copy(update={"partition": partition, "engine": engine})


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
    figures = gap_figures(runs) + alignment_figures(seen, {(run.level, run.seed) for run in runs})
    if blocks is not None:
        save_blocks(folder, blocks)
    page = render(
        settings, table, figures, command, interrupted=interrupted, events=events, blocks=blocks
    )
    write_file(folder / "report.html", page)
