"""Traced programs are graphs of torch.fx: what they compute, print, send, and leave as it was."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn

import hamdist
from hamdist.config import Grouping, PartitionSettings
from hamdist.dynamics.objective.losses import mse
from hamdist.dynamics.partition.split import split_module
from hamdist.errors import GraphError


class Named(nn.Module):
    """Two layers, of which the second has a name that modules of hamdist might have."""

    def __init__(self, name):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.add_module(name, nn.Linear(4, 2))
        self.name = name

    def forward(self, x):
        weight = self._modules[self.name].weight  # read, not called
        return nn.functional.linear(torch.relu(self.first(x)), weight)


class Quiet(nn.Module):
    """A target by no_grad, sizes of the batch, and steps that write in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        with torch.no_grad():
            still = self.a(x).mul_(2)
        y = torch.zeros(x.shape[0] * 2 + 1, 3, device=x.device)
        y[: x.shape[0]] = self.b(x) + still
        return y[: len(x)] ** 2


def blocks_of(model, x, blocks=1):
    settings = PartitionSettings(blocks=blocks)
    return split_module(model, mse, settings, Grouping.LAYER, example=x).blocks.values()


def passed(blocks, x):
    for block in blocks:
        x = block.module(x)
    return x


@pytest.mark.parametrize("name", ["output", "inputs", "program", "parts", "graph", "code"])
def test_a_model_may_have_parts_of_any_name(name):
    model, x = Named(name), torch.randn(5, 3)
    assert torch.equal(passed(blocks_of(model, x, 2), x), model(x))


def test_no_grad_is_that_of_the_model():
    model, x = Quiet(), torch.randn(4, 3)
    (block,) = blocks_of(model, x)
    for batch in (4, 7):
        u = torch.randn(batch, 3)
        assert torch.equal(block.module(u), model(u))
    theta = list(model.parameters())
    wanted = torch.autograd.grad(model(x).sum(), theta, allow_unused=True)
    found = torch.autograd.grad(block.module(x).sum(), theta, allow_unused=True)
    assert wanted[0] is None
    assert found[0] is None
    assert torch.equal(found[2], wanted[2])
    with torch.no_grad():
        assert not block.module(x).requires_grad
    with pytest.raises(RuntimeError):
        block.module(torch.randn(4, 5))  # fails where autograd is off
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "sent",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],  # noqa: S301
)
def test_a_block_is_sent_as_it_is(sent):
    model, x = Quiet(), torch.randn(4, 3)
    (block,) = blocks_of(model, x)
    block.module(x)
    other = sent(block.module)
    code = [m.hamdist_graph.python_code("self").src for m in (block.module, other)]
    assert code[0] == code[1]
    assert torch.equal(other(x), model(x))


def test_the_graph_of_a_model():
    graph = hamdist.traced(Quiet(), torch.randn(4, 3))
    assert isinstance(graph, fx.Graph)
    graph.lint()
    code = [line.split(";")[0].strip() for line in graph.python_code("self").src.splitlines()]
    start = code.index("def forward(self, u):")
    assert code[start : start + 13] == [
        "def forward(self, u):",
        "is_grad_enabled = torch.is_grad_enabled()",
        "_set_grad_enabled = torch._C._set_grad_enabled(False)",
        "a = self.a(u)",
        "mul_ = a.mul_(2)",
        "size = u.size(0)",
        "mul = size * 2",
        "add = mul + 1",
        "getattr_1 = u.device",
        "_set_grad_enabled_1 = torch._C._set_grad_enabled(is_grad_enabled)",
        "zeros = torch.zeros(add, 3, device = getattr_1)",
        "b = self.b(u)",
        "add_1 = b + mul_",
    ]


def test_a_model_that_cannot_be_followed():
    class Decides(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(GraphError, match="cannot be traced: .*depends on values of a tensor"):
        hamdist.traced(Decides(), torch.randn(4, 3))


class Checks(nn.Module):
    """What torch.fx's own tracer cannot read."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, x):
        assert isinstance(x, torch.Tensor)
        assert x.shape[1] == 3
        return x + self.outer(torch.relu(self.inner(x)))


def test_slices_of_what_torch_fx_cannot_read():
    from hamdist.dynamics.slicing.slice_graph import sliced

    torch.manual_seed(0)
    model = Checks().double()
    spec = hamdist.BlockSpec("a", model, ("u",), loss=mse, slices=2)
    x = torch.randn(4, 3, dtype=torch.float64)
    graph = sliced(hamdist.Graph([spec]), x.shape, x.dtype)
    assert len(graph.blocks) == 3
    values = {"u": x}
    for block in graph.blocks.values():
        inputs = [values[p] for p in block.parents]
        join = getattr(block.combine, "joined", None)
        values[block.name] = block.module(*(join(inputs) if join else inputs))
    assert torch.allclose(values["a"], model(x), rtol=0, atol=1e-14)
