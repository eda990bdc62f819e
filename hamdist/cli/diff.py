"""`hamdist diff`: the first tick at which two runs differ."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from hamdist.cli.console import console, exit_codes, report
from hamdist.errors import FAILED

SHOWN = 5
_Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of --out, or digests.json.")]


def diff(first: _Run, second: _Run) -> None:
    """Tell where two runs part (with engine.digests=true). Exit code 0: equal, 1: they part."""
    with exit_codes():
        from hamdist.study.report.digests_diff import compared

        results = compared(first, second)
        parts = {name: list(map(asdict, found)) for name, found in results.items()}
        report(equal=not any(parts.values()), runs=parts)
        for name, found in results.items():
            lines = [str(one) for one in found[:SHOWN]]
            lines += [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
            head = f"{name}: " if len(results) > 1 else ""
            console().print(Text(f"{head}equal" if not found else head + "\n".join(lines)))
    if any(results.values()):
        raise typer.Exit(FAILED)
