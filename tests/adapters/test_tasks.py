"""Tasks one after the other: the figures of continual learning, by hand and as Avalanche's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import hamdist
from hamdist.adapters.tasks import Task, TaskScores, from_benchmark, learn_tasks
from hamdist.errors import SettingsError

TABLE = [[0.1, 0.2, 0.3], [0.9, 0.4, 0.2], [0.7, 0.8, 0.5], [0.5, 0.9, 1.0]]


def test_figures_of_a_table_by_hand():
    scores = TaskScores(("a", "b", "c"), torch.tensor(TABLE, dtype=torch.float64))
    assert scores.average == pytest.approx((0.5 + 0.9 + 1.0) / 3)
    assert scores.forgetting.tolist() == pytest.approx([0.9 - 0.5, 0.8 - 0.9])
    assert scores.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.9 - 0.8)) / 2)
    assert scores.forward_transfer == pytest.approx(((0.4 - 0.2) + (0.5 - 0.3)) / 2)
    alone = TaskScores(("a",), torch.tensor([[0.1], [0.8]]))
    assert alone.average == pytest.approx(0.8)
    assert alone.backward_transfer != alone.backward_transfer  # NaN
    assert alone.forward_transfer != alone.forward_transfer


def test_figures_are_those_of_avalanche():
    forgetting = pytest.importorskip("avalanche.evaluation.metrics.forgetting_bwt")
    forward = pytest.importorskip("avalanche.evaluation.metrics.forward_transfer")
    bwt, fwt = forgetting.BWT(), forward.ForwardTransfer()
    for j in range(3):
        bwt.update(j, TABLE[j + 1][j], initial=True)
        fwt.update(j, TABLE[0][j], initial=True)
        if j < 2:
            bwt.update(j, TABLE[3][j])
        if j > 0:
            fwt.update(j, TABLE[j][j])
    scores = TaskScores(("a", "b", "c"), torch.tensor(TABLE, dtype=torch.float64))
    known = bwt.result()
    assert scores.backward_transfer == pytest.approx(sum(known.values()) / len(known))
    known = fwt.result()
    assert scores.forward_transfer == pytest.approx(sum(known.values()) / len(known))


def digits_by_twos():
    """Five tasks of two digits each, as Avalanche gives them."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)

    def experience(k, rows):
        some = [(x[i], int(y[i]), k) for i in rows if y[i] // 2 == k]
        return SimpleNamespace(dataset=some, current_experience=k)

    return SimpleNamespace(
        train_stream=[experience(k, range(1200)) for k in range(5)],
        test_stream=[experience(k, range(1200, len(x))) for k in range(5)],
    )


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def begin(**more):
    example = (torch.zeros(8, 64), torch.zeros(8, dtype=torch.int64))
    fixed = {"learning": {"lr": 0.1}, "idle": None, **more}
    return hamdist.start(make(), example=example, classes=10, **fixed)


def test_tasks_are_learned_and_forgotten_as_by_torch():
    """Level backprop against a loop of torch's own: the same table."""
    tasks, again = (list(from_benchmark(digits_by_twos(), batch=8)) for _ in range(2))
    with begin(level="backprop") as run:
        scores = learn_tasks(run, tasks)
    model = make()
    step = torch.optim.SGD(model.parameters(), 0.1)
    table = []
    for k in range(len(tasks) + 1):
        for u, y in again[k - 1].samples if k else ():
            step.zero_grad()
            nn.functional.cross_entropy(model(u), y).backward()
            step.step()
        with torch.no_grad():
            right = [(model(one.x).argmax(1) == one.y).double().mean() for one in tasks]
        table.append(torch.stack(right))
    torch.testing.assert_close(scores.accuracy, torch.stack(table))
    assert scores.names == ("0", "1", "2", "3", "4")
    assert scores.accuracy[1:].diagonal().min() > 0.9  # learned, and then
    assert scores.backward_transfer < -0.5  # forgotten


def test_what_are_no_tasks():
    with begin(level="backprop") as run, pytest.raises(SettingsError, match="at least one"):
        learn_tasks(run, [])
    example = (torch.zeros(2, 3), torch.zeros(2, 1))
    with hamdist.start(nn.Linear(3, 1), level="backprop", example=example, loss="mse") as run:
        task = Task("real", [], torch.zeros(4, 3), torch.zeros(4, 1))
        with pytest.raises(SettingsError, match="no classes"):
            learn_tasks(run, [task])
