"""Oracle: trajectories from an independent numpy implementation (tests/golden, float64).

The files are run by the harness of `hamdist verify`; tests/study/verify/test_verify_golden.py tries
it on files of its own, right ones and wrong ones.
"""

from __future__ import annotations

import pytest

from hamdist.study.verify.oracles.golden import (
    KINDS,
    RTOL,
    file_checks,
    files,
    kind_of,
    read,
    shipped,
)

FILES = files(shipped())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_trajectory(path):
    for check in file_checks(path):
        found = check.measure()
        difference = getattr(found, "difference", found)
        assert check.bound <= RTOL
        assert difference <= check.bound, (check.name, found)


def test_every_kind_of_golden_file_is_here():
    names = [path.name for path in FILES]
    for order in ("simultaneous", "omega_first", "sequential"):
        assert any(order in name for name in names)
    for kind in ("layered", "grouped", "digraph", "delayfree", "static"):
        assert any(name.startswith(kind) for name in names)
    assert {kind_of(read(path)) for path in FILES} == set(KINDS)
