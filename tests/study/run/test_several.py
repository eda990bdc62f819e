"""Models of several inputs and outputs, and data of one's own, in runs and comparisons. Oracles:
plain loops of torch.optim.SGD; scores computed row by row."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from dynamics.architectures import TwoByTwo
from dynamics.helpers import F64, relative
from dynamics.tracing.test_any_network import BATCH, by_class, half_square, made, pairs
from torch import nn
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.config import Settings
from hamdist.dynamics.objective.losses import cross_entropy, mse
from hamdist.errors import GraphError, SettingsError, StreamError
from hamdist.runtime.results.scores import evaluate, evaluate_samples
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable
from hamdist.streams.sample import Sample
from hamdist.study.report.aggregate import aggregate
from hamdist.study.report.files import run_summary
from hamdist.study.report.table import comparison_table, run_facts
from hamdist.study.run.baseline import train_centralised
from hamdist.study.run.comparison import compare, plan
from hamdist.study.run.own_data import OwnFunctions, load_stream
from hamdist.study.run.run import run_level

STEPS, LR = 12, 0.1
LOSSES = {"kind": "cross-entropy", "angle": "mse"}
CLASSES = {"kind": 3}


def settings(**fields):
    given = {"steps": STEPS, "learning": {"lr": LR}, "dtype": "float64", "loss": LOSSES, **fields}
    return Settings.model_validate(given)


def items(first=0, many=STEPS):
    return [pairs(n) for n in range(first, first + many)]


def loop(model, data, losses):
    """SGD on the sum of the losses of the outputs that have a target; the losses by output."""
    model = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), LR)
    seen = {name: [] for name in losses}
    for u, y in data:
        known = {k: t for k, t in y.items() if t is not None and k in losses}
        if not any(t is not None for t in y.values()):
            continue
        found = model(**u)
        values = {k: losses[k](found[k], t) for k, t in known.items()}
        for name, value in values.items():
            seen[name].append(float(value.detach()))
        if values:
            optimiser.zero_grad()
            sum(values.values()).backward()
            optimiser.step()
    return model, seen


BOTH = {"kind": by_class, "angle": half_square}


@pytest.mark.parametrize("names", [("kind", "angle"), ("angle",)])
def test_centralised_and_backprop_are_sgd(names):
    """A loss by output as a setting; outputs without one are not learned."""
    model, data = made(TwoByTwo), items()
    data[3] = (data[3][0], {"kind": None, "angle": data[3][1]["angle"]})
    own = settings(level="backprop", loss={name: LOSSES[name] for name in names})
    expected, losses = loop(model, data, {name: BOTH[name] for name in names})
    assert relative(model.parameters(), expected.parameters()) > 1e-3
    for run in (train_centralised, train):
        result = run(model, from_iterable(data, classes=CLASSES), own)
        after = result.model.state_dict()
        assert relative(after.values(), expected.state_dict().values()) <= 1e-12
        assert set(result.windows) == set(names)
        for name, windows in result.windows.items():
            assert sum(w.samples for w in windows) == len(losses[name])
            assert sum(w.loss for w in windows) == pytest.approx(sum(losses[name]), rel=1e-12)
    if "kind" not in names:
        assert torch.equal(after["kind.0.weight"], model.state_dict()["kind.0.weight"])


class Tuples(nn.Module):
    """Two outputs of one input, for one target; the second one goes on from the first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        early = torch.tanh(self.a(x))
        return early, self.b(early), None


def test_one_loss_for_all_outputs_and_one_target():
    torch.manual_seed(1)
    model = Tuples().double()
    data = [(torch.randn(5, 4, dtype=F64), torch.randint(3, (5,))) for _ in range(STEPS)]
    plain = copy.deepcopy(model)
    optimiser = torch.optim.SGD(plain.parameters(), LR)
    for u, y in data:
        optimiser.zero_grad()
        sum(by_class(one, y) for one in plain(u)[:2]).backward()
        optimiser.step()
    own = settings(level="backprop", loss="cross-entropy")
    for run in (train_centralised, train):
        result = run(model, from_iterable(data, classes=3), own)
        assert set(result.windows) == {"out0", "out1"}
        assert relative(result.model.parameters(), plain.parameters()) <= 1e-12


def test_scores_by_output(monkeypatch):
    monkeypatch.setattr("hamdist.runtime.results.scores.CHUNK", 5)
    model, parts = made(TwoByTwo), items(40, 3)
    x = {k: torch.cat([u[k] for u, _ in parts]) for k in parts[0][0]}
    y = {k: torch.cat([t[k] for _, t in parts]) for k in parts[0][1]}
    losses = {"kind": cross_entropy, "angle": mse}
    scores = evaluate(model, x, y, losses)
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        found = model.eval()(**x)
    right = [int(p.argmax()) == int(t) for p, t in zip(found["kind"], y["kind"], strict=True)]
    assert scores.outputs["kind"].accuracy == scores.accuracy == sum(right) / len(right)
    by_row = [-float(p.log_softmax(0)[t]) for p, t in zip(found["kind"], y["kind"], strict=True)]
    assert scores.loss == pytest.approx(sum(by_row) / len(by_row))
    squares = (0.5 * (found["angle"] - y["angle"]).square()).sum(1)
    assert scores.outputs["angle"].loss == pytest.approx(float(squares.mean()))
    assert scores.outputs["angle"].accuracy is None
    assert scores.main == "kind"


