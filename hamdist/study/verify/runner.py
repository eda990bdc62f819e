"""Runs the checks of `hamdist verify`, topic by topic, and turns each into a row."""

from __future__ import annotations

import importlib
import json
import math
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hamdist.errors import SettingsError
from hamdist.runtime.process.threads import torch_threads
from hamdist.study.verify.oracles import golden
from hamdist.study.verify.oracles.check import FAULTS, Check, Difference, failure, reason

# Each is a module of `topics`, or in MODULES, with a function checks(full).
TOPICS = {
    "golden": "golden files",
    "hamilton": "Hamilton's equations",
    "backpropagation": "levels backprop, pipeline",
    "gradient-descent": "gradient descent recovered (HL Appendix E)",
    "bptt": "backpropagation through time",
    "delay-free": "predictions without delay (HL Eq. 10)",
    "reversible": "the reversible midpoint rule",
    "digraphs": "graphs with cycles",
    "tracking": "the tracker of NILP",
    "lq": "the time reversal of the costate (NILP)",
    "late-labels": "labels that come late",
    "speed": "from local to backpropagation",
    "engines": "one process and Ray",
}
MODULES = {"golden": "oracles.golden", "hamilton": "oracles.tick_golden"}
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@dataclass(frozen=True, slots=True)
class Topic:
    """A group of checks, which are made one by one; `answers`: notes are shown for passed ones,
    too.
    """

    name: str
    title: str
    checks: Callable[[bool], Generator[Check, None, None]]
    answers: bool = False


@dataclass(frozen=True, slots=True)
class VerifyRow:
    """The result of a check.

    Attributes:
        difference: NaN if it could not be measured.
        note: of a failure, where the difference is, or why there is none; of a topic with
            `answers`, the answer.
    """

    topic: str
    name: str
    oracle: str
    difference: float
    bound: float
    passed: bool
    seconds: float
    note: str = ""


def topics(only: Sequence[str], folder: Path | None) -> list[Topic]:
    """Return the topics named in `only` (none: all, or with a folder the golden files alone).

    Golden files come from `folder`. Raises SettingsError for an unknown name, and for a folder
    without golden files.
    """
    wrong = [name for name in only if name not in TOPICS]
    if wrong:
        raise SettingsError(
            f"--only {wrong[0]!r} is no topic of verify; topics: {', '.join(TOPICS)}"
        )
    if folder is not None and not only:
        only = ["golden"]
    if folder is not None and "golden" not in only:
        raise SettingsError(f"--golden '{folder}': --only leaves the topic golden out; add it")
    chosen = [name for name in TOPICS if name in only or not only]
    paths = golden.files(folder or golden.shipped()) if "golden" in chosen else []
    return [Topic(name, TOPICS[name], partial(_checks_of, name, paths)) for name in chosen]


def _checks_of(topic: str, paths: Sequence[Path], full: bool) -> Generator[Check, None, None]:
    # Only now: a topic may need what takes seconds to import.
    name = MODULES.get(topic, f"topics.{topic.replace('-', '_')}")
    module: Any = importlib.import_module(f"hamdist.study.verify.{name}")
    checks: Iterator[Check] = module.checks(*([full, paths] if topic == "golden" else [full]))
    yield from checks


def run(
    chosen: Iterable[Topic], full: bool, starting: Callable[[Topic, Check], None]
) -> Iterator[VerifyRow]:
    """Run the checks, and yield each row as soon as it is known; `starting` is called before each.

    An exception of a check is the reason of its failure; only Ctrl-C ends the run.
    """
    # Small networks: more threads would wait for each other. What settings are warned of, the
    # checks mean to do.
    with torch_threads(1), warnings.catch_warnings(), _noticing_interrupts() as interrupted:
        warnings.simplefilter("ignore")
        for topic in chosen:
            with closing(_checks(topic, full)) as checks:
                for check in checks:
                    starting(topic, check)
                    row = _row(topic, check)
                    if interrupted():
                        raise KeyboardInterrupt
                    yield row


@contextmanager
def _noticing_interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True if a signal has come that ends a command. A run inside a
    check handles the first one itself, and ends early as if nothing had failed. Outside the main
    thread signals are not seen."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

    def interrupted() -> bool:
        try:
            return not ENDING.isdisjoint(reading.recv(4096))
        except BlockingIOError:
            return False

    try:
        yield interrupted
    finally:
        signal.set_wakeup_fd(before)
        reading.close()
        writing.close()


def _checks(topic: Topic, full: bool) -> Generator[Check, None, None]:
    """Yield the topic's checks; if they cannot be made, one that says so."""
    try:
        with closing(topic.checks(full)) as checks:
            yield from checks
    except FAULTS as error:
        yield failure(f"{topic.title}: the checks can be made", error)


def _row(topic: Topic, check: Check) -> VerifyRow:
    begin = time.perf_counter()
    try:
        measured = check.measure()
    except FAULTS as error:
        measured = Difference(math.nan, reason(error))
    difference = measured if isinstance(measured, Difference) else Difference(float(measured), "")
    passed = difference.difference <= check.bound  # never for NaN
    return VerifyRow(
        topic=topic.name,
        name=check.name,
        oracle=check.oracle,
        difference=difference.difference,
        bound=check.bound,
        passed=passed,
        seconds=time.perf_counter() - begin,
        note=difference.where if topic.answers or not passed else "",
    )


def to_json(rows: Iterable[VerifyRow]) -> str:
    """Return {"rows": [{"name", "oracle", "difference", "bound", "passed"}]}.

    A row may have a "note". A difference that is no finite number is null.
    """
    entries = []
    for row in rows:
        entry: dict[str, Any] = {
            "name": f"{row.topic}: {row.name}",
            "oracle": row.oracle,
            "difference": row.difference if math.isfinite(row.difference) else None,
            "bound": row.bound,
            "passed": row.passed,
        }
        if row.note:
            entry["note"] = row.note
        entries.append(entry)
    return json.dumps({"rows": entries}, indent=1, allow_nan=False)
