"""Gradients that come with what their layers have read, against rows laid out by hand."""

from __future__ import annotations

import pytest
import torch
from dynamics.helpers import F64, noise
from torch import nn

from hamdist.config import InputsSettings
from hamdist.dynamics.graph.graph import Combine
from hamdist.dynamics.updates.whitening import InputStatistics, InputWhitening, whitened
from hamdist.dynamics.vjp.autograd import AutogradFunction

RULE = InputsSettings(memory=0.8, damping=0.3, look=1, refresh=2)


def cell_of(module, *, watched=True):
    return AutogradFunction(module, Combine.CONCAT, 0, watched=watched)


def pulled(cell, x, z, *, inputs=False):
    return cell.pull(cell.forward([x], [inputs]), z, inputs=inputs)


def by_hand(rows, pairs):
    """G' and g_b' of the last of several updates. rows: (R, I) of each; pairs: G (O, I) and g_b."""
    known = InputStatistics(RULE)
    for x, (g, g_b) in zip(rows, pairs, strict=True):
        known.see(x)
        found = whitened(g, g_b, known)
    return found


def plain(module, x, z):
    """G and g_b by autograd."""
    return torch.autograd.grad(module(x), [module.weight, module.bias], z)


def patches(x, size, stride, padding, dilation=1):
    """(B patches, C size size), written out."""
    x = nn.functional.pad(x, (padding,) * 4)
    reach = dilation * (size - 1) + 1
    return torch.stack(
        [
            one[:, i : i + reach : dilation, j : j + reach : dilation].reshape(-1)
            for one in x
            for i in range(0, x.shape[2] - reach + 1, stride)
            for j in range(0, x.shape[3] - reach + 1, stride)
        ]
    )


@pytest.mark.parametrize(("size", "stride", "padding", "dilation"), [(3, 2, 1, 1), (2, 2, 0, 2)])
def test_a_convolution_is_a_linear_layer_of_its_patches(size, stride, padding, dilation):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, size, stride, padding, dilation, dtype=F64)
    cell, rule = cell_of(conv), InputWhitening(RULE)
    xs = [noise(k, 4, 2, 6, 6) + 0.5 for k in range(5)]
    zs = [noise(10 + k, *conv(x).shape) for k, x in enumerate(xs)]
    for x, z in zip(xs, zs, strict=True):
        made = rule.applied(pulled(cell, x, z)[1])
    pairs = [plain(conv, x, z) for x, z in zip(xs, zs, strict=True)]
    rows = [patches(x, size, stride, padding, dilation) for x in xs]
    weight, bias = by_hand(rows, [(g.flatten(1), g_b) for g, g_b in pairs])
    torch.testing.assert_close(made[0], weight.view_as(conv.weight), rtol=0, atol=1e-12)
    torch.testing.assert_close(made[1], bias, rtol=0, atol=1e-12)


class Twice(nn.Module):
    """One layer called twice, on tokens; two that share a weight; one without a bias."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(3, 3, dtype=F64)
        self.one = nn.Linear(3, 3, dtype=F64)
        self.other = nn.Linear(3, 3, dtype=F64)
        self.other.weight = self.one.weight
        self.bare = nn.Linear(3, 3, bias=False, dtype=F64)
        self.mix = nn.MultiheadAttention(3, 1, batch_first=True, dtype=F64)

    def forward(self, h):
        self.seen = [h, torch.tanh(self.again(h))]
        h = self.other(self.one(self.again(self.seen[1])))
        h = self.bare(h)
        return h + self.mix(h, h, h)[0]


def test_calls_of_a_layer_count_together_and_layers_of_which_nothing_is_known_stay():
    torch.manual_seed(1)
    module = Twice()
    x, z = noise(1, 2, 4, 3), noise(2, 2, 4, 3)
    names = [name for name, _ in module.named_parameters()]
    own = dict(zip(names, pulled(cell_of(module, watched=False), x, z)[1], strict=True))
    found = InputWhitening(RULE).applied(pulled(cell_of(module), x, z)[1])
    made = dict(zip(names, found, strict=True))
    rows = torch.cat([h.detach().reshape(-1, 3) for h in module.seen])
    pair = own.pop("again.weight"), own.pop("again.bias")
    weight, bias = by_hand([rows], [pair])
    torch.testing.assert_close(made["again.weight"], weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(made["again.bias"], bias, rtol=0, atol=1e-12)
    assert (made["again.weight"] - pair[0]).norm() > 1e-3
    assert all(torch.equal(made[name], g) for name, g in own.items())


def test_the_module_is_left_as_it_was():
    """No hook stays on it, also where its forward fails; what goes to the parents is the same."""
    layer = nn.Linear(3, 2, dtype=F64)
    x, z = noise(3, 4, 3), noise(4, 4, 2)
    with_it, without = cell_of(layer), cell_of(layer, watched=False)
    assert torch.equal(
        pulled(with_it, x, z, inputs=True)[0][0], pulled(without, x, z, inputs=True)[0][0]
    )
    with pytest.raises(RuntimeError):
        with_it.forward([noise(3, 4, 5)], [False])
    assert not layer._forward_pre_hooks


def test_what_was_read_is_part_of_a_record_that_is_saved():
    """The second layer read what the first one made with the weights of its time."""
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(3, 4, dtype=F64), nn.Tanh(), nn.Linear(4, 2, dtype=F64))
    cell, x, z = cell_of(module), noise(5, 6, 3), noise(6, 6, 2)
    record = cell.forward([x], [False])
    expected = [one.clone() for _, (one,) in cell.pull(record, z, keep=True)[1].read]
    state = cell.held(record)
    cell.theta[0].add_(1.0)
    read = [one for _, (one,) in cell.pull(cell.rebuilt(state), z)[1].read]
    assert all(torch.equal(a, b) for a, b in zip(read, expected, strict=True))
    assert not torch.equal(read[1], torch.tanh(module[0](x)))