def test_what_cannot_be_scored():
    model = made(TwoByTwo)
    (u, y), *_ = items()
    first = next(iter(u.values()))
    with pytest.raises(StreamError, match="no held-out sample has a target for 'angle'"):
        evaluate_samples(model, [Sample(first, {"kind": y["kind"]}, inputs=u)], mse, ["angle"])
    with pytest.raises(StreamError, match="nothing is held out"):
        evaluate_samples(model, [], mse, None)
    bad = Sample(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))
    with pytest.raises(StreamError, match=r"sample 0: held-out u\[0, 0\] is nan \(6 such values\)"):
        evaluate_samples(nn.Linear(3, 2), [bad], cross_entropy, None)  # (argmax would be class 0)


@pytest.mark.parametrize("names", [("x", "left"), ("0", "1")])
def test_inputs_that_the_model_does_not_take(names):
    u = {name: torch.zeros(5, 4) for name in names}
    data = from_iterable([(u, torch.zeros(5, 3))] * 2)
    message = r"Linear\.forward\(input.*\) -> .*does not take them \(.*argument.*\): give u as"
    with pytest.raises(GraphError, match=message):
        train(nn.Linear(4, 3), data, settings(loss="mse"))


def test_outputs_that_are_not_there():
    own = settings(loss={"kind": "mse", "size": "mse"})
    known = "loss name the output 'size'; the model's outputs are 'kind', 'angle'"
    for run in (train_centralised, train):
        with pytest.raises(GraphError, match=known):
            run(made(TwoByTwo), from_iterable(items(), classes=CLASSES), own)
    one = nn.Linear(4, 3).double()
    data = [(torch.randn(5, 4, dtype=F64), {"a": torch.randint(3, (5,))})]
    with pytest.raises(GraphError, match=r"targets by readout \('a'\), but the model returns one"):
        train_centralised(one, from_iterable(data, classes={"a": 3}), settings(loss="mse"))
    single = [(u, y["a"]) for u, y in data]
    for run in (train_centralised, train):
        with pytest.raises(GraphError, match="loss names the outputs 'kind', 'angle', but the mod"):
            run(one, from_iterable(single, classes=3), settings())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({}, "loss: .*at least 1 item"),
        ({"a": "l1"}, "loss.a: .*'cross-entropy', 'mse' or 'model'"),
    ],
)
def test_losses_that_are_none(loss, message):
    with pytest.raises(ValueError, match="loss") as caught:
        settings(loss=loss)
    from hamdist.config import describe

    assert pytest.importorskip("re").search(message, describe(caught.value))


# -- from the command line -------------------------------------------------------------------------

