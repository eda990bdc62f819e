"""The tracker of NILP, and how well a run follows its target.

Oracles: the tracker's equations written out in numpy (golden README, section 4), closed forms for
the error, the stream for its own jumps.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.config import ModelKind, ModelSettings, PartitionSettings, Settings, SignalKind
from hamdist.dynamics.blocks.energy import Records
from hamdist.errors import SettingsError
from hamdist.models.build import make_model, make_tracker
from hamdist.models.tracker import tracker
from hamdist.streams.sample import SampleSpec, TargetSpec
from hamdist.streams.sources.signals import SignalStream
from hamdist.study.report.save import record_figures
from hamdist.study.report.table import run_facts
from hamdist.study.run.baseline import CENTRALISED
from hamdist.study.run.measures import (
    advice,
    follow,
    jumps,
    records_npz,
    seconds,
    signals,
    tracking,
)
from hamdist.study.run.run import run_level
from hamdist.study.shared.recipes import load_settings
from hamdist.study.view.page import data_script

F64 = torch.float64
VALUES = SampleSpec((1, 1), F64, (1, 1), F64)
PURE = {"model": {"bias": False}, "dynamics": {"eta": 70}}
OFFSET = {"stream": {"signal": {"kind": "offset"}}}


def recipe(steps: int, *overrides: dict) -> Settings:
    settings = load_settings("tracking", [{"steps": steps}, *overrides])
    return settings.for_level(settings.level)


def numpy_tracker(settings: Settings, order: str = "simultaneous") -> tuple[np.ndarray, np.ndarray]:
    """x_1 and |p| at each tick."""
    d, n, bias = settings.dynamics, settings.model.width, settings.model.bias
    tau, eta, q, r_w, r = d.tau, d.eta, d.phi, d.weight_cost, 1 / d.beta
    block = tracker(n, bias=bias, seed=settings.seed, dtype=F64).blocks["x"]
    W = block.module[0].weight.detach().numpy()
    if bias:
        W = np.concatenate([W, block.module[0].bias.detach().numpy()[:, None]], axis=1)
    x = np.zeros(n) if block.initial is None else block.initial.numpy()
    p, P, one = np.zeros(n), np.zeros_like(W), np.ones(int(bias))
    signal = settings.stream.signal
    z = SignalStream(signal.kind, tau=signal.tau, seed=settings.seed).values(settings.steps)
    s, course = d.sign, []
    for target in z.numpy():
        course.append((x[0], np.linalg.norm(p)))
        v = np.concatenate([x, one])
        o = np.tanh(W @ v)
        op = (1 - o * o) * p
        error = np.zeros(n)
        new = x + tau * d.c * (o - x)
        error[0] = (new if order == "sequential" else x)[0] - target
        p_new = p + tau * (-s * (q * error - d.c * p + d.c * W[:, :n].T @ op) - eta * p)
        if order == "sequential":
            op = (1 - o * o) * p_new
        P_new = P + tau * (-s * (r_w * W + d.c * np.outer(op, v)) - eta * P)
        W = W - tau * (P_new if order == "sequential" else P) / r
        x, p, P = new, p_new, P_new
    xs, ps = np.array(course).T
    return xs, ps


@pytest.mark.parametrize(
    ("overrides", "order"),
    [([], "simultaneous"), ([OFFSET, PURE], "simultaneous"), ([], "sequential")],
    ids=["bias", "pure", "sequential"],
)
def test_recipe_is_the_equations(overrides, order):
    settings = recipe(600, *overrides, {"locality": {"order": order}})
    run, _ = run_level(settings)
    reads = run.records["x"]
    shift = order == "sequential"  # there the prediction of tick k is x_{k+1}
    expected = numpy_tracker(settings, order)[0][shift:]
    found = reads.prediction[: len(expected), 0, 0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    assert float(reads.theta_norm.std()) > 1e-2


def test_it_follows_the_sinusoid():
    """1.4 % of the rms (equations.md) once it has settled."""
    run, _ = run_level(recipe(2500))
    y, target = (
        t[:2500, 0].numpy() for t in (run.records["x"].prediction, run.records["x"].target)
    )
    values = SignalStream(dtype=F64).values(2500).numpy()[:, None]
    np.testing.assert_array_equal(target, values)
    rms = 0.6 / 2**0.5
    assert np.sqrt(np.mean((y - values)[1500:] ** 2)) / rms < 0.02
    # No held-out part: neither scores nor an interruption.
    assert (run.held_out, run.interrupted, run.failure) == (None, False, None)


def test_the_model_is_the_same_however_it_is_cut():
    whole = tracker(5, bias=True, seed=4, dtype=F64)
    other = tracker(5, bias=True, seed=5, dtype=F64).blocks["x"].module[0].weight
    weight = whole.blocks["x"].module[0].weight.detach()
    assert weight.shape == (5, 5)
    assert not torch.equal(weight, other)
    for blocks in (2, 5):
        cut = tracker(5, bias=True, seed=4, dtype=F64, blocks=blocks)
        assert cut.readouts == ["x0"]
        assert len(cut.edges) == blocks**2
        parts = [b.module[0].weight.detach() for b in cut.blocks.values()]
        assert torch.equal(torch.cat(parts), weight)
    assert float(weight.std()) == pytest.approx(1 / 5, rel=0.5)
    pure = tracker(5, bias=False, seed=4, dtype=F64).blocks["x"]
    assert pure.module[0].bias is None
    assert float(pure.module[0].weight.detach().mean()) == pytest.approx(1.3 / 5, abs=0.05)
    assert torch.equal(pure.initial, torch.full((5,), 0.7, dtype=F64))


def test_models_that_cannot_be():
    three = ModelSettings(kind=ModelKind.TRACKER, width=3)

    def make(spec=VALUES, **partition):
        return make_tracker(three, spec, PartitionSettings(**partition), seed=0, dtype=F64)

    assert list(make(blocks=3).blocks) == ["x0", "x1", "x2"]
    assert [e.delay for e in make(delay=4).edges] == [4]
    with pytest.raises(SettingsError, match=r"3 neurons \(model.width\).*1 to 3 slices"):
        make(blocks=4)
    with pytest.raises(SettingsError, match="no modules to cut at"):
        make(cuts=("a",))
    several = SampleSpec.several((1, 1), F64, {"x": TargetSpec((1, 1), F64)})
    classes = SampleSpec((1, 1), F64, (1,), torch.int64, classes=2)
    for spec in (several, classes, dataclasses.replace(VALUES, y_shape=(1, 2))):
        with pytest.raises(SettingsError, match="follows one real value.*stream.source signal"):
            make(spec)
    with pytest.raises(SettingsError, match="a tracker has no input and no layers"):
        make_model(three, VALUES, seed=0, dtype=F64)
    with pytest.raises(SettingsError, match="no centralised training of a tracker"):
        run_level(recipe(10), baseline=CENTRALISED)


# -- how well a target is followed ---------------------------------------------------------------


def wave(n: int = 1000) -> np.ndarray:
    return np.sin(np.linspace(0, 20, n))[:, None]


def test_shares():
    target = np.full((1000, 1), 2.0)
    y = target.copy()
    y[:100] += 0.2
    y[-100:] -= 0.4
    found = follow(y, target, None)
    assert found.rms == 2.0
    assert found.first == pytest.approx(0.1)
    assert found.last == pytest.approx(0.2)
    assert found.share == pytest.approx(np.sqrt((0.1**2 + 0.2**2) / 10))
    assert (found.settled, found.jumps) == (None, 0)
    assert follow(1.1 * wave(), wave(), None).share == pytest.approx(0.1)
    assert follow(y, np.zeros_like(target), None) is None


def test_what_lies_outside_jumps():
    times = np.arange(1000) / 64  # 0.3 s are 20 entries
    target = np.where(times < 4, 1.0, -1.0)[:, None]
    inside = (times < 0.3) | ((times >= 4) & (times < 4.3))
    y = target + np.where(inside, 0.5, np.where(times < 4, 0.1, 0.2))[:, None]
    found = follow(y, target, times)
    assert found.jumps == 1
    before, behind = 256 - 20, 744 - 20
    mean = (before * 0.1**2 + behind * 0.2**2) / (before + behind)
    assert found.settled == pytest.approx(np.sqrt(mean))
    assert found.share > found.settled
    assert follow(y, target, None).settled is None


@pytest.mark.parametrize("kind", list(SignalKind))
def test_jumps_are_those_of_the_stream(kind):
    stream = SignalStream(kind, tau=1e-2, dwell=2.0, seed=3)
    values = stream.values(3000).numpy()[:, None]
    size = np.sqrt(np.mean(values**2))
    # Patches may begin near where the one before them ended.
    wanted = [j for j in stream.jumps(3000) if abs(values[j] - values[j - 1])[0] > 0.05 * size]
    assert jumps(values).tolist() == wanted
    assert (len(wanted) > 5) == (kind in (SignalKind.PATCHED, SignalKind.CONSTANTS))


def test_what_is_no_jump():
    noisy = np.random.default_rng(0).normal(size=(500, 1))
    assert jumps(noisy).tolist() == []
    assert jumps(np.repeat(wave(100), 10, axis=0)).tolist() == []  # held for ten ticks each
    small = np.where(np.arange(500) < 250, 1.0, 1.04)[:, None]
    assert jumps(small).tolist() == []
    assert jumps(small + 0.1 * (small > 1)).tolist() == [250]
    assert jumps(np.ones((1, 1))).tolist() == []


def test_seconds():
    ticks = np.array([0.0, 1.0, 2.0, 5.0])

    def of(**dynamics):
        settings = Settings.model_validate({"level": "local", "dynamics": dynamics})
        return seconds(ticks, settings)

    np.testing.assert_allclose(of(tau=0.5), [0, 0.5, 1, 2.5])
    uneven = {"values": [1.0, 0.25]}
    np.testing.assert_allclose(of(tau=uneven, c=1), [0, 1, 1.25, 2])
    np.testing.assert_allclose(of(tau={**uneven, "cycle": True}, c=1), [0, 1, 1.25, 3.5])
    assert of(tau="stamps", c=1, beta=1, phi=1, eta=1) is None


def entries(**trajectory) -> Records:
    numbers = torch.arange(6, dtype=F64)
    return Records(
        torch.arange(6), numbers, numbers, 2 * numbers, 3 * numbers, numbers, **trajectory
    )


def test_signals():
    y, target = torch.randn(6, 2, 3), torch.randn(6, 2, 3, dtype=F64)
    target[2] = torch.nan  # a tick without a loss
    ticks, found, wanted = signals(entries(prediction=y, target=target))
    assert ticks.tolist() == [0, 1, 3, 4, 5]
    rows = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(found, y[rows].reshape(5, 6).double().numpy())
    np.testing.assert_array_equal(wanted, target[rows].reshape(5, 6).numpy())
    assert signals(entries()) is None
    assert signals(entries(prediction=y, target=torch.zeros(6, 2))) is None  # classes
    assert signals(entries(prediction=y, target=torch.full_like(y, torch.nan))) is None
    real = entries(prediction=torch.ones(6, 1, 1), target=torch.full((6, 1, 1), 2.0))
    mse = Settings.model_validate({"level": "local", "loss": "mse"})
    assert tracking({"a": entries(), "y": real}, mse).share == pytest.approx(0.5)
    assert tracking({"a": entries(), "y": real}, Settings(level="local")) is None
    assert tracking({}, mse) is None


# -- what to know beforehand ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sinusoid", "patched", "constants"])
def test_without_a_bias_a_target_through_zero_is_warned_of(kind):
    target = {"stream": {"signal": {"kind": kind}}}
    (text,) = advice(recipe(10, PURE, target))
    assert "neurons without a bias cannot leave zero" in text
    assert "model.bias true" in text
    assert advice(recipe(10, target)) == []


def test_no_advice():
    assert advice(recipe(10)) == []
    assert advice(recipe(10, PURE, OFFSET)) == []
    assert len(advice(recipe(10, PURE, OFFSET, {"stream": {"signal": {"offset": 0.2}}}))) == 1
    assert advice(Settings.model_validate({"model": {"bias": False}})) == []


def test_two_times_are_warned_of():
    (text,) = advice(recipe(10, {"stream": {"signal": {"tau": 0.01}}}))
    assert "stands for 0.01 s (stream.signal.tau), but lasts 0.001 s for the network" in text
    held = {"stream": {"signal": {"tau": 0.01}}, "locality": {"speed": 10}}
    assert advice(recipe(10, held)) == []


def test_without_a_bias_it_dies_on_a_target_through_zero():
    """What the advice says, by the equations: h and W fall to zero."""
    settings = recipe(6000, PURE)
    end = numpy_tracker(settings)[0][-100:]
    assert abs(end).max() < 1e-3


# -- the command ---------------------------------------------------------------------------------


def command(*arguments: str):
    return CliRunner().invoke(app, ["run", "tracking", *arguments])


@pytest.mark.parametrize("blocks", [1, 5])
def test_files(tmp_path: Path, blocks):
    out = tmp_path / "out"
    done = command("--steps", "100", "--set", f"partition.blocks={blocks}", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "% of the target's rms (first tenth" in done.output
    summary = json.loads((out / "summary.json").read_text())
    assert "records" not in summary
    with np.load(out / "records.npz", allow_pickle=False) as file:
        data = dict(file)
    readout = "x" if blocks == 1 else "x0"
    y, target = data[f"{readout}.prediction"][:, 0, 0], data[f"{readout}.target"][:, 0, 0]
    share = np.sqrt(np.mean((y - target) ** 2) / np.mean(target**2))
    assert summary["tracking"]["share"] == pytest.approx(share, rel=1e-12)
    # NILP's L, H and H' from the states and weights of all blocks
    names = ["x"] if blocks == 1 else [f"x{i}" for i in range(5)]
    K = len(data["tick"])
    np.testing.assert_allclose(data["seconds"], 1e-3 * np.arange(K))
    cost = sum(0.5 * data[f"{n}.theta_norm"][:K] ** 2 for n in names)
    loss = 50 * (y - target)[:K] ** 2
    kinetic, work = (sum(data[f"{n}.{part}"][:K] for n in names) for part in ("kinetic", "work"))
    assert kinetic[-1] > 0
    np.testing.assert_allclose(data["lagrangian"], loss + cost + kinetic, rtol=1e-9)
    np.testing.assert_allclose(data["robust_hamiltonian"], loss + cost + work, rtol=1e-9)
    hamiltonian = loss + cost + work - kinetic
    np.testing.assert_allclose(data["hamiltonian"], hamiltonian, rtol=1e-9, atol=1e-12)
    assert data[f"{readout}.h"].shape == (len(y), 1, 5 // blocks)
    assert "Target and output" in (out / "records.html").read_text()


def test_the_original_sign_blows_up(tmp_path: Path):
    out = tmp_path / "out"
    _, sizes = numpy_tracker(recipe(200, {"dynamics": {"sign": 1}}))
    tick = int(np.flatnonzero(sizes > 1e12)[0])  # dynamics.limit
    done = command("--set", "dynamics.sign=1", "--out", str(out))
    assert done.exit_code == 1
    words = f"Error: block 'x' failed at tick {tick}: z left the finite range"
    assert words in done.stderr
    assert "sign s = +1 is the original Hamilton equations" in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["failure"].startswith(f"block 'x' failed at tick {tick}: z")
    assert summary["held_out"] is None
    weights = load_file(out / "model.safetensors")
    assert all(t.isfinite().all() for t in weights.values())
    start = tracker(5, bias=True, seed=0, dtype=F64).blocks["x"].module[0].weight
    assert any(t.shape == (5, 5) and not torch.equal(t, start) for t in weights.values())
    with np.load(out / "records.npz", allow_pickle=False) as data:
        assert len(data["tick"]) == tick
    assert (out / "records.html").exists()


def test_warnings_come_first_and_once(tmp_path: Path):
    done = command(
        *("--steps", "20", "--set", "dynamics.eta=2", "--set", "model.bias=false"),
        *("--out", str(tmp_path)),
    )
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "summary.json").read_text())["warnings"]
    for words in ("below 2K/c = 6.73 1/s", "neurons without a bias cannot leave zero"):
        assert done.stderr.count(words) == 1
        assert sum(words in text for text in kept) == 1
    assert "UserWarning" not in done.stderr


def test_levels_that_need_an_acyclic_graph_are_refused():
    done = command("--level", "trace", "--set", "metrics.record=null")
    assert done.exit_code == 2
    assert "presentation 'hold'" in done.stderr


def test_many_edges_are_summed_up():
    run, _ = run_level(recipe(30, {"partition": {"blocks": 5}}))
    assert run_facts(run)["KiB per edge and sample"].startswith("0.4 on 26 edges, at most 0.0 (")


# -- plots ---------------------------------------------------------------------------------------


def test_plots_of_what_was_recorded():
    numbers = dict(run_level(recipe(40))[0].records)
    settings = recipe(40)
    titles = lambda *given: [figure.title for figure in record_figures(*given)]  # noqa: E731
    energies = ["Energy of all blocks", "Norm of the weights"]
    assert titles(numbers, settings)[:3] == [*energies, "Target and output"]
    only = {n: dataclasses.replace(r, prediction=None, target=None) for n, r in numbers.items()}
    assert titles(only, settings) == energies
    classes = settings.model_copy(update={"loss": "cross-entropy"})
    assert titles(numbers, classes) == energies
    assert titles({}, settings) == []
    assert records_npz(only, settings)


@pytest.mark.parametrize("value", [0.0, 1e11, float("inf"), float("nan")])
def test_plots_of_odd_numbers(value):
    """Nothing but zeros, a run that blew up, values that are no numbers."""
    flat = torch.full((6,), value, dtype=F64)
    flat[:3] = 0.0
    y = flat.reshape(6, 1, 1)
    record = Records(torch.arange(6), *[flat] * 5, prediction=y, target=torch.zeros(6, 1, 1))
    settings = recipe(10)
    text = data_script(figures=record_figures({"x": record, "y": record}, settings))
    data = json.loads(text.split(">", 1)[1].rsplit("<", 1)[0])  # (strict JSON: no NaN)
    assert len(data["figures"]) == 4
    assert "NaN" not in text
    assert "Infinity" not in text
