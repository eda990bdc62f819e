"""Arguments, environment, Markdown and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.figures import Row, Spread

PACKAGES = "torch", "ray", "pyzmq", "numpy"
BUSY = 0.5  # load from which timings are not to be trusted
CPU_INFO = Path("/proc/cpuinfo")


def parser(text: str | None, quick: str) -> argparse.ArgumentParser:
    """--quick, --json, --repeats, --seconds: what all benchmarks take."""
    made = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--json", type=Path, metavar="FILE", help="writes rows and environment")
    made.add_argument("--repeats", type=_positive, help="turns of each side")
    made.add_argument("--seconds", type=_seconds, help="seconds of each turn")
    return made


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: seconds above 0")
    return number


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment(**more: Any) -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "load": os.getloadavg()[0],
        **more,
    }


def processor() -> str:
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def figure(found: Spread | None, factor: float = 1e6) -> str:
    """`1,158 (1,120–1,190)`: median and quartiles, of seconds in microseconds."""
    if found is None:
        return ""
    shown = found.scaled(factor)
    form = _form(shown.median)
    if shown.number == 1:
        return form(shown.median)
    return f"{form(shown.median)} ({form(shown.low)}–{form(shown.high)})"


def _form(size: float) -> Any:
    digits = 0 if abs(size) >= 100 else 1 if abs(size) >= 1 else 3
    return lambda value: f"{value:,.{digits}f}"


def ratio(row: Row) -> str:
    return "–" if row.ratio is None else f"{row.ratio:.2f}"


def targets(rows: Sequence[Row]) -> str:
    """The table of ratios against their targets."""
    lines = []
    for row in rows:
        sides = [f"{name} {figure(found)}" for name, found in row.medians.items()]
        verdict = f"**{row.verdict}**" if row.reached is False else row.verdict
        target = "" if row.target is None else str(row.target)
        lines.append([row.name, ", ".join(sides), ratio(row), target, verdict])
    return table(["what", "medians, µs (quartiles)", "ratio", "target", ""], lines)


def profiles(rows: Sequence[Row]) -> str:
    """Why the missed ones are missed; those that sum up others do not say it again."""
    missed = [row for row in rows if row.reached is False and "of" not in row.configuration]
    return "\n".join(f"- {row.name}: {row.profile or 'no profile'}" for row in missed)


def busy() -> str:
    """What to say where others are at work, too; nothing where they are not."""
    load = os.getloadavg()[0]
    if load < BUSY:
        return ""
    return f"**Others are at work here (load {load:.1f}): do not trust these timings.**"


def write(path: Path | None, rows: Sequence[Row], known: Mapping[str, Any]) -> None:
    """The JSON file, if one was asked for."""
    if path is not None:
        found = {"rows": [row.as_dict() for row in rows], "environment": dict(known)}
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
