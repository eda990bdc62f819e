"""Labels that come late. Oracle: progressive validation with delay, written out for a plain model:
an event queue of questions and answers, as river's `evaluate.progressive_val_score(delay=...)`."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal
from runtime.snapshots.test_snapshots import folders, goes_on
from torch import nn
from torch.nn import functional

import hamdist
from hamdist.config import Settings, StreamSettings
from hamdist.errors import LevelError, SettingsError
from hamdist.streams import Delayed, LateLabels, Paced, Rejoin, Sample, from_iterable, make_stream
from hamdist.streams.sample import Emits
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
    passes = [s for s in given.samples() if s.emission.kind is not Emits.IDLE]
    other = hamdist.train(net(), from_iterable(passes, classes=C), settings(level))
    result = run(4, level)
    for name, block in result.blocks.items():
        for key, theta in block.theta.items():
            assert torch.equal(theta, other.blocks[name].theta[key])
    assert result.samples * 2 - 4 - len(MISSING) == other.samples


def by_delay(delay):
    """(sample that passes, sample whose label has come) of each emission."""
    labels = [None] * delay + list(range(ITEMS - delay))
    return [one for n, label in enumerate(labels) for one in ((None, label), (n, None))]


def by_ticks(emissions, c, lr=0.5):
    """Three layers, tick by tick, written out: block l does the forward of emission e in tick
    e c + l and the backward of the sample whose label it brings in tick e c + 4 - l, with the
    activations of that sample's forward pass and today's weights.

    Returns the losses by sample, of the predictions at arrival, and the weights.
    """
    layers = [m for m in three() if isinstance(m, nn.Linear)]
    W, b = ([getattr(m, name).detach().clone() for m in layers] for name in ("weight", "bias"))
    samples = list(Drifting().samples())
    h, sent, losses = {(n, -1): sample.u for n, sample in enumerate(samples)}, {}, {}
    for tick in range(len(emissions) * c + 5):
        for at in range(3):  # forward
            e, rest = divmod(tick - at, c)
            n = emissions[e][0] if not rest and 0 <= e < len(emissions) else None
            if n is not None:
                a = h[n, at - 1] @ W[at].T + b[at]
                h[n, at] = torch.tanh(a) if at < 2 else a
        for at in range(3):  # backward
            e, rest = divmod(tick - (4 - at), c)
            n = emissions[e][1] if not rest and 0 <= e < len(emissions) else None
            if n is None or samples[n].y is None:
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
    losses, weights = by_ticks(by_delay(delay), c)
    (windows,) = result.windows.values()
    assert {w.first: pytest.approx(w.loss, abs=1e-12) for w in windows} == losses
    pairs = zip(result.model.parameters(), weights, strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12
    assert result.staleness == delay + (4 // c + 1) // 2
    assert result.samples == ITEMS
    assert "learned with the trace of that time" in str(result.warnings)


@pytest.mark.parametrize("step", ["auto", "autograd"])
@pytest.mark.parametrize("level", ["trace", "backprop"])
def test_a_kept_trace_goes_on(tmp_path, level, step):
    """From each snapshot: in the first samples without a label, in the midst, behind the end."""

    def of(engine, resume, **fields):
        return kept(5, level, engine={**engine, "step": step}, resume=resume, **fields)

    goes_on(of, tmp_path, 4 if level == "trace" else 23)
    whole, behind = of({}, None), of({}, folders(tmp_path)[-1])
    assert_equal(whole, behind)
    assert behind.stream == whole.stream


def test_traces_are_let_go_when_they_have_learned():
    """Their number is that of the samples that wait, whatever the stream's length."""
    few, many = (kept(4, steps=steps).block_memory for steps in (15, ITEMS))
    assert {n: m.samples for n, m in few.items()} == {n: m.samples for n, m in many.items()}


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


# In which sample the label of each comes (with it, later, in another order, or never), by number.
COMES = {n: n + (7 * n) % 12 for n in range(ITEMS) if n % 9}


class Tagged:
    """`Drifting`, whose labels come by tags: numbers, or keys."""

    portable = True
    spec = Drifting.spec

    def __init__(self, keys=None):
        self.keys = keys or (lambda n: None)

    def samples(self):
        plain = list(Drifting().samples())
        for n, sample in enumerate(plain):
            late = {
                m if self.keys(m) is None else self.keys(m): plain[m].y
                for m in sorted(COMES, reverse=True)  # (of one sample: the youngest first)
                if COMES[m] == n
            }
            yield Sample(sample.u, late=late or None, key=self.keys(n))


