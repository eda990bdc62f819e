"""Prequential windows against counting by hand, sample by sample."""

from __future__ import annotations

import pytest
import torch

from hamdist.dynamics.objective.prequential import AT_ONCE, SMALL, Prequential, count_correct


def by_hand(items):
    """(loss, correct, rows) of all samples."""
    correct = rows = 0
    for prediction, target, _ in items:
        if target.is_floating_point():
            continue
        for row, right in zip(prediction.tolist(), target.tolist(), strict=True):
            correct += row.index(max(row)) == right
            rows += 1
    return sum(float(loss) for _, _, loss in items), correct, rows


def item(batch, classes, *, values=False):
    prediction = torch.randn(batch, classes)
    target = torch.randn(batch, classes) if values else torch.randint(classes, (batch,))
    return prediction, target, torch.rand(())


@pytest.mark.parametrize("every", [1, 7, 3 * AT_ONCE + 5])
def test_small_and_large_predictions_are_counted_alike(every):
    torch.manual_seed(0)
    batches = [3, 1, 2, SMALL // 4 + 1]  # the last one is not kept until it is counted
    items = [item(batches[i % 4], 4) for i in range(2 * AT_ONCE + 9)]
    metrics = Prequential(every)
    for n, (prediction, target, loss) in enumerate(items):
        metrics.record(n, prediction, target, loss)
    metrics.flush()
    assert [w.samples for w in metrics.windows[:-1]] == [every] * (len(metrics.windows) - 1)
    for window in metrics.windows:
        loss, correct, rows = by_hand(items[window.first : window.last + 1])
        assert window.samples == window.last + 1 - window.first
        assert window.loss == pytest.approx(loss, rel=1e-6)
        assert (window.correct, window.rows) == (correct, rows)
    assert metrics.windows[-1].last == len(items) - 1


def test_values_have_no_accuracy():
    torch.manual_seed(0)
    metrics = Prequential(10)
    for n in range(10):
        metrics.record(n, *item(2, 3, values=True))
    (window,) = metrics.windows
    assert (window.correct, window.rows, window.accuracy) == (0, 0, None)


def test_a_prediction_that_is_no_number_is_never_right():
    nan, target = float("nan"), torch.tensor([0, 1, 0, -100])
    rows = torch.tensor([[nan, nan], [0.0, 1.0], [nan, 2.0], [nan, 0.0]])
    assert count_correct(rows, target) == (1, 3)
    assert count_correct(torch.stack([rows, rows]), torch.stack([target, target])) == (2, 6)
    assert count_correct(torch.full((4, 2), nan), target) == (0, 3)
    infinite = torch.tensor([[float("inf"), 0.0]])
    assert count_correct(infinite, torch.tensor([0])) == (1, 1)


def test_several_classes_a_row():
    """(B, C, T) with (B, T): what a language model predicts."""
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 5, 7), torch.randint(5, (2, 7))
    metrics = Prequential(1)
    metrics.record(0, prediction, target, torch.tensor(1.0))
    right = sum(
        prediction[b, :, t].tolist().index(float(prediction[b, :, t].max())) == int(target[b, t])
        for b in range(2)
        for t in range(7)
    )
    assert (metrics.windows[0].correct, metrics.windows[0].rows) == (right, 14)


@pytest.mark.parametrize("rolls", [False, True])
def test_an_endless_stream_is_recorded_in_few_windows(rolls):
    """Every sample is in one of them; where they roll, the latest stay as short as they were."""
    metrics = Prequential(2, limit=8, rolls=rolls)
    prediction, target = torch.eye(3), torch.tensor([0, 1, 0])
    for sample in range(2000):
        metrics.record(sample, prediction, target, torch.tensor(float(sample)))
        assert len(metrics.windows) < 8
    metrics.flush()
    windows = metrics.windows
    assert [w.first for w in windows] == [0, *(w.last + 1 for w in windows[:-1])]
    assert windows[-1].last == 1999
    assert sum(w.loss for w in windows) == sum(range(2000))
    assert sum(w.correct for w in windows) * 3 == sum(w.rows for w in windows) * 2 == 2000 * 6
    latest = [w.samples for w in windows[-3:]]
    assert latest == [2, 2, 2] if rolls else min(w.samples for w in windows[:-1]) > 200
    again = Prequential(2, limit=8, rolls=rolls)
    again.load_state_dict(metrics.state_dict())
    assert (again.windows, again.joined) == (windows, metrics.joined)
