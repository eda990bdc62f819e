"""Documented contract: snapshots of every released format are gone on from.

Oracle: the run that was never stopped, of today's code (float64; equal to 1e-9, for the files were
written on another machine).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runtime.snapshots.released import CASES, run

FORMATS = sorted((Path(__file__).parents[2] / "snapshots").iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_a_run_goes_on_from_what_it_wrote(folder, case, tmp_path):
    whole = run(case)
    on = run(case, resume=folder / case, snapshots={"path": str(tmp_path), "every": 1000})
    assert not any("weights and its place in the stream" in text for text in on.warnings)
    assert on.samples == whole.samples
    pairs = zip(on.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in pairs)
    assert on.resumed > 0
