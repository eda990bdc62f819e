"""The peak counts what was allocated since the reset, and nothing before."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from hamdist.runtime.process import usage as memory

SIZE = 64 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets its high-water mark")
def test_peak_follows_the_reset() -> None:
    block = torch.ones(SIZE, dtype=torch.uint8)
    del block
    assert memory.reset_peak()
    low = memory.peak_bytes()
    block = torch.ones(SIZE, dtype=torch.uint8)
    del block
    assert memory.peak_bytes() - low >= 0.9 * SIZE
    assert memory.reset_peak()
    assert memory.peak_bytes() - low < 0.5 * SIZE


def test_elsewhere_psutil_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "no" / "clear_refs")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert not memory.reset_peak()
    assert memory.peak_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


FAULTS = """
import resource
import torch
from hamdist.runtime.process.usage import keep_freed_memory

def make():  # as activations of two layers
    kept = [torch.ones(900_000) for _ in range(2)]
    del kept[0], kept[0]

keep_freed_memory()
for _ in range(3):
    make()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    make()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow  # (a kernel that takes idle pages away, beside other tests, makes more of them)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have other ways")
def test_freed_memory_is_kept_for_what_is_made_next() -> None:
    """(Without it glibc faults in all pages of each round, or fewer, as it has adapted itself.)"""
    of_a_round = 2 * 900_000 * 4 // resource.getpagesize()
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert int(done.stdout) < 4 * of_a_round  # of 20 rounds
