"""Oracle: the recursion of shared/golden/README.md, section 3, written out in numpy; the golden
files themselves; and, for the checks of topic `bptt`, defects that they have to find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hamdist.dynamics.blocks.sequence import SequenceBlock, WayBack
from hamdist.errors import SettingsError
from hamdist.study.verify.oracles.golden import kind_of, read
from hamdist.study.verify.topics import bptt

GOLDEN = Path(__file__).parents[2] / "golden"
FILES = sorted(GOLDEN.glob("rnn_bptt_*.npz"))


def make(n: int, r: int, *, tau: float, eta: float, phi_tau: float = 1.0, seed: int = 0) -> dict:
    """A file of the kind, for any n, r, tau, eta and an h_0 that is not zero."""
    rng = np.random.default_rng(seed)
    inputs, hidden = 3, 4
    Wx, Wh = rng.normal(size=(hidden, inputs)), rng.normal(size=(hidden, hidden)) / 2
    b, h0 = rng.normal(size=hidden), rng.normal(size=hidden)
    u, target = rng.normal(size=(n, inputs)), rng.normal(size=(n, hidden))
    phi = phi_tau / tau
    h = [h0]
    for m in range(n):
        h.append(np.tanh(Wx @ u[m] + Wh @ h[m] + b))

    def back(tau: float, phi: float, eta: float) -> tuple[list, list, list, list]:
        z, om = [np.zeros(hidden)], [[np.zeros_like(w)] for w in (Wx, Wh, b)]
        for j in range(r):
            m = n - 1 - j
            error = tau * phi * (h[m + 1] - target[m])
            carried = Wh.T @ ((1 - h[m + 2] ** 2) * z[j]) if j else 0.0
            z.append(error + carried - tau * eta * z[j])
            delta = (1 - h[m + 1] ** 2) * z[-1]
            for w, g in zip(om, (np.outer(delta, u[m]), np.outer(delta, h[m]), delta), strict=True):
                w.append(w[j] + g - tau * eta * w[j])
        return z, *om

    z, *om = back(tau, phi, eta)
    _, *gradient = back(1.0, 1.0, 0.0)
    losses = [0.5 * np.sum((h[m + 1] - target[m]) ** 2) for m in range(n)]
    data = {"u": u, "yhat": target, "h0": h0, "h": h, "z": z, "tau": tau, "phi": phi, "eta": eta}
    data |= {"r": r, "torch_loss": sum(losses)}
    for i, (key, value) in enumerate((("Wx", Wx), ("Wh", Wh), ("b", b))):
        data |= {f"th.{key}": value, f"om.{key}": om[i], f"torch_grad.{key}": gradient[i][-1]}
    return {key: np.asarray(value) for key, value in data.items()}


CASES = {
    "truncated": make(7, 3, tau=1.0, eta=0.0),
    "truncated, eta": make(7, 3, tau=0.3, eta=0.4),
    "one token": make(1, 1, tau=0.5, eta=0.2),
    "phi is not 1/tau": make(5, 5, tau=0.5, eta=0.1, phi_tau=0.7),
}


def run(data: dict, name: str) -> list:
    return [(check, check.measure()) for check in bptt.checks_of(data, name)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_files(path):
    data = read(path)
    assert kind_of(data) == "bptt"
    for check, found in run(data, path.name):
        assert found.difference <= check.bound == 1e-9, (check.name, found)


def test_the_golden_files_are_here():
    assert {p.stem for p in FILES} >= {"rnn_bptt_full", "rnn_bptt_full_tau", "rnn_bptt_eta"}


@pytest.mark.parametrize("name", CASES)
def test_files_that_nobody_has_seen(name):
    for check, found in run(CASES[name], name):
        assert found.difference <= check.bound, (check.name, found)


@pytest.mark.parametrize("key", ["h", "z", "om.Wx", "om.Wh", "om.b", "torch_grad.Wh"])
def test_a_wrong_entry_is_found(key):
    data = CASES["truncated, eta"]
    wrong = data[key].copy()
    wrong[-1] *= 1 + 1e-6
    found = run({**data, key: wrong}, "wrong")
    assert any(f.difference > check.bound and key in f.where for check, f in found)


def test_entries_that_do_not_fit():
    data = CASES["truncated"]
    with pytest.raises(SettingsError, match="'r' is 9, the sequence has 7 tokens"):
        bptt.checks_of({**data, "r": np.array(9)}, "long")
    with pytest.raises(SettingsError, match="'th.Wh' has shape"):
        bptt.checks_of({**data, "th.Wh": np.zeros((4, 3))}, "square")
    with pytest.raises(SettingsError, match="'th.Wx' has shape.*u has 2 features"):
        bptt.checks_of({**data, "u": data["u"][:, :2]}, "narrow")


# -- the checks of the topic -----------------------------------------------------------------------


def failing() -> set[str]:
    rnn = [check for check in bptt.checks(full=False) if "(RNN" in check.name]
    assert len(rnn) == 4
    return {check.name for check in rnn if not check.measure().difference <= check.bound}


def test_the_checks_pass():
    names = [check.name for check in bptt.checks(full=False)]
    assert len(names) == len(set(names)) == 14
    assert not failing()


def test_a_costate_that_forgets_the_later_token_is_found(monkeypatch):
    forgets = lambda block, messages: own(block, messages[-1:])  # noqa: E731
    own = SequenceBlock.backward
    monkeypatch.setattr(SequenceBlock, "backward", forgets)
    assert len(failing()) == 4


def test_momentum_that_is_left_out_is_found(monkeypatch):
    own = WayBack.begin

    def begin(way_back):
        way_back._momentum = 0.0
        own(way_back)

    monkeypatch.setattr(WayBack, "begin", begin)
    assert all("momentum" in name for name in failing())
    assert len(failing()) == 2
