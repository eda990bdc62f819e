"""Signals against their formulas, and against the targets of the golden files."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hamdist.config import SignalKind, StreamSettings
from hamdist.errors import SettingsError
from hamdist.streams import SignalStream, Stream, make_stream

GOLDEN = Path(__file__).parents[2] / "golden"
F64 = torch.float64


def signal(kind: SignalKind, **options: float) -> SignalStream:
    return SignalStream(kind, dtype=F64, **options)


@pytest.mark.parametrize(
    ("kind", "options", "z"),
    [
        (SignalKind.SINUSOID, {}, lambda t: 0.6 * math.sin(t)),
        (SignalKind.OFFSET, {}, lambda t: 0.5 + 0.3 * math.sin(t)),
        (
            SignalKind.OFFSET,
            {"amplitude": 2.0, "offset": -1.0, "period": 0.5, "tau": 0.01},
            lambda t: -1.0 + 2.0 * math.sin(4.0 * math.pi * t),
        ),
    ],
)
def test_formula(kind, options, z) -> None:
    stream = signal(kind, **options)
    tau = options.get("tau", 1e-3)
    for n, item in enumerate(islice(stream.samples(), 500)):
        assert item.time == n * tau
        assert (item.y.shape, item.y.dtype) == ((1, 1), F64)
        assert item.y.item() == pytest.approx(z(n * tau), abs=1e-12)
        assert torch.equal(item.u, torch.zeros(1, 1, dtype=F64))
    assert stream.jumps(500) == ()


def test_golden_target() -> None:
    golden = np.load(GOLDEN / "tracking_A_bias_sin.npz")
    stream = signal(SignalKind.SINUSOID)
    assert np.abs(stream.values(1000).numpy() - golden["z"]).max() < 1e-15
    times = [item.time for item in islice(stream.samples(), 1000)]
    assert np.abs(np.array(times) - golden["t"]).max() < 1e-15


OPTIONS = {"amplitude": 2.0, "offset": 1.0, "period": 3.0, "tau": 0.1, "dwell": 0.8, "seed": 4}


class TestPatches:
    def patches(self, kind: SignalKind) -> list[torch.Tensor]:
        z = signal(kind, **OPTIONS).values(800) - 1.0
        return list(z.split(8))

    def test_constants(self) -> None:
        levels = []
        for patch in self.patches(SignalKind.CONSTANTS):
            assert (patch == patch[0]).all()
            levels.append(patch[0].item())
        assert all(a != b for a, b in pairwise(levels))
        assert -2.0 <= min(levels) < -1.0
        assert 1.0 < max(levels) <= 2.0

    def test_constants_and_cosines(self) -> None:
        for k, patch in enumerate(self.patches(SignalKind.PATCHED)):
            if k % 2 == 0:
                assert (patch == patch[0]).all()
                continue
            # v cos(w j tau) obeys z_{j+1} + z_{j-1} = 2 cos(w tau) z_j with one w for the patch
            v = patch[0].item()
            assert 1.0 <= abs(v) <= 2.0
            turn = torch.acos((patch[1] / v).clamp(-1, 1)).item()
            assert 3.0 / 2.0 - 1e-9 <= 2.0 * math.pi * 0.1 / turn <= 3.0 + 1e-9
            expected = [v * math.cos(j * turn) for j in range(8)]
            assert patch.tolist() == pytest.approx(expected, abs=1e-9)

    def test_jumps_are_where_patches_begin(self) -> None:
        stream = signal(SignalKind.PATCHED, **OPTIONS)
        assert stream.jumps(25) == (8, 16, 24)

    def test_only_the_seed_decides(self) -> None:
        def values(seed: int) -> torch.Tensor:
            return signal(SignalKind.PATCHED, **{**OPTIONS, "seed": seed}).values(64)

        assert torch.equal(values(1), values(1))
        assert not torch.equal(values(1), values(2))


def test_from_settings() -> None:
    settings = StreamSettings.model_validate(
        {"source": "signal", "signal": {"kind": "offset", "amplitude": 0.1, "tau": 0.5}}
    )
    assert settings.batch == 1
    stream = make_stream(settings, seed=0, dtype=F64)
    assert isinstance(stream, Stream)
    assert stream.portable
    z = [0.5 + 0.1 * math.sin(0.5 * n) for n in range(9)]
    assert [item.y.item() for item in islice(stream.samples(), 9)] == pytest.approx(z)


def test_the_target_leads_the_input() -> None:
    """Of whole samples: 0.2 s are 2 of 0.1 s, across the patches."""
    made = signal(SignalKind.PATCHED, tau=0.1, dwell=0.5, lead=0.2)
    z = signal(SignalKind.PATCHED, tau=0.1, dwell=0.5).values(14).tolist()
    samples = list(islice(made.samples(), 12))
    assert [s.u.item() for s in samples] == z[:12]
    assert [s.y.item() for s in samples] == z[2:14]


def test_a_signal_has_one_row() -> None:
    with pytest.raises(ValueError, match="a signal has one row"):
        StreamSettings.model_validate({"source": "signal", "batch": 4})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"amplitude": 0.0}, "amplitude is 0.0"),
        ({"period": math.inf}, "period is inf"),
        ({"tau": -1.0}, "tau is -1.0"),
        ({"offset": math.nan}, "offset is nan"),
        ({"tau": 0.5, "dwell": 0.4}, "dwell is 0.4 s and tau is 0.5 s"),
        ({"tau": 0.5, "lead": 0.4}, "lead is 0.4 s and tau is 0.5 s"),
    ],
)
def test_refused(options, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        signal(SignalKind.PATCHED, **options)
