"""Labels that come late. Oracle: progressive validation with delay, written out for a plain model:
an event queue of questions and answers, as river's `evaluate.progressive_val_score(delay=...)`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from runtime.test_engines_equal import assert_equal
from runtime.test_snapshots import folders, goes_on
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


def by_ticks(delay, c, items=ITEMS, lr=0.5):
    """Three layers, tick by tick, written out: block l does forward n in tick n c + l and backward
    n in tick (n + delay) c + 4 - l, with the activations of its forward pass and today's weights.

    Returns the losses by sample, of the predictions at arrival, and the weights.
    """
    layers = [m for m in three() if isinstance(m, nn.Linear)]
    W, b = ([getattr(m, name).detach().clone() for m in layers] for name in ("weight", "bias"))
    samples = list(itertools.islice(Drifting().samples(), items))
    h, sent, losses = {(n, -1): sample.u for n, sample in enumerate(samples)}, {}, {}
    for tick in range((items + delay) * c + 5):
        for at in range(3):  # forward
            n, rest = divmod(tick - at, c)
            if not rest and 0 <= n < items:
                a = h[n, at - 1] @ W[at].T + b[at]
                h[n, at] = torch.tanh(a) if at < 2 else a
        for at in range(3):  # backward
            n, rest = divmod(tick - (4 - at), c)
            n -= delay
            if rest or not 0 <= n < items - delay or samples[n].y is None:
                continue
            if at == 2:
                p, y = h[n, 2], samples[n].y
                losses[n] = functional.cross_entropy(p, y).item()
                g = (p.softmax(1) - functional.one_hot(y, C)) / B
            else:
                g = sent.pop((n, at)) * (1 - h[n, at] ** 2)
            sent[n, at - 1] = g @ W[at]
            W[at] -= lr * g.T @ h[n, at - 1]
            b[at] -= lr * g.sum(0)
    return losses, [t for pair in zip(W, b, strict=True) for t in pair]


def three():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Linear(F, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, C)]
        return nn.Sequential(*layers).double()


def kept(delay, level="trace", **fields):
    given = {"resume": None, "partition": {"blocks": 3}, **fields}
    resume = given.pop("resume")
    stream = LateLabels(Delayed(Drifting(), delay, tagged=False), delay, kept=True)
    return hamdist.train(three(), stream, settings(level, **given), resume=resume)


@pytest.mark.parametrize("step", ["auto", "autograd"])
@pytest.mark.parametrize(
    ("level", "speed", "c"), [("trace", 1, 1), ("trace", 2, 2), ("backprop", "inf", 5)]
)
@pytest.mark.parametrize("delay", [1, 4, 30])
def test_a_kept_trace_meets_its_label(delay, level, speed, c, step):
    engine = {"kind": "inprocess", "step": step}
    result = kept(delay, level, locality={"speed": speed}, engine=engine)
    losses, weights = by_ticks(delay, c)
    (windows,) = result.windows.values()
    assert {w.first: pytest.approx(w.loss, abs=1e-12) for w in windows} == losses
    pairs = zip(result.model.parameters(), weights, strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12
    assert result.staleness == delay + 4 // c
    assert result.samples == ITEMS
    assert "learned with the trace of that time" in str(result.warnings)


@pytest.mark.parametrize("level", ["trace", "backprop"])
def test_a_kept_trace_goes_on(tmp_path, level):
    """From each snapshot: in the first samples without a label, in the midst, behind the end."""

    def of(engine, resume, **fields):
        return kept(5, level, engine=engine, resume=resume, **fields)

    goes_on(of, tmp_path, 4 if level == "trace" else 23)
    whole, folder = kept(5, level), folders(tmp_path)[-1]
    assert_equal(whole, kept(5, level, resume=folder))


@pytest.mark.ray
def test_a_kept_trace_in_both_engines(session, leaves_no_socket):
    assert_equal(kept(4), kept(4, engine={"kind": "ray", "actors": 2}))


def test_a_kept_trace_is_compared_with_what_is_shown_again():
    """Centralised training has no gradient of an old forward pass with today's weights."""
    stream = LateLabels(Delayed(Drifting(), 4, tagged=False), 4, kept=True)
    central = train_centralised(net(), stream, settings())
    assert progressive(4, net()) == scored(central.windows["centralised"])


@pytest.mark.parametrize(
    ("level", "fields"),
    [
        ("heads", {}),
        ("local", {}),
        ("pipeline", {"locality": {"microbatches": 2}}),
        ("trace", {"locality": {"accumulate": 2}}),
        ("trace", {"learning": {"lr": 0.5, "heads": {"norm": True}}}),
    ],
)
def test_where_no_trace_is_kept(level, fields):
    with pytest.raises(LevelError, match=r"with the trace kept .* use stream.relearn: again"):
        kept(4, level, **fields)


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
    made = make_stream(StreamSettings(late_targets=5, relearn="trace"), seed=0, dtype=torch.float32)
    assert (made.spec.kept, made.spec.passes, made.spec.late) == (True, 1, 5)
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
