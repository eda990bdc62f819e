"""`hamdist verify`: every statement against an independent oracle."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hamdist.cli.console import OUTPUT, console, exit_codes, report
from hamdist.cli.options import given
from hamdist.cli.prepare import STANDARD_OUTPUT, prepare_file
from hamdist.errors import FAILED, SettingsError

if TYPE_CHECKING:
    from hamdist.study.verify.oracles.check import Check
    from hamdist.study.verify.runner import Topic, VerifyRow

ROWS = 4  # of the input of a model of one's own


def verify(
    full: Annotated[bool, typer.Option("--full", help="The papers' sizes (half an hour).")] = False,
    golden: Annotated[
        Path | None,
        typer.Option("--golden", metavar="DIR", help="Folder of golden files (.npz), instead."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="TOPIC", help="One topic (repeatable).")
    ] = None,
    json_: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the rows there; -: print them alone."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="FILE.py:FUNCTION",
            help="Verify the module that this function makes, and nothing else.",
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option("--rule", metavar="FILE.py:NAME", help="Verify this rule, and nothing else."),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option("--input-shape", metavar="3,28,28", help="Of --model, without the batch."),
    ] = None,
    classes: Annotated[
        int | None, typer.Option("--classes", min=2, help="Of --model: targets are classes.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Of --model: rows.", show_default="4")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option("--blocks", min=1, help="Of --model: into how many blocks.")
    ] = None,
) -> None:
    """Prove it: every statement of the papers against an oracle of its own."""
    with exit_codes():
        of_model = {"input-shape": input_shape, "classes": classes, "batch": batch}
        if rule is not None and (model or golden or only):
            raise SettingsError(f"--rule {rule!r} is verified alone: leave the others out")
        _check_options(model, {**of_model, "blocks": blocks}, {"golden": golden, "only": only})
        if json_ == STANDARD_OUTPUT:
            OUTPUT.as_json, json_ = True, None
        prepare_file(json_)
        if rule is not None:
            chosen = [_own_rule(rule)]
        elif model is None:
            chosen = _topics(only or [], golden)
        else:
            chosen = [_own_model(model, input_shape, classes, batch or ROWS, blocks)]
        _verify(chosen, full, json_)


def _check_options(model: str | None, of_model: dict[str, Any], of_topics: dict[str, Any]) -> None:
    """Raise SettingsError for an option without effect."""
    if model is None and given(of_model):
        raise SettingsError(f"--{next(iter(given(of_model)))} belongs to --model: give both")
    if model is not None and given(of_topics):
        raise SettingsError(
            f"--{next(iter(given(of_topics)))} chooses among the checks of hamdist, but --model "
            f"{model!r} is verified alone: give one of them"
        )


def _topics(only: list[str], golden: Path | None) -> list[Topic]:
    from hamdist.study.verify.runner import topics

    names = [name.strip() for text in only for name in text.split(",") if name.strip()]
    return topics(names, golden)


def _own_rule(name: str) -> Topic:
    from hamdist.study.verify.runner import Topic
    from hamdist.study.verify.topics.rule import VerifiedRule

    own = VerifiedRule(name)
    return Topic("rule", f"the rule {name}", lambda full: own.checks(), answers=True)  # noqa: ARG005


def _own_model(
    name: str, input_shape: str | None, classes: int | None, batch: int, blocks: int | None
) -> Topic:
    from hamdist.models.build import load_factory
    from hamdist.study.verify.runner import own_model_topic
    from hamdist.study.verify.topics.own_model import VerifiedModel, parse_shape

    if input_shape is None:
        raise SettingsError(
            f"--model {name!r}: say what it takes as well, without the batch: --input-shape 3,28,28"
        )
    shape = parse_shape(input_shape)
    return own_model_topic(VerifiedModel(load_factory(name), name, shape, classes, batch, blocks))


def _verify(chosen: list[Topic], full: bool, json_: Path | None) -> None:
    """Print a row for each check as soon as it has run; exit code 1 if one failed."""
    from hamdist.study.verify.runner import run as run_checks
    from hamdist.study.verify.runner import to_json

    begin = time.monotonic()
    out = console()
    rows: list[VerifyRow] = []
    status = out.status("") if out.is_terminal else None
    told = ""

    def starting(topic: Topic, check: Check) -> None:
        nonlocal told
        if told != topic.name:
            out.print(Text(f"\n{topic.title} ({topic.name})", style="bold"))
        told = topic.name
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
    what = Text(row.name) if not row.note else Text(f"{row.name}\n→ {row.note}")
    table.add_row(
        Text("pass", style="green") if row.passed else Text("FAIL", style="bold red"),
        what,
        Text(row.oracle),
        f"{row.difference:.2g}",
        f"<= {row.bound:.2g}",
        f"{row.seconds:.1f} s",
    )
    out.print(table)