def by_tags(model, lr=0.5):
    """Scores by sample as `progressive`, with labels that come by `COMES`."""
    step, questions = torch.optim.SGD(model.parameters(), lr), list(Drifting().samples())
    asked, scores = {}, {}
    for now in range(ITEMS):
        due = [n for n in sorted(COMES, reverse=True) if COMES[n] == now]
        for n in [n for n in due if n < now] + [n for n in due if n == now]:
            u, y = questions[n].u, questions[n].y
            if y is None:
                continue
            said = asked.pop(n) if n < now else model(u).detach()
            scores[n] = int((said.argmax(1) == y).sum()), functional.cross_entropy(said, y).item()
            step.zero_grad()
            functional.cross_entropy(model(u), y).backward()
            step.step()
        if now not in due or questions[now].y is None:
            asked[now] = model(questions[now].u).detach()
    return scores


def tagged(level="backprop", keys=None, kept=False, resume=None, patience=64, **fields):
    stream = LateLabels(Tagged(keys), patience=patience, kept=kept)
    given = {"partition": {"blocks": 3}, **fields}
    return hamdist.train(three(), stream, settings(level, **given), resume=resume)


def test_windows_of_labels_in_any_order_are_all_told(monkeypatch):
    """Two samples a window, in the order of their labels; it goes from the earlier to the later."""
    monkeypatch.setattr("hamdist.runtime.engines.inprocess.PROGRESS_SECONDS", 0.0)
    order, seen = list(by_tags(three())), []
    wanted = [(min(p), max(p)) for p in (order[i : i + 2] for i in range(0, len(order), 2))]
    assert [last for _, last in wanted] != sorted(last for _, last in wanted)
    two = settings(metrics={"window": 2}, partition={"blocks": 3})
    result = hamdist.train(three(), LateLabels(Tagged()), two, trackers=[seen.append])
    (windows,) = result.windows.values()
    assert [(w.first, w.last) for w in windows] == wanted
    assert [(e.first, e.last) for e in seen if e.name == "window"] == wanted


