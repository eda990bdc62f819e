"""What people's batches are like: padding without a class, keys, class counts nobody says.

Oracles: torch.optim.SGD with `ignore_index`, and for levels that SGD does not know the same run
with a loss that leaves the rows out by weights of zero.
"""

from __future__ import annotations

import pytest
import torch
from runtime.engines.test_engines_equal import assert_equal
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import hamdist
from hamdist.config import Settings
from hamdist.dynamics.objective.losses import cross_entropy, make_loss
from hamdist.errors import GraphError, SettingsError, StreamError
from hamdist.runtime.results.scores import evaluate
from hamdist.streams import from_iterable
from hamdist.study.run.baseline import train_centralised

B, T, V, ITEMS = 4, 5, 7, 9
EMPTY = 4  # the sample of which no target counts


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(V, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, V)
        ).double()


def items(ignored):
    draw = torch.Generator().manual_seed(1)
    found = []
    for n in range(ITEMS):
        u, y = torch.randint(V, (2, B, T), generator=draw).unbind()
        y[torch.rand(B, T, generator=draw) < 0.4] = ignored
        if n == EMPTY:
            y[:] = ignored
        found.append((u, y))
    return found


def learned(items, ignored=-100, net=None, **fields):
    given = {"level": "backprop", "engine": {"kind": "inprocess"}, "dtype": "float64", **fields}
    if ignored != -100:
        given["ignore_index"] = ignored
    given = {"learning": {"lr": 0.3}, "metrics": {"window": 2}, **given}
    return hamdist.train(net or model(), items, **given)


def by_sgd(ignored):
    own = model()
    step = torch.optim.SGD(own.parameters(), 0.3)
    found = []
    for u, y in items(ignored):
        if (y == ignored).all():
            continue
        step.zero_grad()
        out = own(u)
        loss = functional.cross_entropy(out.flatten(0, 1), y.flatten(), ignore_index=ignored)
        loss.backward()
        step.step()
        known = y != ignored
        found.append((loss.item(), int((out.argmax(2) == y)[known].sum()), int(known.sum())))
    return own, found


def distance(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def own_loss(ignored):
    return lambda p, y: functional.cross_entropy(p.mT, y, ignore_index=ignored)


@pytest.mark.parametrize("loss", ["built in", "own"])
@pytest.mark.parametrize("ignored", [-100, -1, 0])
def test_ignored_targets_are_left_out(ignored, loss):
    own = None if loss == "built in" else own_loss(ignored)
    result = learned(items(ignored), ignored, classes=V, loss=own)
    wanted, rows = by_sgd(ignored)
    assert distance(result.model, wanted) < 1e-12
    (windows,) = result.windows.values()
    assert sum(w.samples for w in windows) == ITEMS - 1
    assert sum(w.correct for w in windows) == sum(right for _, right, _ in rows)
    assert sum(w.rows for w in windows) == sum(counted for _, _, counted in rows)
    assert sum(w.loss for w in windows) == pytest.approx(sum(one for one, _, _ in rows), abs=1e-12)


def test_one_row_of_an_item():
    """Few numbers, which the C code would take."""
    u, y = torch.randn(6, 2, 3).double(), torch.tensor([[0, -100], [-100, -100], [1, 0]] * 2)
    nets = [nn.Linear(3, 2).double()]
    result = learned(list(zip(u, y, strict=True)), net=nets[0], level="trace")
    step = torch.optim.SGD(nets[0].parameters(), 0.3)
    for a, b in zip(u, y, strict=True):
        if (b >= 0).any():
            step.zero_grad()
            functional.cross_entropy(nets[0](a), b).backward()
            step.step()
    assert distance(result.model, nets[0]) < 1e-12


@pytest.mark.parametrize("level", ["trace", "heads", "local", "group", "delay-free"])
def test_at_every_level_as_by_weights(level):
    """Oracle: targets as weights of the classes, none for a row that does not count."""

    def weighed(prediction, weights):
        counted = weights.sum().clamp(min=1)
        return -(torch.log_softmax(prediction, -1) * weights).sum() / counted

    plain = [(u, y) for n, (u, y) in enumerate(items(-100)) if n != EMPTY]
    soft = [
        (u, functional.one_hot(y.clamp(min=0), V) * (y >= 0)[..., None].double()) for u, y in plain
    ]
    net = model() if level != "heads" else nn.Sequential(*model())
    a = learned(plain, net=net, level=level)
    b = learned(soft, net=net, level=level, loss=weighed)
    assert distance(a.model, b.model) < 1e-12
    assert distance(a.model, net) > 1e-4


@pytest.mark.ray
def test_both_engines(session, leaves_no_socket):
    given = {"level": "trace", "partition": {"blocks": 3}}
    alone = learned(items(-1), -1, **given)
    spread = learned(items(-1), -1, **given, engine={"kind": "ray", "actors": 2})
    assert_equal(alone, spread)


def test_centralised_and_held_out():
    settings = Settings.model_validate(
        {"dtype": "float64", "learning": {"lr": 0.3}, "ignore_index": -1, "loss": "cross-entropy"}
    )
    result = train_centralised(model(), from_iterable(items(-1), classes=V), settings)
    wanted, rows = by_sgd(-1)
    assert distance(result.model, wanted) < 1e-12
    (window,) = result.windows["centralised"]
    assert (window.correct, window.rows) == tuple(sum(r[i] for r in rows) for i in (1, 2))

    x, y = (torch.cat(part) for part in zip(*items(-1), strict=True))
    scores = evaluate(wanted, x, y, make_loss(settings.loss, -1), ignore_index=-1)
    with torch.no_grad():
        out, known = wanted(x), y != -1
        loss = functional.cross_entropy(out[known], y[known]).item()
    assert scores.loss == pytest.approx(loss, abs=1e-12)
    assert scores.accuracy == int((out.argmax(2) == y)[known].sum()) / int(known.sum())


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_a_loss_of_torch_leaves_out_what_scores_do(kind):
    def trained(**fields):
        data = [(torch.randn(2, 3), torch.tensor([0, 1]))]
        return hamdist.train(nn.Linear(3, 2), data, classes=2, level="backprop", **fields)

    with pytest.raises(GraphError, match=r"leaves out targets of 0, ignore_index is -100"):
        trained(loss=kind(ignore_index=0))
    (windows,) = trained(loss=kind(ignore_index=0), ignore_index=0).windows.values()
    assert windows[0].rows == 1


def test_class_weights_count_in_all_pieces(monkeypatch):
    """Oracle: the loss of all rows at once. The pieces have other classes each."""
    monkeypatch.setattr("hamdist.runtime.results.scores.CHUNK", 8)
    x, y = torch.randn(20, 3), torch.arange(20) // 10
    y[3] = -100
    model, loss = nn.Linear(3, 2), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0]))
    scores = evaluate(model, x, y, loss)
    assert scores.loss == pytest.approx(float(loss(model(x), y)), rel=1e-6)


