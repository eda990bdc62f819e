"""Rules, losses and types of a user's own. Oracles: torch.optim.SGD, figures by hand."""

from __future__ import annotations

import copy
import json
import threading

import numpy as np
import pytest
import torch
from dynamics.helpers import F64, relative
from runtime.engines.test_engines_equal import assert_equal
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

import hamdist
from hamdist.cli import app
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.dynamics.rules.names import HOMES, built_in
from hamdist.errors import BlockError, GraphError, SettingsError
from hamdist.models.build import make_from_factory
from hamdist.study.verify import runner
from hamdist.study.verify.oracles import golden

HERE = {"kind": "inprocess"}
FACTS = ("crosses", "keeps", "space", "time", "phase", "cost", "source")


def items(many=10, dtype=torch.float32):
    random = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(4, 6, generator=random, dtype=F64).to(dtype),
            torch.randint(3, (4,), generator=random),
        )
        for _ in range(many)
    ]


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def learned(model=None, data=None, **fields):
    fields = {"level": "backprop", "classes": 3, "learning": {"lr": 0.1}, "engine": HERE, **fields}
    return hamdist.train(model or net(), data or items(), **fields)


# -- dtype -----------------------------------------------------------------------------------------


def test_dtype_is_that_of_weights_and_stream():
    result = learned(dtype="float64")
    model = net().double()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for u, y in items():
        optimiser.zero_grad()
        functional.cross_entropy(model(u.double()), y).backward()
        optimiser.step()
    assert {p.dtype for p in result.model.parameters()} == {F64}
    assert relative(result.model.parameters(), model.parameters()) <= 1e-12
    back = learned(net().double(), items(dtype=F64), dtype="float32")
    assert {p.dtype for p in back.model.parameters()} == {torch.float32}
    assert {p.dtype for p in learned(net().double(), items(dtype=F64)).model.parameters()} == {F64}


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.w = nn.Linear(6, 3), nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))

    def forward(self, x):
        return (self.a(x).to(self.w.dtype) @ self.w).abs()


def test_complex_weights_stay_complex():
    """Oracle: the same run, all of it in that type before."""
    model = Complex()
    cast = learned(copy.deepcopy(model), dtype="float64").model
    assert (cast.a.weight.dtype, cast.w.dtype) == (F64, torch.complex128)
    by_hand = copy.deepcopy(model)
    by_hand.a.double()
    by_hand.w.data = by_hand.w.data.to(torch.complex128)
    assert torch.equal(
        learned(by_hand, items(dtype=torch.float32), dtype="float64").model.w, cast.w
    )
    assert torch.equal(learned(model, dtype="float32").model.w, learned(model).model.w)
    made = make_from_factory(Complex, seed=0, dtype=torch.float32)  # as commands do
    assert made.w.is_complex()
    with pytest.raises(SettingsError, match="complex64 alone"):
        make_from_factory(Complex, seed=0, dtype=F64)


def test_dtype_on_both_engines(session):
    alone = learned(dtype="float64", level="trace")
    spread = learned(dtype="float64", level="trace", engine={"kind": "ray", "actors": 2})
    assert_equal(alone, spread)
    assert {p.dtype for p in spread.model.parameters()} == {F64}


def test_dtype_of_a_graph_is_its_own():
    graph = hamdist.Graph([hamdist.BlockSpec("y", nn.Linear(6, 3), ("u",), loss=cross_entropy)])
    with pytest.raises(SettingsError, match="the Graph has weights of another type"):
        learned(graph, dtype="float64")


# -- losses ----------------------------------------------------------------------------------------


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.ones(()))

    def forward(self, p, y):
        return functional.cross_entropy(p * self.t, y)


TEMPERED = Tempered()


@pytest.mark.parametrize(
    "loss", [TEMPERED, TEMPERED.forward, lambda p, y: TEMPERED(p, y)], ids=["module", "method", "f"]
)
def test_weights_of_a_loss_are_named(loss):
    with pytest.warns(UserWarning, match="t of a Tempered"):
        result = learned(loss=loss)
    assert "weights of its own" in str(result.warnings)


def test_a_weight_alone_is_named_too():
    scale = nn.Parameter(torch.ones(3))
    result = learned(loss=lambda p, y: functional.cross_entropy(p * scale, y))
    assert "weights of its own, which are not learned: a tensor of shape (3,)" in str(
        result.warnings
    )


