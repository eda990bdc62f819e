"""Oracle: torch's own cross-entropy. Which axis of a prediction holds the classes."""

from __future__ import annotations

import pytest
import torch
from dynamics.helpers import F64, noise
from torch.nn import functional

import hamdist
from hamdist.dynamics.objective.losses import class_axis, cross_entropy
from hamdist.dynamics.objective.prequential import count_correct
from hamdist.errors import GraphError
from hamdist.streams import from_iterable


def classes(most, *shape):
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("prediction", "target", "axis"),
    [
        ((4, 3), (4,), 1),
        ((4, 3, 5), (4, 5), 1),  # torch's own form
        ((4, 5, 3), (4, 5), 2),  # a language model's
        ((4, 3, 8, 8), (4, 8, 8), 1),
        ((4, 8, 8, 3), (4, 8, 8), 3),
        ((4, 3, 5), (4, 3, 5), 1),  # probabilities
    ],
)
def test_the_axis_of_the_classes(prediction, target, axis):
    assert class_axis(prediction, target) == axis
    y = noise(0, *prediction)
    if prediction == target:
        t = torch.softmax(noise(1, *target), 1)
        assert torch.equal(cross_entropy(y, t), functional.cross_entropy(y, t))
        return
    t = classes(3, *target)
    assert torch.equal(cross_entropy(y, t), functional.cross_entropy(y.movedim(axis, 1), t))
    right = sum(int(p.argmax() == c) for p, c in zip(y.movedim(axis, -1).reshape(-1, 3),
                                                     t.reshape(-1), strict=True))  # fmt: skip
    assert count_correct(y, t) == (right, t.numel())


def test_both_axes_would_do():
    with pytest.raises(ValueError, match=r"\(4, 6, 6\) has its classes on axis 1 or on the last"):
        class_axis((4, 6, 6), (4, 6))

    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(x)

    items = [(torch.randn(4, 6, 6), classes(6, 4, 6))]
    with pytest.raises(GraphError, match="give a loss of your own"):
        hamdist.train(Square(), from_iterable(items, classes=6), level="backprop")


def test_a_prediction_of_other_rows():
    items = [(torch.randn(4, 6, 5), classes(3, 4, 7))]
    with pytest.raises(GraphError, match=r"classes of \(4, 5\), but the targets are \(4, 7\)"):
        hamdist.train(torch.nn.Conv1d(6, 3, 1), from_iterable(items, classes=3), level="backprop")


def test_losses_by_output():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 1)

        def forward(self, x):
            return self.a(x), self.b(x)

    items = [(noise(0, 4, 3), {"out1": noise(1, 4, 1)})] * 3
    fields = {"level": "backprop", "dtype": "float64"}
    result = hamdist.train(Two().to(F64), from_iterable(items), loss={"out1": "mse"}, **fields)
    assert list(result.blocks) == ["out1"]
    assert result.model.a.weight.shape == (2, 3)  # not learned, and still there
    for loss, said in (
        ({"out2": "mse"}, "loss name the output 'out2'; the model's outputs are 'out0', 'out1'"),
        ({"out1": "mean"}, "loss 'mean' is unknown; known: cross-entropy, mse"),
    ):
        with pytest.raises(hamdist.HamdistError, match=said):
            hamdist.train(Two().to(F64), from_iterable(items), loss=loss, **fields)
    one = torch.nn.Conv1d(1, 1, 1, dtype=F64)
    with pytest.raises(GraphError, match="but the model returns one tensor; give one loss"):
        hamdist.train(one, [(noise(0, 2, 1, 1), noise(1, 2, 1, 1))], loss={"a": "mse"}, **fields)