def test_a_graph_says_itself_what_is_left_out():
    blocks = [hamdist.BlockSpec("y", nn.Linear(3, 2), ("u",), loss=cross_entropy)]
    stream = from_iterable([(torch.randn(2, 3), torch.tensor([0, 1]))], classes=2)
    with pytest.raises(GraphError, match=r"leaves out targets of -100, ignore_index is 0"):
        hamdist.train(hamdist.Graph(blocks), stream, ignore_index=0)


class Rows(Dataset):
    """Of Hugging Face's kind."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        draw = torch.Generator().manual_seed(i)
        ids = torch.randint(V, (T,), generator=draw)
        return {"input_ids": ids, "attention_mask": ids.ne(0).double(), "labels": ids.flip(0)}


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = model()

    def forward(self, input_ids, attention_mask, cache=None):
        return self.net(input_ids) * attention_mask[..., None]


def test_dict_batches_without_names_or_classes():
    loader = DataLoader(Rows(), batch_size=B)
    pairs = [
        ({"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]}, b["labels"])
        for b in loader
    ]
    a = learned(loader, net=Masked(), level="trace")
    b = learned(from_iterable(pairs, classes=V), net=Masked(), level="trace")
    assert distance(a.model, b.model) == 0
    assert a.windows == b.windows


@pytest.mark.parametrize("by", ["argument", "setting"])
def test_names(by):
    names = {"input_ids": "u", "labels": "y"}
    setting = {"settings": Settings.model_validate({"stream": {"names": names}})}
    given = {"names": names} if by == "argument" else setting
    a = learned(DataLoader(Rows(), batch_size=B), **given)
    b = learned([(d["input_ids"], d["labels"]) for d in DataLoader(Rows(), batch_size=B)])
    assert distance(a.model, b.model) == 0


def test_names_are_for_batches():
    stream = from_iterable(items(-100), classes=V)
    with pytest.raises(SettingsError, match="names has no effect on a IterableStream"):
        learned(stream, names={"a": "u"})
    with pytest.raises(StreamError, match=r"names={'input_ids': 'input_ids'.*'labels': 'y'}"):
        learned(DataLoader(Rows(), batch_size=B))  # nn.Sequential takes `input`


def test_classes_are_what_the_model_predicts():
    bad = items(-100)
    bad[3][1][0, 0] = V
    with pytest.raises(StreamError, match=rf"sample 3: .* is {V}, but with {V} classes"):
        learned(bad)
    for y in (torch.eye(4).long(), torch.arange(4)[:, None]):
        with pytest.raises(GraphError, match=r"one-hot targets give y.argmax\(1\).*squeeze"):
            learned([(torch.zeros(4, 3), y)], net=nn.Linear(3, 4), classes=4)
    same = learned(items(-100), classes=V)
    assert distance(learned(items(-100)).model, same.model) == 0
    with pytest.raises(GraphError, match=r"loss mse, but the targets have dtype torch.int64"):
        learned([(torch.randn(2, 3).double(), torch.ones(2, 1).long())],
                net=nn.Linear(3, 1).double(), loss="mse")  # fmt: skip


def test_targets_of_true_and_false_are_refused():
    data = [(u, y > 1) for u, y in items(-100)]
    with pytest.raises(StreamError, match=r"dtype torch.bool: convert .* y.long\(\)"):
        learned(data, classes=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dtype_of_torchs_own_is_the_type_of_all_weights(dtype):
    assert all(p.dtype == dtype for p in learned(items(-100), dtype=dtype).model.parameters())
