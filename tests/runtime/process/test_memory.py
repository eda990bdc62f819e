"""The peak counts what was allocated since the reset, and nothing before."""

from __future__ import annotations

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