class Centred(nn.Module):
    """Keeps a mean of the predictions, and the number of its calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.calls = 0

    def forward(self, p, y):
        self.calls += 1
        self.mean += 0.1 * (p.detach().mean(0) - self.mean)
        return functional.cross_entropy(p - self.mean, y)


def test_every_run_has_a_copy_of_a_loss_with_state(tmp_path):
    """Oracle: the same loop in torch."""
    model, own = net(), Centred()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for u, y in items():
        optimiser.zero_grad()
        own(model(u), y).backward()
        optimiser.step()
    loss = Centred()
    first, again = learned(loss=loss), learned(loss=loss)
    assert relative(first.model.parameters(), model.parameters()) < 1e-6
    assert_equal(first, again)
    assert (loss.calls, float(loss.mean.norm())) == (0, 0)
    learned(loss=loss, steps=4, snapshots={"path": str(tmp_path), "every": 2})
    with pytest.warns(UserWarning, match="going on from"):
        assert_equal(first, learned(loss=loss, resume=tmp_path))


@pytest.mark.parametrize("level", ["trace", "heads"])
def test_a_loss_with_state_on_both_engines(session, level):
    loss = Centred()
    alone = learned(loss=loss, level=level)
    spread = learned(loss=loss, level=level, engine={"kind": "ray", "actors": 2})
    assert_equal(alone, spread)


def test_a_loss_that_cannot_be_copied_is_used_itself():
    loss = Centred()
    loss.lock = threading.Lock()
    learned(loss=loss)
    assert loss.calls == len(items())


def test_a_loss_may_write_to_the_prediction():
    by_hand = learned(loss=lambda p, y: functional.cross_entropy(2 * p, y))
    assert_equal(by_hand, learned(loss=lambda p, y: functional.cross_entropy(p.mul_(2), y)))


@pytest.mark.parametrize(
    ("loss", "warned"),
    [
        (lambda p, y: (p - y).square().mean(), True),
        (lambda p, y: (p[:, 0] - y).square().mean(), False),
        (lambda p, y: functional.binary_cross_entropy_with_logits(p.flatten(), y.sigmoid()), False),
    ],
)
def test_a_column_and_a_row_that_broadcast_are_told(loss, warned):
    data = [(u, u[:, 0]) for u, _ in items()]
    result = learned(nn.Sequential(nn.Linear(6, 1)), data, loss=loss, classes=None)
    assert ("broadcasts them" in str(result.warnings)) == warned


@pytest.mark.parametrize(
    ("loss", "warned"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), True),
        (lambda p, y: functional.cross_entropy(p, y, reduction="sum"), True),
        (nn.CrossEntropyLoss(), False),
        (lambda p, y: functional.cross_entropy(p, y) + 0.1, False),
        (lambda p, y: functional.multi_margin_loss(p, y).sqrt(), False),
        (lambda p, y: functional.nll_loss(p.log_softmax(1), y, reduction="sum") / len(y), False),
    ],
)
def test_a_loss_that_adds_up_rows_is_told(loss, warned):
    assert ("adds up rows" in str(learned(loss=loss).warnings)) == warned


CALLS = []


def test_a_loss_that_keeps_what_it_is_called_with_is_called_by_samples_alone():
    def of_a_closure(p, y):
        del kept[:0]
        return of_a_global(p, y)

    def of_a_global(p, y):
        CALLS.append(len(y))
        return functional.cross_entropy(p, y, reduction="sum")

    kept = []
    for loss in (of_a_global, of_a_closure):
        CALLS.clear()
        learned(loss=loss)
        assert len(CALLS) == len(items())


STEPS, WARMTH = [0], 1.0


def test_a_loss_that_changes_a_global_is_told():
    def warmed(p, y):
        STEPS[0] += 1
        return functional.cross_entropy(p, y) * min(1.0, STEPS[0] / 5)

    def warm(p, y):
        return WARMTH * functional.cross_entropy(p, y) * (STEPS[0] > 0)

    assert "the loss has changed what it refers to" in str(learned(loss=warmed).warnings)
    assert "has changed" not in str(learned(loss=warm).warnings)
    assert "has changed" not in str(learned(loss=Centred()).warnings)


def test_a_loss_may_refer_to_a_name_that_has_no_value_yet():
    def loss(p, y):
        return functional.cross_entropy(p, y) if len(y) else later

    assert not learned(loss=loss).warnings
    later = None


def test_a_loss_without_weights_is_not():
    result = learned(loss=nn.CrossEntropyLoss(weight=torch.ones(3)))
    assert "weights of its own" not in str(result.warnings)


class Two(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h), h


def test_outputs_that_share_a_target():
    with pytest.raises(GraphError, match=r"output 'out1' .* 3 classes.*loss="):
        learned(Two(5))
    with pytest.warns(UserWarning, match=r"'out0', 'out1' are all learned; leave one out"):
        both = learned(Two(3))
    assert {"out0", "out1"} <= set(both.windows)
    one = learned(Two(5), loss={"out0": "cross-entropy"})
    assert "all learned" not in str(one.warnings)
    assert list(one.windows) == ["out0"]


@pytest.mark.parametrize("made", [lambda y: y - 0.5, lambda y: y * 2])
def test_real_numbers_are_no_probabilities(made):
    data = [(u, made(functional.one_hot(y, 3).float())) for u, y in items()]
    with pytest.raises(BlockError, match=r"takes probabilities .* use the loss 'mse'"):
        learned(data=data, classes=None)
    learned(data=data, classes=None, loss="mse")


def test_probabilities_are_learned():
    data = [(u, functional.one_hot(y, 3) * 0.9 + 0.1 / 3) for u, y in items()]
    assert learned(data=data, classes=None).samples == 10


# -- compare ---------------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn

class Zero(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, g):
        return 0 * g

class Rule(nn.Module):
    def forward(self, x):
        return Zero.apply(x)

def fails():
    raise ValueError("no weights")

def layers(*between):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *between, nn.Linear(16, 10))

def make():
    return layers(Rule(), nn.ReLU())

def plain():
    return layers(nn.Identity(), nn.ReLU())

def wider():
    return layers(nn.ReLU())

def too_wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(65, 10))

def too_few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
"""


