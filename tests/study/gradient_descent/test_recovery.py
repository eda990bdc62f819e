"""Oracles: torch.optim.SGD written out, the in-process engine (for Ray), files made here."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal
from torch.nn import functional
from typer.testing import CliRunner

from hamdist.cli import app
from hamdist.config import FirstStep, Settings, merge
from hamdist.errors import SettingsError, StreamError
from hamdist.runtime.train.train import train
from hamdist.streams.sources.images import ImageFiles
from hamdist.study.gradient_descent import models, report
from hamdist.study.gradient_descent import scenarios as cells
from hamdist.study.gradient_descent.models import EMBEDDING, MODELS, Paths, make_model
from hamdist.study.gradient_descent.scenarios import (
    SCENARIOS,
    Placement,
    ScenarioCell,
    ScenarioJob,
    ScenarioRow,
    Trained,
    run_row,
)
from hamdist.study.verify.topics import gradient_descent

INPUTS = {"linear": 4, "mlp": 4, "resnet": 784, "vit": 784, "rnn": 60, "lstm": 60}
MOMENTUM = SCENARIOS["Mom-b"]


@pytest.fixture(autouse=True)
def _forget_data():
    """Data are kept between rows; each test here may have other files."""
    yield
    for made in (models.iris, models.images, models.sequences):
        made.cache_clear()


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(cells, "cores", lambda: 1)


def sample(name):
    generator = torch.Generator().manual_seed(4)
    if name in ("rnn", "lstm"):
        return torch.randint(60, (1, 12), generator=generator)
    shape = (1, 4) if name in ("linear", "mlp") else (1, 1, 28, 28)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# -- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_a_body_and_a_head_that_both_learn(name):
    model = make_model(name, INPUTS[name], 3, seed=1)
    assert list(dict(model.named_children())) == ["body", "head"]
    u = sample(name)
    assert model(u).shape == (1, 3)
    functional.cross_entropy(model(u), torch.tensor([2])).backward()
    for key, p in model.named_parameters():
        assert p.dtype == torch.float64
        assert p.grad is not None, key
        assert p.grad.abs().max() > 0, key


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = make_model("vit", 784, 10, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = (make_model("vit", 784, 10, seed=s).state_dict() for s in (1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_the_models_are_those_of_the_paper():
    resnet = make_model("resnet", 784, 10, seed=0)
    assert sum(type(m).__name__ == "ResidualCell" for m in resnet.modules()) == 4
    assert not any("Norm" in type(m).__name__ for m in resnet.modules())
    vit = make_model("vit", 784, 10, seed=0)
    layers = [m for m in vit.modules() if isinstance(m, torch.nn.TransformerEncoderLayer)]
    assert [layer.self_attn.embed_dim for layer in layers] == [30]
    assert vit.body[0](sample("vit")).shape == (1, 16, 30)
    for name, kind in (("rnn", torch.nn.RNN), ("lstm", torch.nn.LSTM)):
        net = make_model(name, 60, 2, seed=0)
        (recurrent,) = [m for m in net.modules() if isinstance(m, kind)]
        assert (recurrent.input_size, recurrent.hidden_size) == (50, 30)
    mlp = make_model("mlp", 4, 3, seed=0)
    assert [tuple(p.shape) for p in mlp.parameters()] == [(30, 4), (30,), (3, 30), (3,)]


def test_the_last_state_is_read():
    net = make_model("rnn", 60, 2, seed=0)
    u = sample("rnn")
    h = torch.zeros(1, 30, dtype=torch.float64)
    recurrent = net.body[1].net
    for token in u[0]:
        x = net.body[0](token).unsqueeze(0)
        h = torch.tanh(
            x @ recurrent.weight_ih_l0.T
            + recurrent.bias_ih_l0
            + h @ recurrent.weight_hh_l0.T
            + recurrent.bias_hh_l0
        )
    torch.testing.assert_close(net.body(u), h, rtol=0, atol=1e-14)


# -- data --------------------------------------------------------------------------------------


def idx(values: np.ndarray) -> bytes:
    shape = b"".join(n.to_bytes(4, "big") for n in values.shape)
    return bytes((0, 0, 8, values.ndim)) + shape + values.astype(np.uint8).tobytes()


def image_folder(folder: Path, per_class: int) -> Path:
    """Images whose pixels all hold 10 times the label plus a number of their own."""
    labels = np.tile(np.arange(10), per_class)
    own = 10 * labels + np.arange(len(labels)) // 10
    pixels = np.broadcast_to(own[:, None, None], (len(labels), 28, 28))
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def shown(source, items):
    return [s for s, _ in zip(source.stream.samples(), range(items), strict=False)]


def test_iris_is_raw():
    iris = models.iris(0)
    assert (iris.rows, iris.inputs, iris.classes) == (150, 4, 3)
    u = torch.cat([s.u for s in shown(iris, 150)])
    assert u.mean(0).tolist() == pytest.approx([5.843, 3.057, 3.758, 1.199], abs=1e-3)
    assert u.dtype == torch.float64


def test_images_are_the_first_ten_of_each_class(tmp_path):
    images = models.images(0, image_folder(tmp_path, 12))
    assert (images.rows, images.classes, images.source) == (100, 10, str(tmp_path))
    items = shown(images, 100)
    assert all(s.u.shape == (1, 1, 28, 28) for s in items)
    found = sorted((int(s.y), round((float(s.u[0, 0, 0, 0]) * 0.353 + 0.286) * 255)) for s in items)
    assert found == [(label, 10 * label + n) for label in range(10) for n in range(10)]


def test_too_few_images(tmp_path):
    with pytest.raises(StreamError, match="class 0 has 9 images"):
        models.images(0, image_folder(tmp_path, 9))


def test_digits_where_fashion_mnist_is_not_installed(monkeypatch):
    monkeypatch.setattr(ImageFiles, "folders", property(lambda _: ()))
    images = models.images(0)
    assert "digits" in images.source
    items = shown(images, 100)
    assert sorted(int(s.y) for s in items) == sorted([*range(10)] * 10)
    assert all(s.u.shape == (1, 1, 28, 28) for s in items)


def test_sequences():
    sequences = models.sequences(0)
    assert (sequences.rows, sequences.classes) == (100, 2)
    items = shown(sequences, 100)
    ids = torch.cat([s.u for s in items])
    assert ids.shape == (100, 12)
    assert ids.dtype == torch.int64
    assert ids.max() < sequences.inputs
    assert sum(int(s.y) for s in items) == 50


def text_files(folder: Path, vector: str) -> tuple[Path, Path]:
    lines = [f"{n % 2}\t{'good' if n % 2 else 'bad'} film {n}" for n in range(130)]
    texts = folder / "texts.tsv"
    texts.write_text("\n".join(lines))
    glove = folder / "glove.txt"
    glove.write_text(f"good {vector}\nbad {vector}\n")
    return texts, glove


def test_real_texts_and_word_vectors(tmp_path):
    texts, glove = text_files(tmp_path, " ".join(str(n / 8) for n in range(50)))
    paths = Paths(texts=texts, glove=glove)
    sequences = cells.data_of("rnn", paths)
    assert sequences.source == f"{texts}, glove.txt"
    model = cells.model_of("rnn", sequences)
    embedding = model.get_parameter("body.0.weight")
    assert embedding.shape == (sequences.inputs, EMBEDDING)
    vector = torch.arange(50, dtype=torch.float64) / 8
    assert sum(torch.equal(row, vector) for row in embedding.detach()) == 2
    assert run_row(ScenarioJob("rnn", "GD-a", steps=3, paths=paths)).passed


def test_word_vectors_of_another_size(tmp_path):
    texts, glove = text_files(tmp_path, "1 2 3")
    with pytest.raises(StreamError, match="vectors of 3 numbers"):
        models.sequences(0, texts, glove)


# -- cells -------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_start", [False, True])
def test_the_oracle_is_the_written_out_recursion(zero_start):
    iris = models.iris(0)
    model = make_model("mlp", 4, 3, seed=0)
    found = cells.sgd(model, iris, MOMENTUM, 20, zero_start=zero_start)
    theta = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    b = None
    losses = []
    for s in shown(iris, 20):
        y = torch.func.functional_call(model, theta, (s.u,))
        loss = functional.cross_entropy(y, s.y)
        losses.append(loss.item())
        g = torch.autograd.grad(loss, list(theta.values()))
        if b is None and not zero_start:
            b = list(g)
        else:
            old = [torch.zeros_like(x) for x in g] if b is None else b
            b = [0.1 * o + 0.5 * x for o, x in zip(old, g, strict=True)]
        with torch.no_grad():
            for w, step in zip(theta.values(), b, strict=True):
                w -= 0.01 * step
    assert found.losses.tolist() == pytest.approx(losses, rel=0, abs=1e-14)
    for key, w in theta.items():
        torch.testing.assert_close(found.weights[key], w.detach(), rtol=0, atol=1e-14)
        assert not torch.equal(found.weights[key], model.state_dict()[key])


@pytest.mark.parametrize("scenario", ["GD-b", "Mom-a"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_at_every_placement(model, scenario):
    row = run_row(ScenarioJob(model, scenario, steps=8))
    assert row.steps == 8
    assert [c.placement for c in row.cells] == list(Placement)
    for cell in row.cells:
        assert cell.difference < 1e-14, cell
    assert row.from_pytorch is None


def test_the_plain_table_of_the_paper():
    row = run_row(ScenarioJob("mlp", "Mom-a", steps=20, first_step=FirstStep.DAMPENED))
    assert row.passed
    assert 1e-4 < row.from_pytorch < 5e-3
    assert (
        run_row(ScenarioJob("mlp", "GD-a", steps=5, first_step=FirstStep.DAMPENED)).from_pytorch
        is None
    )


@pytest.mark.parametrize("wrong", [{"lr": 0.011}, {"momentum": 0.11}, {"dampening": 0.49}])
@pytest.mark.parametrize("placement", Placement)
def test_another_constant_is_seen(placement, wrong):
    iris = models.iris(0)
    model = make_model("linear", 4, 3, seed=0)
    oracle = cells.sgd(model, iris, MOMENTUM, 10)
    for scenario, equal in ((MOMENTUM, True), (replace(MOMENTUM, **wrong), False)):
        settings = cells.settings_of(scenario, placement, 10)
        found = cells.hamiltonian(model, iris, settings).apart(oracle)
        assert all((x <= cells.BOUND) is equal for x in found)


def test_a_long_run_keeps_every_loss():
    """More samples than windows are kept by default."""
    own = cells.settings_of(SCENARIOS["GD-b"], Placement.OUTPUT, 30)
    few = own.model_copy(update={"metrics": own.metrics.model_copy(update={"limit": 8})})
    model = make_model("linear", 4, 3, seed=0)
    kept = [len(cells.hamiltonian(model, models.iris(0), one).losses) for one in (own, few)]
    assert kept[0] == 30 > kept[1]


def test_apart():
    one = Trained(torch.tensor([1.0, 2.0]), {"a": torch.zeros(2, 2), "b": torch.ones(3)})
    other = Trained(torch.tensor([1.0, 1.5]), {"a": torch.zeros(2, 2), "b": torch.ones(3) - 0.25})
    assert one.apart(other) == (0.5, 0.25)
    broken = Trained(torch.tensor([1.0, math.nan]), other.weights)
    assert math.isnan(one.apart(broken)[0])


@pytest.mark.parametrize(
    ("losses", "weights", "passed"),
    [
        (1e-11, 1e-11, True),
        (1e-9, 0.0, False),
        (0.0, 1e-9, False),
        (math.nan, 0.0, False),
        (0.0, math.nan, False),
    ],
)
def test_a_cell_passes(losses, weights, passed):
    assert ScenarioCell(Placement.STATE, losses, weights, 1.0).passed is passed


@pytest.mark.ray
@pytest.mark.parametrize(
    ("model", "placement"),
    [
        ("mlp", Placement.OUTPUT),
        pytest.param("linear", Placement.SPLIT, marks=pytest.mark.slow),
        pytest.param("vit", Placement.SPLIT, marks=pytest.mark.slow),
        pytest.param("lstm", Placement.STATE, marks=pytest.mark.slow),
        ("lstm", Placement.SPLIT),
    ],
)
def test_ray_computes_the_same_cell(session, leaves_no_socket, model, placement):
    source = cells.data_of(model, Paths())
    net = cells.model_of(model, source)
    settings = cells.settings_of(MOMENTUM, placement, 12)
    engine = {"engine": {"kind": "ray", "actors": 2 if placement is Placement.SPLIT else 1}}
    fields = merge(settings.model_dump(mode="json", exclude_unset=True), engine)
    alone = train(net, source.stream, settings)
    spread = train(net, source.stream, Settings.model_validate(fields))
    assert_equal(alone, spread)
    (windows,) = spread.windows.values()
    assert len(windows) == 12


# -- rows and the table ------------------------------------------------------------------------


def given_row(model="mlp", scenario="Mom-a", losses=2e-16, **more):
    made = tuple(ScenarioCell(p, losses, 0.0, 1.5) for p in Placement)
    return ScenarioRow(model, scenario, "Iris", 6000, (1.25, 0.5), made, 9.0, **more)


def test_jobs():
    assert len(cells.jobs()) == 24
    assert len(cells.jobs(["mlp", "mlp"])) == 4
    assert {job.epochs for job in cells.jobs(epochs=3)} == {3}
    for wrong in (["mlp", "gpt"], []):
        with pytest.raises(SettingsError, match="linear, mlp, resnet, vit, rnn, lstm"):
            cells.jobs(wrong)


@pytest.mark.slow
def test_epochs_of_the_paper(monkeypatch):
    monkeypatch.setattr(cells, "MOST_EPOCHS", 2)
    monkeypatch.setattr(cells, "EPOCHS", {"rnn": 3})
    assert run_row(ScenarioJob("linear", "GD-a")).steps == 300
    assert run_row(ScenarioJob("rnn", "GD-a", epochs=1, steps=7)).steps == 7


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes(tmp_path):
    before = set(multiprocessing.active_children())
    same = [ScenarioJob("linear", scenario, steps=5) for scenario in ("GD-a", "Mom-a")]
    wrong = ScenarioJob("rnn", "GD-a", steps=5, paths=Paths(texts=tmp_path))
    endless = ScenarioJob("linear", "GD-a", epochs=10**6)
    with cells.RowWorkers([*same, wrong, endless], 2) as spread:
        for one in map(spread.row, same):
            other = run_row(ScenarioJob(one.model, one.scenario, steps=5))
            assert one.loss == other.loss
            assert [c.difference for c in one.cells] == [c.difference for c in other.cells]
        with pytest.raises(StreamError, match="no texts in"):
            spread.row(wrong)
        assert len(set(multiprocessing.active_children()) - before) == 2
    assert set(multiprocessing.active_children()) <= before


def test_one_process_works_the_rows_out_in_order():
    wanted = [ScenarioJob("linear", scenario, steps=5) for scenario in ("Mom-a", "GD-a")]
    with cells.RowWorkers(wanted, 1) as alone:
        found = list(alone.finished())
        assert [row.scenario for row in found] == ["Mom-a", "GD-a"]
        assert alone.row(wanted[1]) is found[1]


def test_the_table():
    unequal = given_row("linear", "GD-a", losses=1e-3)
    table = report.recovery_table(report.in_order([given_row(), unequal]))
    assert [cells[:4] for cells in table.rows] == [
        ["Linear", "GD-a", "6,000", "1.250 → 0.500"],
        ["MLP", "Mom-a", "6,000", "1.250 → 0.500"],
    ]
    assert table.rows[0][4:] == ["1.0e-03 / 0 ✗"] * 3
    assert table.rows[1][4:] == ["2.0e-16 / 0"] * 3
    assert table.notes[0] == "3 of 6 cells equal SGD to 1e-10 (✗: 3 do not)"
    assert "Linear, MLP: Iris" in table.notes[1]
    lines = report.markdown(table).splitlines()  # type: ignore[attr-defined]
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 8
    assert "apart at output net, state net" in report.recovery_line(unequal)
    assert ": equal (6,000 steps" in report.recovery_line(given_row())


def test_the_table_of_the_paper():
    table = report.recovery_table([given_row("mlp", "GD-a"), given_row(from_pytorch=2e-3)])
    assert [row[-1] for row in table.rows] == ["–", "2.0e-03"]
    assert "dampened" in table.notes[-1]


def test_files(tmp_path):
    report.save_recovery(tmp_path, [given_row(losses=math.nan)], "hamdist study recovery")
    whole = json.loads((tmp_path / "recovery.json").read_text())
    assert whole["command"] == "hamdist study recovery"
    assert [c["placement"] for c in whole["cells"]] == [p.value for p in Placement]
    assert whole["cells"][0]["losses"] is None
    assert whole["cells"][0]["passed"] is False
    lines = list(csv.DictReader((tmp_path / "recovery.csv").open()))
    assert [line["weights"] for line in lines] == ["0.0"] * 3
    assert (
        (tmp_path / "recovery.md").read_text().startswith("`hamdist study recovery`\n\n| model |")
    )


# -- the command and verify -----------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(app, ["study", "recovery", *arguments])


@pytest.mark.slow
def test_the_command(one_process, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recovery.md").write_text("before")  # of an earlier study
    result = command("--models", "linear", "--epochs", "1", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    assert "12 of 12 cells equal SGD to 1e-10" in result.stdout
    assert "[4/4] Linear, Mom-b: equal (150 steps" in result.stderr
    assert (tmp_path / "out" / "recovery.md").read_text() == "before"
    assert sorted(p.name for p in (tmp_path / "out-2").iterdir()) == [
        "recovery.csv",
        "recovery.json",
        "recovery.md",
    ]


def test_the_command_with_the_plain_table_fails_where_a_cell_does(one_process, monkeypatch):
    monkeypatch.setattr(cells, "SCENARIOS", {"Mom-a": SCENARIOS["Mom-a"]})
    for bound, code, judged in ((1e-10, 0, "3 of 3 cells"), (-1.0, 1, "0 of 3 cells")):
        monkeypatch.setattr(cells, "BOUND", bound)
        result = command("--models", "linear", "--paper")
        assert result.exit_code == code, result.stderr
        assert judged in result.stdout
        assert ("✗" in result.stdout) is (code == 1)
        assert "2.0e-03" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "mlp,gpt"], "gpt is no model"),
        (["--models", ","], "nothing is no model"),
        (["--full", "--epochs", "2"], "--epochs 2 with --full"),
    ],
)
def test_a_wrong_command(arguments, message):
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.slow
def test_verify_has_a_check_for_every_cell(monkeypatch):
    monkeypatch.setattr(gradient_descent, "SMALL_STEPS", 2)
    checks = gradient_descent.checks(False)
    found = {check.name: check.measure() for check in checks}
    assert len(found) == 72
    assert all(f.difference <= 1e-10 for f in found.values())
    assert "ViT, Mom-b, state/output split: losses and weights" in found
    assert "2 steps on" in found["LSTM, GD-a, state net: losses and weights"].where


def test_verify_in_full_asks_for_the_epochs_of_the_paper(monkeypatch):
    asked = []

    class Asked(cells.RowWorkers):
        def __init__(self, wanted, processes):
            asked.append((list(wanted), processes))
            super().__init__(wanted, 1)

    monkeypatch.setattr(gradient_descent, "RowWorkers", Asked)
    first = next(gradient_descent.checks(True))
    assert first.bound == 1e-10
    ((wanted, processes),) = asked
    assert processes is None
    assert {(job.epochs, job.steps) for job in wanted} == {(None, None)}
