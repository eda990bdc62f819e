"""Oracle: the same evaluation by hand; what a run of a recurrent model shows and refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from hamdist.config import Settings
from hamdist.dynamics.graph.merged import MergedSequence
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.errors import SettingsError, StreamError
from hamdist.runtime.results.scores import evaluate_sequences
from hamdist.streams import Sample, from_iterable, held_out_tokens
from hamdist.study.report.table import run_facts
from hamdist.study.run.run import run_centralised, run_level


def settings(**fields):
    raw = {
        "level": "bptt",
        "steps": 150,
        "stream": {
            "source": "sequences",
            "batch": 2,
            "sequences": {"view": "tokens", "count": 20, "length": 9},
        },
        "model": {"kind": "lstm", "width": 5, "depth": 2},
        **fields,
    }
    return Settings.model_validate(raw)


def test_a_run_from_settings():
    run, model = run_level(settings(locality={"truncation": 4}))
    assert isinstance(model, MergedSequence)
    assert run.samples == 150
    assert run.stored == dict.fromkeys(["embedding", "cell0", "cell1", "readout"], 4)
    shown = run_facts(run)["tokens stored at once"]
    assert shown == "embedding 4, cell0 4, cell1 4, readout 4"
    losses, right = [], []
    sequence = []
    for sample in held_out_tokens(settings().stream, seed=0).samples():
        sequence.append(sample.u)
        if sample.end:
            prediction = model(torch.stack(sequence))[-1].detach()
            losses.append(functional.cross_entropy(prediction, sample.y).item())
            right.append(prediction.argmax(1) == sample.y)
            sequence = []
    assert run.held_out.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert run.held_out.accuracy == pytest.approx(torch.cat(right).float().mean().item())


def test_other_levels_show_no_stored_tokens():
    run, _ = run_level(Settings.model_validate({"level": "trace", "steps": 3}))
    assert "tokens stored at once" not in run_facts(run)


class Echo(nn.Module):
    """(T, B) to (T, B, 3): the token itself is the prediction."""

    def forward(self, u):
        return 2.0 * functional.one_hot(u, 3)


def test_rows_of_all_tokens_with_a_target_count():
    def tokens(*numbers):
        return torch.tensor(numbers)

    stream = from_iterable(
        [
            Sample(tokens(0, 1), tokens(0, 0)),
            Sample(tokens(2, 2), None, end=True),
            Sample(tokens(1, 1), tokens(1, 1)),
        ],
        classes=3,
    )
    scores = evaluate_sequences(Echo(), stream, cross_entropy)
    hit, miss = (
        float(functional.cross_entropy(torch.tensor([[2.0, 0, 0]]), torch.tensor([c])))
        for c in (0, 1)
    )
    assert scores.accuracy == 3 / 4
    assert scores.loss == pytest.approx((3 * hit + miss) / 4)


def test_sequences_without_targets_cannot_be_scored():
    stream = from_iterable([Sample(torch.tensor([1]), None)], classes=3)
    with pytest.raises(StreamError, match="no token of the held-out sequences has a target"):
        evaluate_sequences(Echo(), stream, cross_entropy)


def test_what_a_recurrent_model_cannot_do():
    with pytest.raises(SettingsError, match="partition: a lstm has a block for each cell"):
        run_level(settings(partition={"blocks": 2}))
    with pytest.raises(SettingsError, match="no centralised training of a lstm"):
        run_centralised(settings())
