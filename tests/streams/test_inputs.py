"""Oracle: hand-written samples. Streams for models that take several inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hamdist.dynamics.graph.inputs import by_parent, call_model, is_input
from hamdist.errors import StreamError
from hamdist.streams import Checker, InputSpec, Sample, Smooth, from_iterable

A, B, Y = torch.arange(6.0).view(2, 3), torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 1])


def stream(*items):
    return from_iterable(items, classes=2)


def test_inputs_by_name_and_by_number():
    named = stream(({"ids": B, "x": A.numpy()}, Y))
    numbered = stream(((A, B), Y), {"u": [A, B], "y": Y})
    assert named.spec.inputs == {
        "ids": InputSpec((2, 2), torch.int64),
        "x": InputSpec((2, 3), torch.float32),
    }
    assert (named.spec.u_shape, named.spec.u_dtype) == ((2, 2), torch.int64)
    assert list(named.spec.parents) == ["u.ids", "u.x"]
    (item,) = named.samples()
    assert torch.equal(item.inputs["x"], A)
    assert item.u is item.inputs["ids"]
    for item in numbered.samples():
        assert torch.equal(item.inputs["0"], A)
        assert torch.equal(item.inputs["1"], B)


def test_one_input_is_as_it_was():
    one = stream((A, Y))
    assert one.spec.inputs is None
    assert one.spec.parents == {"u": ((2, 3), torch.float32)}
    (item,) = one.samples()
    assert item.inputs is None


def test_the_checker_takes_and_copies_them():
    plan = stream(({"x": A, "ids": B}, Y))
    check = Checker(plan.spec, equal_batches=True)
    item = Sample(A, Y, inputs={"x": A.t().contiguous().t(), "ids": B})
    good = check.check(0, item)
    assert good.inputs["x"].is_contiguous()
    assert torch.equal(good.inputs["x"], A)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": A}, "sample 3 has 'x', the first one had 'x', 'ids': give all samples the same"),
        (None, "sample 3 has one input, u, the first one had 'x', 'ids'"),
        (
            {"x": A[:, :2], "ids": B},
            r"sample 3: u\['x'\] has shape \(2, 2\), earlier ones had \(B, 3",
        ),
        ({"x": A, "ids": B.float()}, r"sample 3: u\['ids'\] has dtype torch.float32"),
        ({"x": A[:1], "ids": B}, "different batches .'x' 1, 'ids' 2."),
        ({"x": A / 0, "ids": B}, r"sample 3: u\['x'\]\[0, 0\] is nan"),
    ],
)
def test_items_that_do_not_fit(inputs, said):
    check = Checker(stream(({"x": A, "ids": B}, Y)).spec, equal_batches=False)
    with pytest.raises(StreamError, match=said):
        check.check(3, Sample(A, Y, inputs=inputs))


def test_several_where_there_was_one():
    check = Checker(stream((A, Y)).spec, equal_batches=False)
    with pytest.raises(StreamError, match="sample 0 has 'x', the first one had one input, u"):
        check.check(0, Sample(A, Y, inputs={"x": A}))


def test_what_is_no_input():
    with pytest.raises(StreamError, match=r"u\['ids'\] is a list"):
        stream(({"ids": [1, 2]}, Y))
    with pytest.raises(StreamError, match="u has no inputs"):
        stream(({}, Y))
    with pytest.raises(StreamError, match="Smooth moves one input"):
        Smooth(stream(({"x": A, "z": A}, Y)), 3)


def test_names_and_calls():
    def model(x, z):
        return x - z

    assert is_input("u")
    assert is_input("u.x")
    assert not is_input("unit")
    assert list(by_parent({"x": A, "z": A})) == ["u.x", "u.z"]
    assert torch.equal(call_model(model, {"z": A, "x": 2 * A}), A)
    assert torch.equal(call_model(model, {"1": A, "0": 2 * A}), A)
    assert torch.equal(call_model(torch.neg, A), -A)
    assert np.array_equal(by_parent(A)["u"], A)
