"""Averaged weights in studies: what is evaluated, what is written, what the baseline does."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from hamdist.config import Settings
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.runtime.results.scores import evaluate
from hamdist.streams import held_out
from hamdist.study.report.save import save_run
from hamdist.study.run.baseline import CENTRALISED, baseline_warnings
from hamdist.study.run.run import run_level


def settings(**fields):
    return Settings.model_validate(
        {
            "steps": 40,
            "level": "backprop",
            "dtype": "float64",
            "model": {"kind": "mlp", "width": 16, "depth": 3},
            "learning": {"lr": 0.2, "average": 0.9},
            **fields,
        }
    )


def test_a_run_is_evaluated_and_written_with_the_average(tmp_path):
    own = settings()
    run, model = run_level(own)
    x, y = held_out(own.stream, seed=0, dtype=torch.float64, samples=40)
    assert run.plain is not None
    assert run.held_out == evaluate(model, x, y, cross_entropy)
    assert run.held_out_plain == evaluate(run.plain, x, y, cross_entropy)
    assert run.held_out != run.held_out_plain
    save_run(tmp_path, run, model, own)
    for name, module in (("model", model), ("plain", run.plain)):
        written = load_file(tmp_path / f"{name}.safetensors")
        assert written.keys() == module.state_dict().keys()
        assert all(torch.equal(written[k], v) for k, v in module.state_dict().items())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["held_out_plain"]["loss"] == run.held_out_plain.loss
    assert "plain" not in summary


def test_the_baseline_averages_alike():
    """At level backprop both are the same gradient descent, so both averages are the same."""
    _, ours = run_level(settings())
    run, theirs = run_level(settings(), baseline=CENTRALISED)
    assert run.plain is not None
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("average", [1.0, -0.1, "much"])
def test_an_average_that_is_none(average):
    with pytest.raises(ValueError, match="average"):
        settings(learning={"average": average})


def test_the_baseline_says_what_it_does_not_do():
    told = baseline_warnings(settings(learning={"clip": 1.0, "inputs": "centred", "heads": {}}))
    assert "learning.clip, learning.inputs, learning.heads" in told[0]
    assert not baseline_warnings(settings(learning={"average": 0.9, "decay": "cosine"}))


def test_without_an_average_there_is_one_model(tmp_path):
    own = settings(learning={"lr": 0.2})
    run, model = run_level(own)
    assert run.plain is None
    assert run.held_out_plain is None
    save_run(tmp_path, run, model, own)
    assert not (tmp_path / "plain.safetensors").exists()
