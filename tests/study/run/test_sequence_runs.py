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
from hamdist.models.build import make_recurrent
from hamdist.runtime.results.scores import evaluate_sequences
from hamdist.streams import Sample, from_iterable, held_out_tokens, make_stream
from hamdist.study.report.table import run_facts
from hamdist.study.run.baseline import CENTRALISED, FROZEN
from hamdist.study.run.run import run_level


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


def test_centralised_is_the_level_bptt():
    """Whose oracle is autograd through the unrolled network."""
    learning = {"lr": 0.3, "momentum": 0.5}
    whole = settings(dtype="float64", learning=learning)
    (level, ours), (run, plain) = run_level(whole), run_level(whole, baseline=CENTRALISED)
    for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert run.held_out.loss == pytest.approx(level.held_out.loss, rel=1e-12)
    losses = [[w.mean_loss for w in r.windows] for r in (run, level)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_endless_stream_is_cut_where_states_go_on(frozen):
    """Oracle: the same by hand, with nn.GRUCell."""
    stream = {"source": "memory", "batch": 3, "memory": {"task": "recall", "ends": False}}
    own = settings(
        stream=stream,
        steps=14,
        dtype="float64",
        model={"kind": "gru", "width": 5, "depth": 1},
        locality={"truncation": 4},
        learning={"lr": 0.3},
        metrics={"window": 1},
    )
    spec = make_stream(own.stream, seed=0, dtype=torch.float64)
    model = make_recurrent(own.model, spec.spec, cross_entropy, seed=0, dtype=torch.float64)
    cell, readout = (b.module for b in model.blocks.values())
    moving = [*readout.parameters(), *([] if frozen else cell.parameters())]
    h, chunk = torch.zeros(3, 5, dtype=torch.float64), []
    for n, sample in zip(range(12), spec.samples(), strict=False):
        h = cell(sample.u, h)
        if sample.y is not None:
            chunk.append(functional.cross_entropy(readout(h), sample.y))
        if n % 4 == 3:
            for p, g in zip(moving, torch.autograd.grad(sum(chunk), moving), strict=True):
                p.data -= 0.3 * g
            h, chunk = h.detach(), []
    _, trained = run_level(own, baseline=FROZEN if frozen else CENTRALISED)
    expected = [*cell.parameters(), *readout.parameters()]
    for a, b in zip(trained.parameters(), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("kind", ["leaky", "spiking", "diagonal"])
def test_cells_by_settings(kind):
    """Over two cells, whose readout sees what other units read."""
    stream = {"source": "memory", "batch": 3, "memory": {"task": "copy", "length": 3}}
    model = {"kind": kind, "width": 5, "depth": 2, "decay": 0.7, "threshold": 0.4}
    run, trained = run_level(settings(steps=24, stream=stream, model=model, learning={"lr": 0.01}))
    cell = trained.blocks["cell1"].module.module
    if kind != "diagonal":
        assert (cell.decay, cell.threshold) == (0.7, 0.4 if kind == "spiking" else None)
    assert run.held_out.accuracy is not None
    rule = {"leaky": "e-prop", "spiking": "e-prop", "diagonal": "diagonal"}[kind]
    fields = {"learning": {"lr": 0.01, "rules": {"*": rule}}, "level": "trace"}
    online, _ = run_level(settings(steps=24, stream=stream, model=model, **fields))
    assert online.held_out.accuracy is not None
