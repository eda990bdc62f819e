"""`delays: auto` over a cluster of several raylets. Oracle: the in-process engine with the delays
that were chosen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
SECONDS = 100


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(SECONDS + 15)
def test_auto_over_two_raylets(leaves_no_socket):
    """Links within a host and between two, each measured; the run equals the one-process run."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.placement.raylets"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its raylets end with it, whatever happens
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
    assert process.returncode == 0, said[-4000:]
    assert said.splitlines()[-1].startswith("equal ["), said[-4000:]