MODULE = """
import torch
from dynamics.architectures import TwoByTwo
from dynamics.tracing.test_any_network import pairs
from hamdist.streams import from_iterable

def data(seed):
    start = 1000 * seed
    held = [pairs(start + 500 + n) for n in range(4)]
    return from_iterable([pairs(start + n) for n in range(12)], classes={"kind": 3}), held

def loader():
    rows = torch.randn(8, 4), torch.arange(8) % 3
    from torch.utils.data import DataLoader, TensorDataset
    load = DataLoader(TensorDataset(*rows), batch_size=4, shuffle=True)
    return from_iterable(load, classes=3)

def rows(width, targets):
    return torch.zeros(5, width), torch.tensor([targets] * 5)

def held(width=4, targets=0):
    return from_iterable([rows(4, 0)] * 3, classes=3, epochs=2), rows(width, targets)

def wide(): return held(width=5)
def strange(): return held(targets=7)
def classes(): return [rows(4, 0)]
def tensors(): return rows(4, 0)[0], rows(4, 0)[1]
def pair(): return rows(4, 0), rows(4, 0)
def net(): return torch.nn.Linear(4, 3)

def number(): return 3
def takes(batch): return []
def broken(): raise OSError("no such data")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "user_two.py").write_text(MODULE)
    (tmp_path / "two.yaml").write_text(
        "{steps: 12, dtype: float64, loss: {kind: cross-entropy, angle: mse}, name: two,"
        " learning: {lr: 0.1}, partition: {blocks: 3}, compare: {levels: [backprop, trace]}}"
    )
    yield tmp_path
    sys.modules.pop("user_two", None)


@pytest.mark.usefixtures("folder")
def test_compare_with_a_stream_of_ones_own():
    own = Settings.model_validate(
        {**settings().model_dump(exclude_unset=True), "partition": {"blocks": 3}, "seed": 2,
         "compare": {"levels": ["backprop"], "seeds": 2}}
    )  # fmt: skip
    data = load_stream("user_two.py:data")
    runs = list(compare(own, plan(own), own=OwnFunctions(TwoByTwo, data)))
    assert [(r.level, r.seed) for r in runs] == [
        ("centralised", 2), ("centralised", 3), ("backprop", 2), ("backprop", 3)
    ]  # fmt: skip
    for central, level in zip(runs[:2], runs[2:], strict=True):
        assert central.batch == BATCH
        assert level.held_out.main == "kind"
        for name in LOSSES:
            a, b = central.held_out.outputs[name], level.held_out.outputs[name]
            assert a.loss == pytest.approx(b.loss, rel=1e-11)
            assert a.accuracy == b.accuracy
            assert central.prequential[name].loss == pytest.approx(level.prequential[name].loss)
    table = comparison_table(aggregate(runs))
    means = [sum(r.held_out.outputs["angle"].loss for r in part) / 2 for part in (runs[:2],)]
    assert any(f"angle loss {means[0]:.4g} (the table has 'kind')" in note for note in table.notes)
    assert "kind: prequential loss" in run_facts(runs[0])["outputs"]
    written = run_summary(runs[0])["held_out"]
    assert written["main"] == "kind"
    assert written["outputs"]["angle"] == {
        "loss": runs[0].held_out.outputs["angle"].loss,
        "accuracy": None,
    }


@pytest.mark.usefixtures("folder")
def test_the_command_takes_files(monkeypatch):
    monkeypatch.setattr("hamdist.study.run.baseline._threads", lambda *_: 1)
    given = ["--model", "user_two.py:TwoByTwo", "--stream", "user_two.py:data", "--out", "out"]
    done = CliRunner().invoke(app, ["compare", "two.yaml", *given])
    assert done.exit_code == 0, done.output
    assert "held-out by output: kind loss" in done.output
    done = CliRunner().invoke(app, ["run", "two.yaml", *given])
    assert done.exit_code == 0, done.output
    assert "angle: prequential loss" in done.output


@pytest.mark.usefixtures("folder")
def test_a_loader_is_seeded():
    def first(seed):
        return next(load_stream("user_two:loader")(seed).train.samples()).u

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert load_stream("user_two:loader")(0).held_out is None


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", r"--stream: number\(\) returned int; return a stream"),
        ("tensors", r"--stream: tensors\(\) returned Tensor; return a stream"),
        ("pair", r"--stream: pair\(\) returned one pair of tensors; return a stream"),
        ("takes", "--stream 'user_two:takes': it is called without arguments, but missing .*batch"),
        ("broken", r"--stream: broken\(\) failed: OSError: no such data \(.*user_two.py, line"),
        ("nothing", "--stream 'user_two:nothing': module 'user_two' has no 'nothing'"),
    ],
)
def test_a_stream_that_cannot_be_had(name, message):
    with pytest.raises(SettingsError, match=message):
        load_stream(f"user_two:{name}")(0)


@pytest.mark.usefixtures("folder")
def one_net(name, **fields):
    own = Settings.model_validate({"steps": 6, "learning": {"lr": 0.1}, **fields})
    from hamdist.models.build import load_factory

    return run_level(
        own, own=OwnFunctions(load_factory("user_two:net"), load_stream(f"user_two:{name}"))
    )


@pytest.mark.usefixtures("folder")
def test_class_targets_without_classes_have_as_many_as_the_model_has_outputs():
    run, _ = one_net("classes")
    assert run.windows[-1].accuracy is not None


@pytest.mark.usefixtures("folder")
def test_what_is_held_out_may_be_a_pair_of_tensors():
    run, model = one_net("held")
    x = torch.zeros(5, 4)
    expected = cross_entropy(model(x), torch.zeros(5, dtype=torch.int64)).detach()
    assert run.held_out.loss == pytest.approx(float(expected))
    assert (run.samples, run.warnings) == (6, [])


@pytest.mark.usefixtures("folder")
def test_held_out_rows_that_the_model_does_not_take_are_found_before_the_run():
    with pytest.raises(SettingsError, match=r"--stream: .*held out, u \(5, 5\).* u \(5, 4\) torch"):
        one_net("wide")


@pytest.mark.usefixtures("folder")
def test_held_out_labels_that_are_none_do_not_cost_the_run():
    with pytest.warns(UserWarning, match="no held-out score: held-out sample 0: IndexError"):
        run, model = one_net("strange")
    assert run.held_out is None
    assert isinstance(model, nn.Linear)


@pytest.mark.usefixtures("folder")
def test_a_stream_that_ends_before_the_steps_says_so():
    for level in ("trace", "local", "backprop"):
        run, _ = one_net("held", steps=7, level=level)
        assert any("ended after 6 of 7 samples (steps): go" in text for text in run.warnings)
    assert not one_net("held", steps=None)[0].warnings
