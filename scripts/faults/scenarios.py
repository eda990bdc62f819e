#!/usr/bin/env python
"""Runs what is done to a run on purpose, scenario by scenario, and prints which of them it survives.

    python scripts/faults/scenarios.py [NAME ...] [--json FILE]

Each scenario is a set of tests, which compare with the undisturbed run; those of a joined cluster's
head need some minutes. Exit code 1 where one fails, or where a name is unknown.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900
# name: what is done, and the tests that do it.
SCENARIOS = {
    "full-disk": ("a disk that is full, or becomes so", "runtime/storage/test_stores.py -k disk"),
    "failing-store": ("a store that fails, with errors of its own", "runtime/storage/test_stores.py -k a_store_that"),
    "foreign-files": ("files and links of others among snapshots", "runtime/storage/test_stores.py -k 'links or only'"),
    "kept-signals": ("signals kept while no snapshot is complete", "runtime/snapshots/test_keeping.py -k 'keeps or failures or too_much'"),
    "two-runs": ("two runs, one folder of snapshots", "runtime/storage/test_claims.py -k 'second_run or another_host or renewed or overwritten'"),
    "another-stream": ("a resumed run with another stream", "runtime/storage/test_claims.py -k 'another_stream or from_what'"),
    "damaged-snapshot": ("snapshots damaged or gone, before and during a run", "runtime/snapshots/test_snapshots.py runtime/ray_engine/test_going_back.py -k 'cut_off or altered or go_back or enough or driver or read_once'"),
    "earlier-formats": ("snapshots of earlier formats", "runtime/snapshots/test_released.py"),
    "graphs": ("a hand-built graph that goes on", "runtime/storage/test_claims.py -k a_graph"),
    "signals": ("Ctrl-C, SIGTERM, on_progress that stops or fails", "runtime/process/test_interrupts.py"),
    "head": ("the head of a joined cluster dies", "-m hosts hosts/test_head_raylets.py -k dies"),
    "leftovers": ("folders of killed runs", "runtime/process/test_leftovers.py"),
    "hanging-block": ("a block that hangs in its module", "runtime/ray_engine/test_failures.py -k watchdog"),
    "at-once": ("two runs that start at once on one cluster", "-m hosts hosts/test_head_raylets.py -k once"),
    "session": ("a second run in one process; a Ray that died, before a run or in it", "runtime/ray_engine/test_session.py"),
}  # fmt: skip


def outcome(tests: str) -> tuple[str, float]:
    """Run the tests of a scenario.

    Returns:
        'survived', 'failed' or 'nothing ran', and seconds.
    """
    began = time.perf_counter()
    arguments = [f"tests/{word}" if "/" in word else word for word in shlex.split(tests)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--timeout", "300", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    seconds = time.perf_counter() - began
    return {0: "survived", 5: "nothing ran"}.get(run.returncode, "failed"), seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SCENARIOS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(SCENARIOS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(SCENARIOS)}")
    rows = []
    for name in arguments.names or SCENARIOS:
        what, tests = SCENARIOS[name]
        ended, seconds = outcome(tests)
        rows.append({"name": name, "what": what, "outcome": ended, "seconds": round(seconds, 1)})
        sys.stdout.write(f"{name:18} {ended:12} {seconds:6.1f} s  {what}\n")
        sys.stdout.flush()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["outcome"] != "survived" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
