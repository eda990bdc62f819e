"""Loss `model`: what a model computes itself from labels among its inputs, as transformers' do.
Oracle: torch.optim.SGD on that loss, float64."""

from __future__ import annotations

import copy
import itertools
import json
import warnings

import pytest
import torch
from dynamics.helpers import relative
from runtime.engines.test_engines_equal import assert_equal
from runtime.ray_engine.test_recovery import Once, driver  # noqa: F401
from runtime.snapshots.test_snapshots import goes_on
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import hamdist
from hamdist.cli import app
from hamdist.errors import GraphError, StreamError
from hamdist.streams import from_iterable

WORDS, LR = 11, 0.1


class Causal(nn.Module):
    """Predicts the next word, and says how badly: labels are the words themselves."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.mixed = nn.Linear(8, 8)
        self.head = nn.Linear(8, WORDS)

    def forward(self, input_ids, attention_mask=None, labels=None):
        h = self.mixed(self.words(input_ids)) * attention_mask[..., None]
        logits, loss = self.head(torch.tanh(h)), None
        if labels is not None:
            following = functional.pad(labels, (0, 1), value=-100)[:, 1:]
            loss = functional.cross_entropy(logits.flatten(0, 1), following.flatten())
        return {"loss": loss, "logits": logits}


def texts(rows=18):
    """Rows as a tokenizer gives them."""
    random = torch.Generator().manual_seed(1)
    return [
        torch.randint(WORDS, (length,), generator=random)
        for length in torch.randint(3, 7, (rows,), generator=random)
    ]


def collated(rows):
    """A batch, padded as transformers' DataCollatorForLanguageModeling does it."""
    there = [torch.ones_like(row) for row in rows]
    pad = nn.utils.rnn.pad_sequence
    fixed = [functional.pad(row, (0, 7 - len(row)), value=-100) for row in rows]
    ids, labels = pad([r.clamp(min=0) for r in fixed], True), pad(fixed, True)
    mask = pad([functional.pad(one, (0, 7 - len(one))) for one in there], True)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loader():
    return DataLoader(texts(), batch_size=3, collate_fn=collated)


def model():
    torch.manual_seed(0)
    return Causal().double()


def by_sgd(plain=None, batches=None):
    plain = plain or model()
    optimiser = torch.optim.SGD(plain.parameters(), lr=LR)
    for batch in batches or loader():
        optimiser.zero_grad()
        plain(**batch)["loss"].backward()
        optimiser.step()
    return plain


def trained(data, level="backprop", net=None, **fields):
    options = {"loss": "model", "engine": {"kind": "inprocess"}, "partition": {"blocks": 3}}
    return hamdist.train(
        net or model(),
        data,
        level=level,
        dtype="float64",
        learning={"lr": LR},
        **{**options, **fields},
    )


@pytest.mark.parametrize("loss", ["model", {"loss": "model"}])
def test_it_is_sgd_on_the_model_s_own_loss(loss):
    result = trained(loader(), loss=loss)
    assert len(result.blocks) == 3
    after = result.model.state_dict().values()
    assert relative(after, by_sgd().state_dict().values()) <= 1e-12


def test_pairs_with_labels_among_the_inputs_do_as_well():
    result = trained([(batch, None) for batch in loader()])
    after = result.model.state_dict().values()
    assert relative(after, by_sgd().state_dict().values()) <= 1e-12


def test_the_loss_told_is_the_model_s():
    first = next(iter(loader()))
    result = trained([first])
    (window,) = result.windows["loss"]
    assert window.loss == pytest.approx(model()(**first)["loss"].item(), rel=1e-12)


@pytest.mark.ray
def test_both_engines_agree_to_the_bit(session):
    runs = [
        trained(loader(), "trace", engine=engine)
        for engine in ({"kind": "inprocess"}, {"kind": "ray", "actors": 2})
    ]
    for a, b in zip(*(run.model.state_dict().values() for run in runs), strict=True):
        assert torch.equal(a, b)


def halves(module, to_inputs, to_outputs):
    return tuple(g / 2 for g in to_inputs)


def doubles(module, given, made):
    return 2 * made


class Odd(Causal):
    """With a sparse embedding, hooks on modules, and what kills its process."""

    def __init__(self, mark=None):
        super().__init__()
        self.words = nn.Embedding(WORDS, 8, sparse=True)
        self.mixed = nn.Sequential(nn.Linear(8, 8), Once(mark and 31, mark, "kill"))
        self.mixed[0].register_full_backward_hook(halves)
        self.head.register_forward_hook(doubles)


def odd(mark=None):
    torch.manual_seed(0)
    return Odd(mark).double()


class Collated:
    """Batches that an actor can draw."""

    portable = True

    def __init__(self, steps=60):
        self.steps = steps
        self.batches = list(loader())
        self.spec = from_iterable(self.batches, model_loss="loss").spec

    def samples(self):
        batches = itertools.islice(itertools.cycle(self.batches), self.steps)
        return from_iterable(list(batches), model_loss="loss").samples()


@pytest.mark.parametrize("level", ["trace", "backprop"])
def test_on_from_a_snapshot(level, tmp_path):
    """And the hooks, which a snapshot does not hold, go on to act; by SGD they do the same."""

    def run(engine, resume, **fields):
        return trained(Collated(18), level, odd(), engine=engine, resume=resume, **fields)

    whole = goes_on(run, tmp_path, 7)
    if level == "backprop":
        expected = by_sgd(odd(), Collated(18).batches * 3).state_dict()
        assert relative(whole.model.state_dict().values(), expected.values()) <= 1e-12


@pytest.mark.ray
def test_a_killed_actor(session, driver, leaves_no_socket, tmp_path):  # noqa: F811
    kept = {"path": str(tmp_path / "kept"), "every": 10}
    engine = {"kind": "ray", "actors": 3}
    spread = trained(Collated(), "trace", odd(tmp_path / "mark"), engine=engine, snapshots=kept)
    assert len(spread.replaced) == 1
    assert_equal(trained(Collated(), "trace", odd()), spread)


def test_compare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "causal.py").write_text(
        "from dynamics.objective.test_model_loss import loader, model\n\n\n"
        "def data(seed):\n    return loader()\n"
    )
    arguments = ["compare", "--model", "causal.py:model", "--stream", "causal.py:data"]
    arguments += ["--levels", "backprop", "--steps", "6", "--engine", "inprocess", "--out", "out"]
    options = ["--set", "loss=model", "--set", "dtype=float64", "--set", "partition.blocks=3"]
    done = CliRunner().invoke(app, [*arguments, *options])
    assert done.exit_code == 0, done.output
    files = (tmp_path / "out" / "runs").glob("*.json")
    runs = [json.loads(file.read_text()) for file in files]
    assert {run["level"] for run in runs} == {"centralised", "backprop"}
    central, level = (sum(window["loss"] for window in run["windows"]) for run in runs)
    assert level == pytest.approx(central, rel=1e-12) != 0


def test_an_output_that_is_no_number_is_refused():
    with pytest.raises(GraphError, match="computes itself"):
        trained(loader(), loss={"logits": "model"})


def test_a_target_beside_it_is_refused():
    batches = [(copy.copy(b), b["labels"]) for b in loader()]
    with pytest.raises(StreamError, match="has a target"):
        trained(batches)


def test_labels_that_the_model_takes_itself_are_warned_of():
    batch = next(iter(loader()))
    with pytest.warns(UserWarning, match="loss='model' learns the loss that it computes"):
        trained([batch], loss={"logits": "cross-entropy"})
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask", "labels": "y.logits"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained([batch], loss=None, names=names)