def compared(tmp_path, user_file, *options):
    file = user_file(OWN)
    options = [o.replace("nets.py", file) for o in options]
    arguments = ["compare", "digits", "--model", f"{file}:make", "--levels", "backprop"]
    arguments += ["--steps", "60", "--engine", "inprocess", "--out", "out", *options]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    files = [p for p in (tmp_path / "out").iterdir() if p.suffix in (".json", ".html")]
    text = "".join(p.read_text() for p in files)
    runs = json.loads(next(p for p in files if p.suffix == ".json").read_text())
    return done.output, text, runs


def test_compare_names_a_rule_of_the_models_own(tmp_path, user_file):
    output, text, _ = compared(tmp_path, user_file)
    for written in (output, text):
        assert "a rule of its own (Zero, an autograd.Function)" in written
        assert "--baseline-model" in written


def test_compare_with_a_plain_module(tmp_path, user_file):
    output, text, _ = compared(tmp_path, user_file, "--baseline-model", "nets.py:plain")
    for written in (output, text):
        assert "of another module, a Sequential" in written
        assert "with 4 of its 4 tensors" in written
        assert "a rule of its own" not in written
    output, _, _ = compared(tmp_path, user_file, "--baseline-model", "nets.py:wider")
    assert "with 2 of its 4 tensors taken from the model; its own are 3.weight, 3.bias" in output


RULE = """
import hamdist

class Mine(hamdist.Rule):
    on_readout = True

    def backward(self, block, kept, message):
        messages, g = block.vjp(kept, message)
        return messages, {name: 0 * t for name, t in g.items()}
"""


@pytest.mark.slow
def test_compare_rules(tmp_path, monkeypatch):
    """A rule that moves nothing, beside levels and built-in ones; the baseline learns as ever."""
    monkeypatch.chdir(tmp_path)
    file = f"rules_{tmp_path.name}.py"
    (tmp_path / file).write_text(RULE)
    arguments = ["compare", "digits", "--steps", "40", "--engine", "inprocess", "--out", "out"]
    names = f"backprop,kolen-pollack,{file}:Mine"
    done = CliRunner().invoke(app, [*arguments, "--rules", names])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out/summary.json").read_text())["rows"]
    held = {row["level"]: row["held_out_accuracy"] for row in rows}
    assert list(held) == ["centralised", *names.split(",")]
    assert held["backprop"] == held["centralised"] > 0.5
    assert held["kolen-pollack"] > 0.5
    assert held[f"{file}:Mine"] < 0.25
    again = CliRunner().invoke(app, [*arguments, "--rules", names])  # all are kept: at once
    assert again.exit_code == 0, again.output
    (tmp_path / file).write_text(RULE.replace("0 * t", "t"))
    wrong = CliRunner().invoke(app, [*arguments, "--rules", "trace", "--levels", "trace"])
    assert wrong.exit_code == 2
    assert "--levels and --rules: give one" in wrong.output
    for names, said in (
        ("trae", "is no rule"),
        (",", "nothing"),
    ):
        wrong = CliRunner().invoke(app, [*arguments, "--rules", names])
        assert wrong.exit_code == 2
        assert said in wrong.output


