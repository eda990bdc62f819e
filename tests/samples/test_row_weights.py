"""Weights of rows. Oracle: torch.optim.SGD, float64, on (1/n) sum_b w_b n_b l_b, written out with
torch's own losses without a reduction."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from dynamics.helpers import relative
from runtime.engines.test_engines_equal import assert_equal
from runtime.snapshots.test_snapshots import goes_on
from torch import nn
from torch.nn import functional

import hamdist
from hamdist.config import Settings
from hamdist.errors import LevelError, StreamError
from hamdist.streams import Delayed, LateLabels, from_iterable
from hamdist.study.run.baseline import train_centralised

B, F, C, STEPS, LR = 5, 6, 4, 9, 0.3
NAMES = {0: "u", 1: "y", 2: "weight"}
F64 = torch.float64
SMOOTHED = nn.CrossEntropyLoss(label_smoothing=0.2)


def net(outputs=C):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layers = [nn.Linear(F, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, outputs)]
        return nn.Sequential(*layers).double()


def rows(n, real=False, tokens=None):
    g = torch.Generator().manual_seed(n)
    shape = (B,) if tokens is None else (B, tokens)
    u = torch.randn(*shape, F, generator=g, dtype=F64)
    y = torch.randint(C, shape, generator=g)
    if tokens is not None:
        y[0, 1:] = -100
        y[1] = -100
    weights = torch.rand(B, generator=g, dtype=F64) * 3
    weights[2] = 0
    if n == 3:
        weights[:] = 0
    return u, torch.randn(B, C, generator=g, dtype=F64) if real else y, weights


def classes(p, y, w):
    return (w * functional.cross_entropy(p, y, reduction="none")).sum() / len(y)


def words(p, y, w):
    each = functional.cross_entropy(p.flatten(0, 1), y.flatten(), reduction="none")
    return (w[:, None] * each.view(y.shape)).sum() / (y != -100).sum()


def squares(p, y, w):
    return (w[:, None] * 0.5 * (p - y) ** 2).sum() / len(y)


def smoothed(p, y, w):
    each = functional.cross_entropy(p, y, reduction="none", label_smoothing=0.2)
    return (w * each).sum() / len(y)


KINDS = {
    "classes": (classes, "cross-entropy", {}),
    "words, some ignored": (words, "cross-entropy", {"tokens": 3}),
    "real values": (squares, "mse", {"real": True}),
    "a loss of the user's": (smoothed, SMOOTHED, {}),
}


def stream(made=None, steps=STEPS, **kind):
    made = made or [rows(n, **kind) for n in range(steps)]
    return from_iterable(made, classes=None if kind.get("real") else C, names=NAMES)


def by_sgd(oracle, batches):
    model, losses = net(), []
    optimiser = torch.optim.SGD(model.parameters(), lr=LR)
    for u, y, w in batches:
        optimiser.zero_grad()
        loss = oracle(model(u), y, w)
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
    return model, losses


def learned(source, level="backprop", **fields):
    given = {"engine": {"kind": "inprocess"}, "partition": {"blocks": 3}, **fields}
    return hamdist.train(
        net(), source, level=level, dtype="float64", learning={"lr": LR}, metrics={"window": 1},
        **given,
    )  # fmt: skip


def losses_of(result):
    (windows,) = result.windows.values()
    return [w.loss for w in windows]


@pytest.mark.parametrize("level", ["backprop", "pipeline"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_sgd_on_weighed_rows(kind, level):
    oracle, loss, options = KINDS[kind]
    model, losses = by_sgd(oracle, [rows(n, **options) for n in range(STEPS)])
    micro = {"microbatches": 2} if level == "pipeline" else {}
    result = learned(stream(**options), level, loss=loss, locality=micro)
    assert relative(result.model.parameters(), model.parameters()) <= 1e-12
    assert losses_of(result) == pytest.approx(losses, abs=1e-12)


def test_compare_has_them_too():
    given = {"learning": {"lr": LR}, "metrics": {"window": 1}, "dtype": "float64"}
    result = train_centralised(net(), stream(), Settings.model_validate(given))
    model, losses = by_sgd(classes, [rows(n) for n in range(STEPS)])
    assert relative(result.model.parameters(), model.parameters()) <= 1e-12
    assert losses_of(result) == pytest.approx(losses, abs=1e-12)


@pytest.mark.parametrize("level", ["trace", "local", "heads", "pipeline"])
def test_weights_of_one_change_nothing_and_rows_of_none_are_not_learned(level):
    batches = [rows(n) for n in range(STEPS)]
    plain = learned(from_iterable([(u, y) for u, y, _ in batches], classes=C), level)
    ones = learned(stream([(u, y, torch.ones(B)) for u, y, _ in batches]), level)
    assert relative(ones.model.parameters(), plain.model.parameters()) <= 1e-12
    assert losses_of(ones) == pytest.approx(losses_of(plain), abs=1e-12)
    other = [(u.clone(), y.clone(), w) for u, y, w in batches]
    for u, y, _ in other:
        u[2], y[2] = 0, 0  # of weight 0
    (a, b) = (learned(stream(one), level).model.parameters() for one in (batches, other))
    assert relative(a, b) <= 1e-12
    assert (
        relative(learned(stream(batches), level).model.parameters(), ones.model.parameters()) > 1e-3
    )


class Weighed:
    portable = True

    def __init__(self, steps=24):
        self.steps, self.spec = steps, stream().spec

    def samples(self):
        return stream(list(itertools.islice(map(rows, itertools.count()), self.steps))).samples()


@pytest.mark.parametrize("level", ["trace", "heads", "local"])
def test_snapshots(level, tmp_path):
    def run(engine, resume, **fields):
        return learned(Weighed(), level, engine=engine, resume=resume, **fields)

    goes_on(run, tmp_path, 7)


@pytest.mark.ray
def test_both_engines(session, leaves_no_socket):
    spread = learned(Weighed(), "heads", engine={"kind": "ray", "actors": 2})
    assert_equal(learned(Weighed(), "heads"), spread)


def test_labels_that_come_late_bring_theirs():
    result = learned(LateLabels(Delayed(stream(), 2, tagged=False), 2))
    model, asked, losses = net(), {}, []
    optimiser = torch.optim.SGD(model.parameters(), lr=LR)
    for n in range(STEPS):
        if n >= 2:
            u, y, w = rows(n - 2)
            losses.append(classes(asked[n - 2], y, w).item())
            optimiser.zero_grad()
            classes(model(u), y, w).backward()
            optimiser.step()
        asked[n] = model(rows(n)[0]).detach()
    assert relative(result.model.parameters(), model.parameters()) <= 1e-12
    assert losses_of(result) == pytest.approx(losses, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_compared_with_the_gradient_of_the_weighted_loss(kind, monkeypatch):
    """The oracle: at level `backprop` both are equal."""
    monkeypatch.setattr("hamdist.runtime.engines.inprocess.PROGRESS_SECONDS", 0.0)
    (_, loss, given), seen = KINDS[kind], []
    made = [rows(n, **given) for n in range(4, 20)]
    settings = {"engine": {"kind": "inprocess"}, "dtype": "float64", "metrics": {"alignment": 4}}
    hamdist.train(
        net(),
        stream(made, **given),
        level="backprop",
        loss=loss,
        trackers=[seen.append],
        **settings,
    )
    cosines = [c for e in seen if e.name == "alignment" for c in e.cosines.values()]
    assert len(cosines) > 3
    assert min(cosines) > 1 - 1e-9


def test_outputs_of_their_own_have_the_weights_of_the_row():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = net(), net(C)

        def forward(self, x):
            return {"a": self.a(x), "b": self.b(x)}

    def batch(n):
        (u, y, w), (_, values, _) = rows(n), rows(n, real=True)
        return {"x": u, "first": y, "second": values, "w": w}

    names = {"x": "u", "first": "y.a", "second": "y.b", "w": "weight"}
    made = from_iterable([batch(n) for n in range(STEPS)], classes={"a": C}, names=names)
    result = hamdist.train(
        copy.deepcopy(Two()), made, level="backprop", dtype="float64", learning={"lr": LR},
        loss={"a": "cross-entropy", "b": "mse"}, engine={"kind": "inprocess"},
    )  # fmt: skip
    for part, oracle, real in ((result.model.a, classes, False), (result.model.b, squares, True)):
        model, _ = by_sgd(oracle, [rows(n, real=real)[:2] + rows(n)[2:] for n in range(STEPS)])
        assert relative(part.parameters(), model.parameters()) <= 1e-12


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (torch.ones(B - 1), r"give a number from 0 on for each of its 5 rows"),
        (-torch.ones(B), "a number from 0 on"),
        (torch.full((B,), torch.nan), "a number from 0 on"),
        ([1.0] * B, "weight is a list"),
    ],
)
def test_weights_that_are_none(weights, said):
    u, y, _ = rows(0)
    with pytest.raises(StreamError, match=said):
        learned(stream([(u, y, weights)]))


def test_where_weights_have_no_place():
    u, y, w = rows(0)
    with pytest.raises(StreamError, match=r"names=\{0: \"u\", 1: \"y\", 2: \"weight\"\}"):
        from_iterable([(u, y, w)], classes=C)
    with pytest.raises(StreamError, match="at most one 'weight'"):
        from_iterable([(u, y, w, w)], classes=C, names={**NAMES, 3: "weight"})
    with pytest.raises(StreamError, match="a target or weight, and loss 'model' has none"):
        from_iterable([{"x": u, "w": w}], names={"x": "u", "w": "weight"}, model_loss="loss")
    with pytest.raises(LevelError, match="labels by a loss of its own"):
        learned(stream(), "trace", rules={"block*": "mono-forward"})