@pytest.mark.parametrize("keys", [None, "row {}".format, lambda n: 1000 - n])
def test_labels_by_tag_in_any_order_or_never(keys):
    own = three()
    wanted = by_tags(own)
    result = tagged(keys=keys)
    (windows,) = result.windows.values()
    assert wanted == scored(windows)
    assert result.samples == ITEMS
    known = {n: COMES[n] for n in COMES if n not in MISSING}
    waits = [sum(known.get(m, ITEMS) > n for m in range(n + 1)) for n in range(ITEMS)]
    assert result.stream == {"let_go": 0, "too_late": 0, "awaiting_most": max(waits)}
    pairs = zip(result.model.parameters(), own.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12
    central = train_centralised(three(), LateLabels(Tagged(keys)), settings())
    assert wanted == scored(central.windows["centralised"])


def test_the_protocol_of_river():
    """Order of questions and answers, and the scores, by river itself."""
    stream = pytest.importorskip("river.stream")
    metrics = pytest.importorskip("river.metrics")
    draw = torch.Generator().manual_seed(3)
    delays = (1 + torch.randint(15, (ITEMS,), generator=draw)).tolist()
    samples = [s for s in Drifting().samples() if s.y is not None]
    numbered = [({"n": n}, n) for n in range(len(samples))]
    model, late, asked, events = three(), {}, {}, []
    accuracy, loss = metrics.Accuracy(), metrics.CrossEntropy()
    step = torch.optim.SGD(model.parameters(), 0.5)
    for n, _, answer in stream.simulate_qa(numbered, None, lambda x, _: delays[x["n"]]):
        sample = samples[n]
        if answer is None:
            events.append(Sample(sample.u, late=late or None, key=f"question {n}"))
            asked[n] = model(sample.u).detach()
            late = {}
        elif len(events) < len(samples):  # (hamdist's run ends with the last question)
            late[f"question {n}"] = sample.y
            for p, y in zip(asked.pop(n).softmax(1).tolist(), sample.y.tolist(), strict=True):
                accuracy.update(y, p.index(max(p)))
                loss.update(y, dict(enumerate(p)))
            step.zero_grad()
            functional.cross_entropy(model(sample.u), sample.y).backward()
            step.step()
    given = LateLabels(from_iterable(events, classes=C))
    result = hamdist.train(three(), given, settings(partition={"blocks": 3}))
    (windows,) = result.windows.values()
    rows = sum(w.rows for w in windows)
    assert sum(w.correct for w in windows) / rows == accuracy.get()
    assert sum(w.loss * w.rows for w in windows) / rows == pytest.approx(loss.get(), abs=1e-12)


def tagged_emissions():
    for now in range(ITEMS):
        due = [n for n in sorted(COMES, reverse=True) if COMES[n] == now]
        yield from ((None, n) for n in due if n < now and n not in MISSING)
        yield now, (now if now in due else None)


@pytest.mark.parametrize(("speed", "c"), [(1, 1), (3, 3), ("inf", 5)])
def test_a_kept_trace_meets_its_label_by_tag(speed, c):
    result = tagged("trace", kept=True, locality={"speed": speed})
    losses, weights = by_ticks(list(tagged_emissions()), c)
    (windows,) = result.windows.values()
    assert {w.first: pytest.approx(w.loss, abs=1e-12) for w in windows} == losses
    pairs = zip(result.model.parameters(), weights, strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12


@pytest.mark.parametrize("kept", [False, True])
def test_more_samples_wait_than_there_is_patience(kept):
    """Oracle: the same run without the labels that come for those let go."""

    class Fewer(Tagged):
        def samples(self):
            waits, gone = [], set()
            for n, sample in enumerate(super().samples()):
                late = {m: y for m, y in (sample.late or {}).items() if m not in gone}
                waits = [m for m in [*waits, n] if late.get(m) is None]
                gone |= set(waits[:-5])
                waits = waits[-5:]
                yield Sample(sample.u, late=late or None)

    result = tagged("trace", kept=kept, patience=5)
    stream = LateLabels(Fewer(), kept=kept)
    fewer = hamdist.train(three(), stream, settings("trace", partition={"blocks": 3}))
    assert_equal(result, fewer)
    assert result.windows == fewer.windows
    assert result.stream["too_late"] > 5
    assert result.stream["awaiting_most"] == 5


@pytest.mark.parametrize("kept", [False, True])
def test_labels_by_tag_go_on(tmp_path, kept):
    def of(engine, resume, **fields):
        return tagged("trace", kept=kept, engine=engine, resume=resume, **fields)

    goes_on(of, tmp_path, 4)


def test_a_run_with_tags_is_prolonged(tmp_path):
    """Weights and place in the stream go on; samples of the first run are learned, not scored."""
    kept = {"path": str(tmp_path), "every": 7, "keep": 1}
    tagged("trace", snapshots=kept, steps=20)
    on = tagged("backprop", resume=tmp_path, snapshots={"path": None})
    (windows,) = on.windows.values()
    n = ITEMS - on.samples
    assert 0 < n <= 20
    late = {m: COMES[m] for m in COMES if m not in MISSING and COMES[m] < ITEMS}
    assert {w.first + n for w in windows} == {m for m in late if m >= n}


@pytest.mark.ray
@pytest.mark.parametrize("kept", [False, True])
def test_labels_by_tag_in_both_engines(session, leaves_no_socket, kept):
    whole = tagged("trace", keys=str, kept=kept)
    spread = tagged("trace", keys=str, kept=kept, engine={"kind": "ray", "actors": 2})
    assert_equal(whole, spread)
    assert whole.windows == spread.windows


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
    assert (made.spec.kept, made.spec.patience) == (True, 5)
    waits = StreamSettings(late_targets=5, relearn="wait")
    assert isinstance(make_stream(waits, seed=0, dtype=torch.float32), Rejoin)
    with pytest.raises(
        LevelError, match="labels that come up to 4 samples late with presentation 'hold'"
    ):
        run(4, "local")
    with pytest.raises(SettingsError, match="LateLabels got a Paced stream"):
        LateLabels(Paced(Drifting(), 1.0), 2)
    with pytest.raises(ValueError, match="'relearn' is 'again' with 'pace'"):
        StreamSettings(late_targets=5, relearn="again", pace={"period": 1.0})
