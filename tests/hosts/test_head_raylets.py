"""A joined cluster whose head dies, and one that two runs want at once. Oracle: one process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(240)]

HEAD = Path(__file__).with_name("head.py")


def run(*arguments: str) -> str:
    paths = [str(Path(__file__).parents[1]), *(path for path in sys.path if path)]
    with tempfile.TemporaryDirectory(prefix="hr-", dir="/tmp") as folder:
        done = subprocess.run(
            [sys.executable, str(HEAD), *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=220,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_head_that_dies_ends_the_run_with_its_result(tmp_path):
    said, _, facts = run("lost", str(tmp_path)).partition(" | ")
    assert "the head of the Ray cluster at" in said
    assert said.endswith(f"go on from the latest snapshot: --resume {tmp_path}")
    equal, snapshots = facts.split(" ", 1)
    assert equal == "True"
    assert str(tmp_path) in snapshots


def test_two_runs_that_start_at_once_both_run():
    assert run("together") == "40 2 40 2"
