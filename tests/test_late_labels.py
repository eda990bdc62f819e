"""Labels that come late. Oracle: progressive validation with delay, written out for a plain model:
an event queue of questions and answers, as river's `evaluate.progressive_val_score(delay=...)`."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from runtime.test_engines_equal import assert_equal
from torch import nn
from torch.nn import functional

import hamdist
from hamdist.config import Settings, StreamSettings
from hamdist.errors import LevelError, SettingsError
from hamdist.streams import Delayed, LateLabels, Paced, Rejoin, Sample, from_iterable, make_stream
from hamdist.study.run.baseline import train_centralised

B, F, C, ITEMS = 3, 5, 4, 40
MISSING = {4, 17}


class Drifting:
    """Classes that turn slowly, so that late labels cost."""

    portable = True
    spec = from_iterable([(torch.zeros(B, F).double(), torch.zeros(B).long())], classes=C).spec

    def samples(self) -> Iterator[Sample]:
        draw = torch.Generator().manual_seed(5)
        for n in range(ITEMS):
            u = torch.randn(B, F, generator=draw, dtype=torch.float64)
            y = (u[:, :C].argmax(1) + n // 8) % C
            yield Sample(u, None if n in MISSING else y)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(F, 6), nn.Tanh(), nn.Linear(6, C)).double()


def settings(level="backprop", **fields):
    given = {"kind": "inprocess"}
    return Settings.model_validate(
        {
            "level": level,
            "dtype": "float64",
            "engine": given,
            "learning": {"lr": 0.5},
            "metrics": {"window": 1},
            **fields,
        }
    )


def late(delay):
    return LateLabels(Delayed(Drifting(), delay, tagged=False), delay)


def run(delay, level="backprop", **fields):
    given = {"model": net(), "resume": None, **fields}
    model, resume = given.pop("model"), given.pop("resume")
    return hamdist.train(model, late(delay), settings(level, **given), resume=resume)


def progressive(delay, model, lr=0.5):
    """Scores by sample, (right, loss), with the answers that come while questions are asked."""
    step = torch.optim.SGD(model.parameters(), lr)
    questions = list(Drifting().samples())
    events = [(n, 1, n) for n in range(ITEMS)]  # time, answers first, sample
    events += [(n + delay, 0, n) for n in range(ITEMS - delay)]
    asked, scores = {}, {}
    for _, kind, n in sorted(events):
        u, y = questions[n].u, questions[n].y
        if kind:
            asked[n] = model(u).detach()
            continue
        said = asked.pop(n)
        if y is None:
            continue
        right = int((said.argmax(1) == y).sum())
        scores[n] = right, functional.cross_entropy(said, y).item()
        step.zero_grad()
        functional.cross_entropy(model(u), y).backward()
        step.step()
    return scores


def scored(windows):
    return {w.first: (w.correct, pytest.approx(w.loss, abs=1e-12)) for w in windows}


@pytest.mark.parametrize("delay", [1, 2, 5, 30])
def test_backprop_is_progressive_validation(delay):
    own = net()
    wanted = progressive(delay, own)
    result = run(delay)
    (windows,) = result.windows.values()
    assert wanted == scored(windows)
    assert all(w.first == w.last for w in windows)
    assert result.samples == ITEMS
    pairs = zip(result.model.parameters(), own.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12

    central = train_centralised(net(), late(delay), settings())
    assert wanted == scored(central.windows["centralised"])
    assert central.samples == ITEMS


def test_one_item_late_is_not_late():
    """River's protocol too: an answer comes before the next question."""
    plain = hamdist.train(net(), Drifting(), settings())
    (a,), (b,) = plain.windows.values(), run(1).windows.values()
    assert scored(a) | {ITEMS - 1: 0} == scored(b) | {ITEMS - 1: 0}


def test_scores_depend_on_the_delay():
    totals = []
    for delay in (1, 5, 20):
        (windows,) = run(delay).windows.values()
        totals.append(sum(w.correct for w in windows) / sum(w.rows for w in windows))
    assert len(set(totals)) == 3


@pytest.mark.parametrize("level", ["trace", "heads", "backprop"])
def test_a_run_gone_on_with(tmp_path, level):
    whole = run(4, level)
    kept = {"path": str(tmp_path), "every": 11, "keep": 1}
    run(4, level, snapshots=kept, steps=20)
    on = run(4, level, resume=tmp_path)
    assert_equal(whole, on)
    assert whole.windows == on.windows


@pytest.mark.ray
@pytest.mark.parametrize("level", ["trace", "heads"])
def test_both_engines(session, leaves_no_socket, level):
    whole = run(4, level)
    spread = run(4, level, engine={"kind": "ray", "actors": 2})
    assert_equal(whole, spread)
    assert whole.windows == spread.windows


@pytest.mark.parametrize("level", ["trace", "heads"])
def test_other_levels_score_what_they_said(level):
    """Oracle: the run that is shown the same passes, of which only some have a label."""
    given = late(4)
    passes = list(given.samples())
    other = hamdist.train(net(), from_iterable(passes, classes=C), settings(level))
    result = run(4, level)
    for name, block in result.blocks.items():
        for key, theta in block.theta.items():
            assert torch.equal(theta, other.blocks[name].theta[key])
    assert result.samples * 2 == other.samples


def test_several_readouts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(F, C).double(), nn.Linear(F, C).double()

        def forward(self, x):
            return {"a": self.a(x), "b": self.b(x)}

    torch.manual_seed(0)
    made = Two()
    items = [(s.u, {"a": s.y, "b": s.y}) for s in Drifting().samples()]
    stream = from_iterable(items, classes={"a": C, "b": C})
    twice = LateLabels(Delayed(stream, 3, tagged=False), 3)
    result = hamdist.train(copy.deepcopy(made), twice, settings())
    for name, part in (("a", made.a), ("b", made.b)):
        assert progressive(3, part) == scored(result.windows[name])


def test_a_step_size_that_falls_does_so_by_samples():
    """Not by passes, of which there are twice as many."""
    own = net()
    step = torch.optim.SGD(own.parameters(), 0.5)
    questions = list(Drifting().samples())
    for n in range(3, ITEMS):
        u, y = questions[n - 3].u, questions[n - 3].y
        if y is not None:
            step.param_groups[0]["lr"] = 0.5 * (1 - n / ITEMS)
            step.zero_grad()
            functional.cross_entropy(own(u), y).backward()
            step.step()
    result = run(3, learning={"lr": 0.5, "decay": "linear"}, steps=ITEMS)
    pairs = zip(result.model.parameters(), own.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12


def test_settings_and_what_does_not_go():
    made = make_stream(StreamSettings(late_targets=5), seed=0, dtype=torch.float32)
    assert isinstance(made, LateLabels)
    waits = StreamSettings(late_targets=5, relearn="wait")
    assert isinstance(make_stream(waits, seed=0, dtype=torch.float32), Rejoin)
    with pytest.raises(
        LevelError, match="labels that come 4 samples late with presentation 'hold'"
    ):
        run(4, "local")
    with pytest.raises(SettingsError, match="LateLabels got a Paced stream"):
        LateLabels(Paced(Drifting(), 1.0), 2)
    with pytest.raises(ValueError, match="'relearn' is 'again' with 'pace'"):
        StreamSettings(late_targets=5, relearn="again", pace={"period": 1.0})
