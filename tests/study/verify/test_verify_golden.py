"""Golden files never seen before, and files that are wrong.

Oracles: `oracles.replay` (autograd of H' on the whole network), itself held against the shipped
files of the independent numpy implementation; for the tracker the equations of the golden README,
written down here in numpy.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose
from study.verify.oracles import (
    CHAIN,
    LOOPS,
    UNEVEN,
    WAVING,
    make_case,
    replay,
    shipped_cases,
)

from hamdist.config import Moves
from hamdist.dynamics.schedule.hold import HoldSchedule
from hamdist.errors import SettingsError
from hamdist.study.verify.oracles import golden, tick_golden
from hamdist.study.verify.oracles.check import Difference

TICK_FILES = [p for p in golden.files(golden.shipped()) if golden.kind_of(golden.read(p)) == "tick"]
TRAJECTORIES = ("h", "z", "om", "th")


def measured(check):
    found = check.measure()
    return found if isinstance(found, Difference) else Difference(found, "")


def results(path, data):
    """Name and whether it passes, of every check of a file with the entries `data`."""
    np.savez(path, **data)
    return [(c.name, measured(c).difference <= c.bound) for c in golden.file_checks(path)]


# -- the oracle against the independent files ------------------------------------------------------


@pytest.mark.parametrize("path", TICK_FILES, ids=lambda p: p.stem)
def test_the_oracle_of_unseen_files_reproduces_the_shipped_ones(path):
    data = golden.read(path)
    again = replay(data)
    keys = [k for k in data if k.partition(".")[0] in TRAJECTORIES] + ["y", "L", "Hp"]
    for key in keys:
        assert_allclose(again[key], data[key], rtol=1e-9, atol=1e-11, err_msg=key)


def test_the_oracle_made_the_files_of_autograd():
    made = shipped_cases()
    assert {p.stem for p in (golden.shipped() / "autograd").iterdir()} == set(made)
    for stem, entries in made.items():
        data = golden.read(golden.shipped() / "autograd" / f"{stem}.npz")
        assert data.keys() == entries.keys()
        for key, value in entries.items():
            if value.dtype.kind != "U":
                assert_allclose(data[key], value, rtol=1e-9, atol=1e-11, err_msg=f"{stem} {key}")


# -- unseen tick files -----------------------------------------------------------------------------

ORDERS = ("simultaneous", "omega_first", "sequential")
GROUPS = (
    ("l1", ("u",), ((6, "tanh"), (5, "linear"), (4, "tanh"))),
    ("l2", ("l1", "u"), ((4, "tanh"), (2, "linear"))),
)
DEEP = (*CHAIN[:2], ("l3", ("l2",), ((3, "tanh"),)), ("l4", ("l3",), ((2, "linear"),)))
IDENTITY = (("l3",), ())


def one_by_one(ticks, nu):
    return np.equal.outer(np.arange(ticks) % nu, np.arange(nu)).astype(float)


def unseen(order):
    """Cases of every kind that the golden README describes, by name."""
    mask = np.random.default_rng(9).integers(2, size=(12, 3)).astype(float)
    small = {"inputs": 3, "order": order, "seed": 21}
    return {
        "lag": make_case(CHAIN, IDENTITY, ticks=15, held=3, tau=(0.25,), c=1.2, phi=(0.7,),
                         **small),
        "loops": make_case(LOOPS, (("D", "u", "C"), ((3, "tanh"), (2, "linear"))), ticks=12,
                           batch=2, tau=(0.2,), c=1.5, **small),
        "joined": make_case(LOOPS, (("D", "u", "A"), ()), ticks=12, batch=3, **small),
        "only the input": make_case(CHAIN, (("l3", "u"), ()), ticks=15, **small),
        "uneven": make_case(CHAIN[:2], (("l2",), ((3, "linear"),)), ticks=12, batch=3, loss="ce",
                            tau=UNEVEN, phi=WAVING, c=1.1, beta=(0.1, 0.02, 0.3, 0.0), **small),
        "state, cross-entropy": make_case(CHAIN, IDENTITY, ticks=12, batch=2, loss="ce", **small),
        "groups": make_case(GROUPS, (("l2",), ()), ticks=12, tau=(0.5,), c=2.0, **small),
        "sign": make_case(CHAIN, IDENTITY, ticks=10, s=1, **small),
        "mask": make_case(CHAIN, IDENTITY, ticks=12, mask=mask, **small),
        "mask, output net": make_case(CHAIN, (("l3",), ((2, "linear"),)), ticks=12, mask=mask,
                                      **small),
        "delay-free": make_case(DEEP, (("l4",), ()), ticks=20, held=4, tau=(0.5,), c=2.0,
                                mask=one_by_one(20, 4), **small),
        "delay-free, broken off": make_case(DEEP, (("l4",), ()), ticks=18, held=4, tau=(0.5,),
                                            c=2.0, mask=one_by_one(18, 4), **small),
        "delay-free, output net": make_case(DEEP, (("l4",), ((2, "linear"),)), ticks=20, held=4,
                                            tau=(0.5,), c=2.0, mask=one_by_one(20, 4), **small),
        "delay-free, a sample a tick": make_case(DEEP, (("l4",), ()), ticks=20, tau=(0.5,), c=2.0,
                                                 mask=one_by_one(20, 4), **small),
        "one node": make_case((("l1", ("u",), ((2, "tanh"),)),), (("l1",), ()), ticks=12, **small),
        "at rest": make_case(LOOPS, (("D",), ()), ticks=12, rest=True, **small),
    }  # fmt: skip


def some():
    """Every kind, in one order or in all of them."""
    all_orders = ("loops", "uneven", "mask, output net", "delay-free")
    for i, kind in enumerate(unseen("sequential")):
        for order in ORDERS if kind in all_orders else (ORDERS[i % 3],):
            yield kind, order


@pytest.mark.parametrize(("kind", "order"), list(some()))
def test_unseen_tick_files(tmp_path, order, kind):
    data = replay(unseen(order)[kind])
    (row,) = results(tmp_path / "anything.npz", data)
    assert row == ("anything.npz: every tick (relative)", True)


@pytest.mark.parametrize("order", ORDERS)
def test_what_converges_on_a_static_input(tmp_path, order):
    """bp_* as in static_convergence, by autograd."""
    case = make_case(
        DEEP, (("l4",), ()), inputs=3, ticks=14, held=14, seed=3, order=order, tau=(0.5,), c=2.0,
        eta=0.0, beta=(0.0,), phi=(0.6,),
    )  # fmt: skip
    data = {**replay(case), **backpropagated(case)}
    rows = results(tmp_path / "static.npz", data)
    assert [passed for _, passed in rows] == [True, True]
    data["bp_delta.l2"] = data["bp_delta.l2"] + 1e-6
    assert [passed for _, passed in results(tmp_path / "static.npz", data)] == [True, False]


def backpropagated(case):
    import torch

    x = torch.tensor(case["u"][0])
    theta = {k: torch.tensor(a[0]).requires_grad_() for k, a in case.items() if k[:3] == "th."}
    states = {}
    for name, _, ((_, activation),) in DEEP:
        x = x @ theta[f"th.{name}.0.W"].T + theta[f"th.{name}.0.b"]
        x = states[name] = torch.tanh(x) if activation == "tanh" else x
        x.retain_grad()
    loss = 0.5 * (x - torch.tensor(case["yhat"][0])).square().sum()
    loss.backward()
    made = {f"bp_h.{k}": h.detach().numpy() for k, h in states.items()}
    made |= {f"bp_delta.{k}": h.grad.numpy() for k, h in states.items()}
    return made | {f"bp_grad.{k[3:]}": t.grad.numpy() for k, t in theta.items()}


ENTRIES = ["h.l2", "z.l1", "om.l2.0.W", "th.l3.0.b", "y", "L", "Hp", "phi", "c", "eta", "tau"]


@pytest.mark.parametrize("key", ENTRIES)
def test_a_wrong_entry_turns_the_row_red(tmp_path, key):
    data = replay(make_case(CHAIN, IDENTITY, inputs=3, ticks=12, seed=2, order="sequential"))
    changed = data[key].copy()
    changed[(-1,) * changed.ndim if key not in ("tau", "phi") else 3] += 1e-6
    ((_, passed),) = results(tmp_path / "wrong.npz", {**data, key: changed})
    assert not passed


@pytest.mark.parametrize("key", ["beta", "order", "s"])
def test_a_wrong_setting_turns_the_row_red(tmp_path, key):
    data = replay(make_case(CHAIN, IDENTITY, inputs=3, ticks=12, seed=2, order="sequential"))
    other = {"beta": 0.11, "order": "omega_first", "s": 1}[key]
    ((_, passed),) = results(tmp_path / "wrong.npz", {**data, key: np.array(other)})
    assert not passed


def test_nan_fails_and_says_where(tmp_path):
    data = replay(make_case(CHAIN, IDENTITY, inputs=3, ticks=12, seed=2))
    data["z.l2"][7] = np.nan
    np.savez(tmp_path / "nan.npz", **data)
    (check,) = golden.file_checks(tmp_path / "nan.npz")
    found = measured(check)
    assert np.isnan(found.difference)
    assert found.where == "z.l2 at k = 7"


# -- unseen tracking files -------------------------------------------------------------------------

ACTS = {
    "tanh": (np.tanh, lambda o: 1 - o * o),
    "linear": (lambda a: a, np.ones_like),
}


def tracker(order, act, bias, n=5, s=-1, steps=80, tau=0.001, c=300.0, eta=20.0):
    """Section 4 of the golden README, literally."""
    random = np.random.default_rng(5)
    f, slope = ACTS[act]
    q, r_w, r = 100.0, 1.0, 0.1
    z = 0.5 + 0.3 * np.sin(2 * np.pi * tau * np.arange(steps))
    x, p = 0.1 * random.normal(size=n), np.zeros(n)
    W = 0.3 * random.normal(size=(n, n + bias))
    P = np.zeros_like(W)
    kept = {key: [] for key in ("x", "p", "W", "P", "L", "H", "Hrobust")}
    first = {"x0": x, "W0": W}
    for k in range(steps):
        v = np.append(x, 1.0) if bias else x
        o = f(W @ v)
        d = slope(o)
        xdot = c * (o - x)
        e = x[0] - z[k]
        cost = q / 2 * e * e + r_w / 2 * (W * W).sum()
        kinetic = (P * P).sum() / (2 * r)
        for key, value in (
            ("x", x),
            ("p", p),
            ("W", W),
            ("P", P),
            ("L", cost + kinetic),
            ("H", cost - kinetic + p @ xdot),
            ("Hrobust", cost + p @ xdot),
        ):
            kept[key].append(value)  # fmt: skip
        x_after = x + tau * xdot
        seen = x_after[0] if order == "sequential" else x[0]
        own = q * (seen - z[k]) * np.eye(n)[0]
        p_after = p + tau * (-s * (own - c * p + c * W[:, :n].T @ (d * p)) - eta * p)
        used = p_after if order == "sequential" else p
        P_after = P + tau * (-s * (r_w * W + c * np.outer(d * used, v)) - eta * P)
        W = W - tau * (P if order == "simultaneous" else P_after) / r
        x, p, P = x_after, p_after, P_after
    snap = np.array([0, 1, 17, steps // 2, steps - 1])
    scalars = {"tau": tau, "c": c, "eta": eta, "q": q, "r_w": r_w, "r": r, "s": s}
    return {
        **first, **scalars, "z": z, "act": act, "order": order, "bias": bool(bias), "snap": snap,
        **{key: np.array(kept[key]) for key in ("x", "p", "L", "H", "Hrobust")},
        **{key: np.array(kept[key])[snap] for key in ("W", "P")},
        "x_end": x, "p_end": p, "W_end": W, "P_end": P,
    }  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"order": "sequential", "act": "tanh", "bias": 0},
        {"order": "sequential", "act": "tanh", "bias": 1},
        {"order": "simultaneous", "act": "linear", "bias": 1, "n": 3, "steps": 60},
        {"order": "omega_first", "act": "tanh", "bias": 1, "n": 4, "steps": 60},
        {"order": "simultaneous", "act": "tanh", "bias": 0, "s": 1, "steps": 20},
    ],
    ids=str,
)
def test_unseen_tracking_files(tmp_path, options):
    rows = results(tmp_path / "tracking_C.npz", tracker(**options))
    assert [passed for _, passed in rows] == [True, True, True], rows


@pytest.mark.parametrize("key", ["x", "p", "W", "P", "L", "H", "Hrobust", "x_end", "P_end"])
def test_a_wrong_entry_of_a_tracking_file_turns_a_row_red(tmp_path, key):
    data = tracker("sequential", "tanh", 1, n=2, steps=60)
    data["snap"], data["W"], data["P"] = (data[name][:3] for name in ("snap", "W", "P"))
    changed = data[key].copy()
    changed[(-1,) * changed.ndim] += 1e-6
    rows = results(tmp_path / "wrong.npz", {**data, key: changed})
    assert not all(passed for _, passed in rows), rows


# -- files that are not understood -----------------------------------------------------------------


def wrong_files():
    """Entries of files that are wrong, and what their row says."""
    good = replay(make_case(CHAIN, IDENTITY, inputs=3, ticks=6, seed=2))
    spec = json.loads(str(good["spec"]))
    sines = json.loads(str(good["spec"]).replace('"tanh"', '"sine"', 1))
    lost = {k: a for k, a in good.items() if k != "order"}
    late = {k: a for k, a in good.items() if k != "h.l2"}
    return {
        "nothing": ({}, "those of no kind"),
        "another": ({"a": np.zeros(3), "b": np.ones(2)}, "(a, b, ...) are those of no kind"),
        "objects": ({**good, "u": np.array([{}, None])}, "plain arrays"),
        "lost": (lost, "entry 'order' is missing"),
        "late": (late, "entry 'h.l2' is missing"),
        "order": ({**good, "order": np.array("random")}, "entry 'order' is 'random'; known: simul"),
        "loss": ({**good, "loss": np.array("hinge")}, "entry 'loss' is 'hinge'; known: mse, ce"),
        "spec": ({**good, "spec": np.array("no json")}, "JSONDecodeError"),
        "sine": ({**good, "spec": np.array(json.dumps(sines))}, "activation 'sine'; known: tanh"),
        "parent": (
            {**good, "spec": np.array(json.dumps({**spec, "out": [["l9"], []]}))},
            "KeyError: 'l9'",
        ),
        "shape": (
            {**good, "th.l1.0.W": np.zeros((7, 2, 2))},
            "th.l1.0.W' has shape (7, 2, 2), not",
        ),
        "ticks": ({**good, "phi": good["phi"][:3]}, "entry 'phi' has shape (3,), not (6,)"),
        "mask": ({**good, "mask_node": np.full((6, 3), 0.5)}, "something else than 0 and 1"),
        "fast": ({**good, "c": np.array(99.0)}, "c tau"),
    }


@pytest.mark.parametrize("name", wrong_files())
def test_a_file_that_is_not_understood_is_one_red_row_with_the_reason(tmp_path, name):
    from hamdist.study.verify import runner

    data, reason = wrong_files()[name]
    path = tmp_path / f"{name}.npz"
    np.savez(path, **data)
    topic = runner.Topic("golden", "", lambda full: golden.checks(full, [path]))
    (row,) = runner.run([topic], False, lambda _, check: None)
    assert not row.passed
    assert row.name.startswith(f"{name}.npz")
    assert reason in row.note


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"text, no archive"])
def test_a_file_that_is_no_archive(tmp_path, content):
    path = tmp_path / "torn.npz"
    path.write_bytes(content)
    (check,) = golden.file_checks(path)
    assert check.name.startswith("torn.npz: not understood: not an .npz file of plain arrays")
    with pytest.raises(SettingsError):
        check.measure()


def test_folders_without_golden_files(tmp_path):
    with pytest.raises(SettingsError, match="no .npz file in this folder"):
        golden.files(tmp_path)
    with pytest.raises(SettingsError, match="cannot read this folder"):
        golden.files(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("kind", "c"), [("delay-free", 4), ("delay-free, output net", 1), ("mask", 1), ("lag", 1)]
)
def test_the_mask_of_eq_10_runs_by_the_knobs_and_no_other_does(kind, c):
    ticks = tick_golden.read_ticks(replay(unseen("simultaneous")[kind]))
    _, plan, _, settings = tick_golden._planned(ticks)
    assert plan.schedule.c == c
    assert (settings.locality.moves is Moves.LAYER_BY_LAYER) == (c > 1)
    assert (type(plan.schedule) is HoldSchedule) == (kind in ("delay-free", "lag"))
