"""Loss `model`: what a model computes itself from labels among its inputs, as transformers' do.
Oracle: torch.optim.SGD on that loss, float64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from dynamics.helpers import relative
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import hamdist
from hamdist.errors import GraphError, StreamError

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


def by_sgd():
    plain = model()
    optimiser = torch.optim.SGD(plain.parameters(), lr=LR)
    for batch in loader():
        optimiser.zero_grad()
        plain(**batch)["loss"].backward()
        optimiser.step()
    return plain


def trained(data, level="backprop", **fields):
    options = {"loss": "model", "engine": {"kind": "inprocess"}, "partition": {"blocks": 3}}
    return hamdist.train(
        model(), data, level=level, dtype="float64", learning={"lr": LR}, **{**options, **fields}
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
def test_both_engines_agree_to_the_bit():
    runs = [
        trained(loader(), "trace", engine=engine)
        for engine in ({"kind": "inprocess"}, {"kind": "ray", "actors": 2})
    ]
    for a, b in zip(*(run.model.state_dict().values() for run in runs), strict=True):
        assert torch.equal(a, b)


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
