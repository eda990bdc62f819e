"""The lighter test of several hosts, which needs no root: raylets that share one network stack.
Oracle: the in-process engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(180)]

RAYLETS = Path(__file__).with_name("raylets.py")
TWO = {"actors": 2, "blocks": {"block[01]": {"host": "host1"}, "block[234]": {"host": "host0"}}}


def test_equal_to_the_bit_on_two_raylets():
    cases = [("local", TWO), ("trace", TWO), ("trace", {**TWO, "transport": "ipc"})]
    paths = [str(Path(__file__).parents[1]), *(path for path in sys.path if path)]
    with tempfile.TemporaryDirectory(prefix="hr-", dir="/tmp") as folder:
        done = subprocess.run(
            [sys.executable, str(RAYLETS), folder, "2", json.dumps(cases)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=150,
        )
    lines = [line for line in done.stdout.splitlines() if ": " in line]
    assert lines[:2] == ["local: equal on 2 actors", "trace: equal on 2 actors"], done.stderr
    assert "crosses hosts" in lines[2]
