"""Steps on whitened inputs against autograd: the same step in coordinates of their own."""

import pytest
import torch

from hamdist.config import InputsSettings
from hamdist.dynamics.updates.whitening import InputStatistics, InputWhitening, whitened
from hamdist.dynamics.vjp.gradient import Column, Gradient, Outer, dense

ROWS, INPUTS, OUTPUTS = 12, 5, 3
RULE = InputsSettings(memory=0.9, damping=0.2, look=2, refresh=3)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.7


def test_the_step_is_one_of_plain_descent_in_whitened_coordinates() -> None:
    """y = V s (x - mu) + c with V = W P^(-1/2), s = P^(1/2), c = b + W mu: gradients of V and c by
    autograd, one step there, brought back to W and b, is the step along G' and g_b'."""
    layer = InputStatistics(RULE)
    for k in range(7):
        layer.see(drawn(ROWS, INPUTS, seed=k))
    assert layer.mean is not None
    assert layer.inverse is not None
    x, z = drawn(ROWS, INPUTS, seed=20), drawn(ROWS, OUTPUTS, seed=21)
    w, b = drawn(OUTPUTS, INPUTS, seed=22), drawn(OUTPUTS, seed=23)
    values, vectors = torch.linalg.eigh(layer.inverse)
    root = vectors @ values.sqrt().diag() @ vectors.T
    v = torch.linalg.solve(root, w.T).T.requires_grad_()
    c = (b + w @ layer.mean).requires_grad_()
    ((x - layer.mean) @ root @ v.T + c).backward(z)
    assert v.grad is not None
    assert c.grad is not None
    stepped_w = (v - 0.1 * v.grad).detach() @ root
    stepped_b = (c - 0.1 * c.grad).detach() - stepped_w @ layer.mean
    g, g_b = layer.factors(Outer(z, x))
    torch.testing.assert_close(w - 0.1 * g.dense(), stepped_w, rtol=0, atol=1e-12)
    torch.testing.assert_close(b - 0.1 * g_b.dense(), stepped_b, rtol=0, atol=1e-12)
    tensors = whitened(z.T @ x, z.sum(0), layer)
    for made, expected in zip(tensors, (g, g_b), strict=True):
        torch.testing.assert_close(made, expected.dense(), rtol=0, atol=1e-12)  # type: ignore[attr-defined]


@pytest.mark.parametrize("centred", [False, True])
def test_statistics_follow_the_table(centred: bool) -> None:
    """mu, A and P after five updates, from the formulas written out in sums over all inputs."""
    layer = InputStatistics(
        InputsSettings(
            memory=0.9, damping=0.2, look=2, refresh=3, rule="centred" if centred else "whitened"
        )
    )
    xs = [drawn(ROWS, INPUTS, seed=k) for k in range(5)]
    for x in xs:
        layer.see(x)
    means = [x.mean(0) for x in xs]
    mus = [means[0]]
    for mean in means[1:]:
        mus.append(0.9 * mus[-1] + 0.1 * mean)
    assert layer.mean is not None
    torch.testing.assert_close(layer.mean, mus[-1], rtol=0, atol=1e-13)
    if centred:
        assert layer.covariance is None
        assert layer.inverse is None
        return
    a, known = torch.eye(INPUTS, dtype=torch.float64), []
    for k in (0, 2, 4):
        d = xs[k] - mus[k]
        a = 0.81 * a + 0.19 * (d.T @ d) / ROWS
        known.append(a)
    assert layer.covariance is not None
    assert layer.inverse is not None
    torch.testing.assert_close(layer.covariance, known[-1], rtol=0, atol=1e-13)
    of = known[1]  # update 3 takes what update 2 has seen
    scale = of.trace() / INPUTS
    p = 1.2 * torch.linalg.inv(of / scale + 0.2 * torch.eye(INPUTS, dtype=torch.float64))
    torch.testing.assert_close(layer.inverse, p, rtol=0, atol=1e-12)


def test_a_weight_meets_the_bias_of_its_own_layer_and_others_stay() -> None:
    """Two layers, one bias in front of its weight, one layer without a bias, and a tensor."""
    x = [drawn(ROWS, INPUTS, seed=k) for k in (1, 2, 3)]
    z = [drawn(ROWS, OUTPUTS, seed=k) for k in (4, 5, 6)]
    free = drawn(4, seed=7)
    g: list[Gradient] = [Column(z[0]), Outer(z[1], x[1]), free, Outer(z[0], x[0])]
    g += [Outer(z[2], x[2]), Column(z[1])]
    rule = InputsSettings(rule="centred")
    made = InputWhitening(rule).applied(g)
    for weight, bias, k in ((3, 0, 0), (1, 5, 1)):
        mu = x[k].mean(0)
        expected = z[k].T @ (x[k] - mu)
        torch.testing.assert_close(dense(made[weight]), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            dense(made[bias]), z[k].sum(0) - expected @ mu, rtol=0, atol=1e-12
        )
    assert made[2] is free
    assert made[4] is g[4]