def test_rules_are_listed_as_they_are():
    done = CliRunner().invoke(app, ["rules", "--json"])
    listed = json.loads(done.output)
    assert [one["name"] for one in listed] == list(HOMES)
    for one in listed:
        assert set(one) == {"name", *FACTS}
        assert all(one.values())
        rule = built_in(one["name"])
        sends_none = rule.signals.back != "message"
        assert one["crosses"].startswith("nothing" if sends_none else "message")
        assert ("label" in one["crosses"]) == rule.signals.label
    shown = CliRunner().invoke(app, ["rules"]).output
    assert all(name in shown for name in HOMES)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails", "no weights"),
        ("gone", "has no 'gone'"),
        ("too_wide", "--baseline-model, first sample: RuntimeError: mat1"),
        ("too_few", "IndexError: Target"),
    ],
)
def test_errors_of_the_baselines_module_name_its_option(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    file = f"nets_{tmp_path.name}.py"
    (tmp_path / file).write_text(OWN)
    arguments = ["compare", "digits", "--levels", "backprop", "--steps", "2", "--out", "out"]
    arguments += ["--engine", "inprocess", "--baseline-model", f"{file}:{name}"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "Error: --baseline-model" in done.output
    assert said in done.output
    assert "Traceback" not in done.output


# -- golden files ----------------------------------------------------------------------------------


def rows_of(path):
    topic = runner.Topic("golden", "", lambda full: golden.checks(full, [path]))
    return list(runner.run([topic], False, lambda _, check: None))


@pytest.mark.parametrize("kind", ["tracking_A_bias_sin", "layered3_sequential"])
def test_the_tolerance_of_a_file_is_its_entry(tmp_path, kind):
    data = dict(np.load(golden.shipped() / f"{kind}.npz"))
    named = tmp_path / "tracking_C.npz"
    np.savez(named, **data)
    assert {row.bound for row in rows_of(named)} == {1e-9}
    np.savez(named, **data, rtol=1e-17)
    rows = rows_of(named)
    assert {row.bound for row in rows} == {1e-17}
    assert not all(row.passed for row in rows)
    np.savez(named, **data, rtol=-1.0)
    (row,) = rows_of(named)
    assert "entry 'rtol' is -1" in row.note
    np.savez(named, **data, atol=-1.0)
    (row,) = rows_of(named)
    assert "entry 'atol' is -1" in row.note


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        ({"rtol": 1e-9}, False),
        ({"atol": 2e-3}, True),
        ({"atol": 5e-4}, False),
        ({"rtol": 1e-9, "atol": 2e-3}, True),
        ({"rtol": 1e-9, "atol": 0.0}, False),
    ],
)
def test_atol_is_numpys(tmp_path, given, passes):
    """Oracle: numpy.isclose with the entries; one number of the file is off by 1e-3."""
    data = dict(np.load(golden.shipped() / "layered3_sequential.npz"))
    data["h.l3"] = data["h.l3"].copy()
    data["h.l3"][-1, 0] += 1e-3
    tolerances = {"rtol": golden.RTOL, "atol": golden.RTOL * golden.FLOOR, **given}
    true = np.load(golden.shipped() / "layered3_sequential.npz")["h.l3"]
    assert np.isclose(true, data["h.l3"], **tolerances).all() == passes
    np.savez(tmp_path / "off.npz", **data, **given)
    assert all(row.passed for row in rows_of(tmp_path / "off.npz")) == passes


def test_activations_have_other_names(tmp_path):
    data = dict(np.load(golden.shipped() / "layered3_sequential.npz"))
    path = tmp_path / "other.npz"
    spec = str(data["spec"]).replace('"linear"', '"identity"')
    np.savez(path, **{**data, "spec": np.array(spec)})
    assert all(row.passed for row in rows_of(path))
    assert golden.ACTIVATIONS["logistic"] is golden.ACTIVATIONS["sigmoid"] is nn.Sigmoid
