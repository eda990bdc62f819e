"""The table of gradient descent, as texts and as files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hamdist.display.table import Table, csv_text, markdown
from hamdist.runtime.results.events import plain
from hamdist.study.gradient_descent.models import MODELS
from hamdist.study.gradient_descent.scenarios import BOUND, SCENARIOS, Placement, ScenarioRow
from hamdist.study.report.files import to_json
from hamdist.study.shared.result_folder import write_file

NAMES = {
    "linear": "Linear",
    "mlp": "MLP",
    "resnet": "ResNet",
    "vit": "ViT",
    "rnn": "RNN",
    "lstm": "LSTM",
}


def in_order(rows: Iterable[ScenarioRow]) -> list[ScenarioRow]:
    """Return the rows in the order of the table: by model, then by scenario."""
    models, scenarios = list(MODELS), list(SCENARIOS)
    return sorted(rows, key=lambda r: (models.index(r.model), scenarios.index(r.scenario)))


def recovery_line(row: ScenarioRow) -> str:
    """Return the line that is printed as soon as a row is finished."""
    wrong = [cell.placement.value for cell in row.cells if not cell.passed]
    verdict = f"apart at {', '.join(wrong)}" if wrong else "equal"
    return (
        f"{NAMES[row.model]}, {row.scenario}: {verdict} ({row.steps:,} steps, {row.seconds:.1f} s)"
    )


def recovery_table(rows: Sequence[ScenarioRow]) -> Table:
    """Return rows model x scenario; per placement the largest difference of losses / of weights."""
    paper = any(row.from_pytorch is not None for row in rows)
    placements = [f"{p.value}: losses / weights" for p in Placement]
    titles = ["model", "scenario", "steps", "loss", *placements]
    cells = [_cells(row) for row in rows]
    if paper:
        titles.append("weights from PyTorch's")
        for row, texts in zip(rows, cells, strict=True):
            texts.append("–" if row.from_pytorch is None else _short(row.from_pytorch))
    return Table(titles, cells, _notes(rows, paper=paper))


def _cells(row: ScenarioRow) -> list[str]:
    first, last = row.loss
    return [
        NAMES[row.model],
        row.scenario,
        f"{row.steps:,}",
        f"{first:.3f}" if first == last else f"{first:.3f} → {last:.3f}",
        *(f"{_short(c.losses)} / {_short(c.weights)}{'' if c.passed else ' ✗'}" for c in row.cells),
    ]


def _short(difference: float) -> str:
    return "0" if difference == 0 else f"{difference:.1e}"


def _notes(rows: Sequence[ScenarioRow], *, paper: bool) -> list[str]:
    cells = [cell for row in rows for cell in row.cells]
    wrong = sum(not cell.passed for cell in cells)
    judged = f"{len(cells) - wrong} of {len(cells)} cells equal SGD to {BOUND:g}"
    sources = {NAMES[row.model]: row.source for row in rows}
    by_source = {s: [n for n, source in sources.items() if source == s] for s in sources.values()}
    data = "; ".join(f"{', '.join(names)}: {source}" for source, names in by_source.items())
    notes = [f"{judged}{f' (✗: {wrong} do not)' if wrong else ''}", f"data: {data}"]
    if paper:
        notes.append(
            "with momentum the first step is dampened too, as the plain table of HL Appendix E has "
            "it: the oracle is SGD with its momentum begun at zero; the last column tells how far "
            "that is from PyTorch's own first step"
        )
    return notes


def records(rows: Sequence[ScenarioRow]) -> list[dict[str, Any]]:
    """Return one record per cell."""
    return [
        {
            "model": row.model,
            "scenario": row.scenario,
            "placement": cell.placement.value,
            "steps": row.steps,
            "data": row.source,
            "first_loss": row.loss[0],
            "last_loss": row.loss[1],
            "losses": cell.losses,
            "weights": cell.weights,
            "bound": BOUND,
            "passed": cell.passed,
            "seconds": cell.seconds,
            "from_pytorch": row.from_pytorch,
        }
        for row in rows
        for cell in row.cells
    ]


def save_recovery(folder: Path, rows: Sequence[ScenarioRow], command: str) -> None:
    """Write recovery.json, recovery.csv and recovery.md. Raises SettingsError if that fails."""
    cells = [plain(record) for record in records(rows)]
    write_file(folder / "recovery.json", to_json({"command": command, "cells": cells}, indent=2))
    write_file(folder / "recovery.csv", csv_text(cells))
    write_file(folder / "recovery.md", f"`{command}`\n\n{markdown(recovery_table(rows))}")
