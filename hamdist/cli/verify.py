"""`hamdist verify`: every statement against an independent oracle."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hamdist.cli.console import console, report
from hamdist.cli.options import JsonFileOption, json_file, option
from hamdist.display.progress import is_screen
from hamdist.errors import FAILED

if TYPE_CHECKING:
    from hamdist.study.verify.oracles.check import Check
    from hamdist.study.verify.runner import Topic, VerifyRow


def verify(
    full: Annotated[bool, option("The papers' sizes (half an hour).")] = False,
    golden: Annotated[Path | None, option("Folder of golden files (.npz), instead.", "DIR")] = None,
    only: Annotated[list[str] | None, option("One topic (repeatable).", "TOPIC")] = None,
    json_: JsonFileOption = None,
    model: Annotated[
        str | None,
        option("Verify the module that this function makes, and nothing else.", "FILE.py:FUNCTION"),
    ] = None,
    rule: Annotated[
        str | None, option("Verify this rule, and nothing else.", "FILE.py:NAME")
    ] = None,
    level: Annotated[str | None, option("Verify this level of your own.", "FILE.py:NAME")] = None,
    input_shape: Annotated[str | None, option("Of --model, without the batch.", "3,28,28")] = None,
    classes: Annotated[int | None, option("Of --model: targets are classes.", min=2)] = None,
    batch: Annotated[int | None, option("Of --model: rows.", min=1, shown="4")] = None,
    blocks: Annotated[int | None, option("Of --model: into how many blocks.", min=1)] = None,
) -> None:
    """Prove it: every statement of the papers against an oracle of its own."""
    json_ = json_file(json_)
    from hamdist.study.interface.verify import chosen_topics

    chosen = chosen_topics(
        model,
        only=only or (),
        golden=golden,
        rule=rule,
        level=level,
        input_shape=input_shape,
        classes=classes,
        batch=batch,
        blocks=blocks,
        option=lambda name: f"--{name.replace('_', '-')}",
    )
    _verify(chosen, full, json_)


def _verify(chosen: list[Topic], full: bool, json_: Path | None) -> None:
    """Print a row for each check as soon as it has run; exit code 1 if one failed."""
    from hamdist.study.verify.runner import run as run_checks
    from hamdist.study.verify.runner import to_json

    begin = time.monotonic()
    out = console()
    rows: list[VerifyRow] = []
    status = out.status("") if is_screen(out) else None
    last_topic = ""

    def starting(topic: Topic, check: Check) -> None:
        nonlocal last_topic
        if last_topic != topic.name:
            out.print(Text(f"\n{topic.title} ({topic.name})", style="bold"))
        last_topic = topic.name
        if status is not None:
            status.update(Text(check.name))

    try:
        with status or nullcontext():
            for row in run_checks(chosen, full, starting):
                rows.append(row)
                _print_row(out, row)
    finally:
        failed = sum(not row.passed for row in rows)
        seconds = time.monotonic() - begin
        if json_ is not None:
            json_.write_text(to_json(rows) + "\n", "utf-8")
        report(**json.loads(to_json(rows)))
        out.print(f"\n{len(rows) - failed} passed, {failed} failed, {seconds:.0f} s")
    if failed or not rows:
        raise typer.Exit(FAILED)


def _print_row(out: Console, row: VerifyRow) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0), expand=True)
    table.add_column(width=4)
    table.add_column(ratio=3)
    table.add_column(ratio=2, style="dim")
    for width in (8, 10, 7):
        table.add_column(width=width, justify="right")
    title = Text(row.name) if not row.note else Text(f"{row.name}\n→ {row.note}")
    table.add_row(
        Text("pass", style="green") if row.passed else Text("FAIL", style="bold red"),
        title,
        Text(row.oracle),
        f"{row.difference:.2g}",
        f"<= {row.bound:.2g}",
        f"{row.seconds:.1f} s",
    )
    out.print(table)
