"""Oracles: torch.optim.SGD, the recursions of HL Appendix E written out with autograd, and golden
files of an independent implementation.

Hamilton's equations with beta = gamma/tau, eta = (1 - mu)/tau, phi = (1 - rho)/tau are gradient
descent, wherever the network stands in them.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamics.helpers import F64, mlp, noise
from torch.nn import functional

from hamdist.config import Settings
from hamdist.runtime.train.train import train
from hamdist.streams import from_iterable
from hamdist.study.verify.oracles.golden import file_checks

STEPS, CLASSES = 20, 3
PLACEMENTS = {
    "output net": {"locality": {"grouping": "network", "order": "omega-first"}},
    "state net": {
        "locality": {"grouping": "network", "order": "sequential", "readout": "state"},
        "dynamics": {"reset": {"h": "sample", "z": "sample"}},
    },
    "split": {
        "locality": {"order": "sequential"},
        "partition": {"cuts": ["4"]},
        "dynamics": {"reset": {"h": "sample", "z": "sample"}},
    },
}
GOLDEN = Path(__file__).parents[2] / "golden"
FILES = sorted(GOLDEN.glob("sgd_*.npz"))


def network():
    return mlp([4, 6, 5, CLASSES])


def samples():
    targets = torch.randint(CLASSES, (STEPS, 1), generator=torch.Generator().manual_seed(3))
    return list(zip(noise(2, STEPS, 1, 4), targets, strict=True))


def learned(
    placement, *, lr=0.1, momentum=0.0, dampening=0.0, tau=1.0, first=None, reset=None, **more
):
    """Losses of the samples, and the weights at the end. eta is one for both costates."""
    given = PLACEMENTS[placement]
    dynamics = {"tau": tau, "eta_z": (1 - momentum) / tau, **given.get("dynamics", {})}  # type: ignore[attr-defined]
    if reset is not None:
        dynamics["reset"] = reset
    learning = {"lr": lr, "momentum": momentum, "dampening": dampening}
    if first is not None:
        learning["first_step"] = first
    settings = Settings.model_validate(
        {
            "level": "local",
            "dtype": "float64",
            "locality": {**given["locality"], **more},
            "partition": given.get("partition", {}),  # type: ignore[attr-defined]
            "dynamics": dynamics,
            "learning": learning,
            "metrics": {"window": 1},
        }
    )
    result = train(network(), from_iterable(samples(), classes=CLASSES), settings)
    (windows,) = result.windows.values()
    return [w.loss for w in windows], list(result.model.state_dict().values())


def optimised(*, lr=0.1, momentum=0.0, dampening=0.0):
    """The same by torch.optim.SGD."""
    model, losses = network(), []
    optimiser = torch.optim.SGD(model.parameters(), lr, momentum, dampening)
    for u, y in samples():
        loss = functional.cross_entropy(model(u), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, list(model.state_dict().values())


def recursion(gradient_weight, keeps, lr, *, late=False):
    """omega_{k+1} = keeps omega_k + gradient_weight G_k from omega_0 = 0, and theta_{k+1} = theta_k
    - lr omega_{k+1}, or with `late` - lr omega_k."""
    model, losses = copy.deepcopy(network()), []
    weights = list(model.parameters())
    omega = [torch.zeros_like(w) for w in weights]
    for u, y in samples():
        loss = functional.cross_entropy(model(u), y)
        gradient = torch.autograd.grad(loss, weights)
        new = [keeps * o + gradient_weight * g for o, g in zip(omega, gradient, strict=True)]
        with torch.no_grad():
            for w, o in zip(weights, omega if late else new, strict=True):
                w -= lr * o
        omega = new
        losses.append(loss.item())
    return losses, [w.detach() for w in weights]


def assert_same(found, expected, bound=1e-13):
    assert found[0] == pytest.approx(expected[0], rel=0, abs=bound)
    assert len(found[1]) == len(expected[1])
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.dtype == F64
        assert (a - b).abs().max() <= bound


def apart(one, other):
    return max(float((a - b).abs().max()) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.3])
@pytest.mark.parametrize(("momentum", "dampening"), [(0, 0), (0.9, 0), (0.1, 0.5), (0.6, 0.3)])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_hamilton_is_gradient_descent(placement, momentum, dampening, tau):
    constants = {"momentum": momentum, "dampening": dampening}
    expected = optimised(**constants)
    assert apart(expected, (None, list(network().state_dict().values()))) > 0.05
    assert_same(learned(placement, tau=tau, **constants), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_without_momentum_the_dampening_does_nothing(placement):
    assert_same(learned(placement, dampening=0.5, tau=0.5), optimised(dampening=0.5))
    assert_same(learned(placement, dampening=0.5, tau=0.5), optimised())


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_dampened_first_step_is_the_plain_table(placement, tau):
    constants = {"momentum": 0.4, "dampening": 0.6}
    found = learned(placement, first="dampened", tau=tau, **constants)
    assert_same(found, recursion(0.4, 0.4, 0.1))
    assert apart(found, optimised(**constants)) > 1e-3


def test_a_dampened_first_step_without_momentum_is_a_smaller_rate():
    found = learned("output net", dampening=0.6, first="dampened")
    assert_same(found, recursion(0.4, 0.0, 0.1))


@pytest.mark.parametrize("placement", ["state net", "split"])
def test_the_costate_has_to_be_cleared(placement):
    """eta acts on z, too: what is left of the sample before is -tau eta z."""
    found = learned(placement, momentum=0.4, reset={"h": "sample"})
    assert apart(found, optimised(momentum=0.4)) > 1e-3


def test_the_simultaneous_order_is_one_step_late():
    found = learned("output net", momentum=0.4, tau=0.5, order="simultaneous")
    assert_same(found, recursion(1.0, 0.4, 0.1, late=True))
    assert apart(found, optimised(momentum=0.4)) > 1e-3


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path):
    checks = file_checks(path)
    assert len(checks) == (2 if "Linear" in path.name else 3)
    for check in checks:
        found = check.measure()
        assert found.difference <= check.bound, (check.name, found)


def test_golden_files_are_here():
    assert any("Linear" in p.name for p in FILES)
    assert any("MLP" in p.name for p in FILES)


def beginning(name, ticks=10):
    """The first ticks of a golden file, as one of its own."""
    with np.load(GOLDEN / name) as entries:
        data = {key: entries[key].copy() for key in entries.files}
    kept = int((data["snap"] <= ticks).sum())
    for key in data:
        if key in ("order", "L", "torch_loss"):
            data[key] = data[key][:ticks]
        elif key == "snap" or key.startswith(("th.", "om.")):
            data[key] = data[key][:kept]
    assert data["snap"][-1] == ticks
    finals = {f"torch_final.{k[3:]}": v[-1].copy() for k, v in data.items() if k.startswith("th.")}
    return data | finals


@pytest.mark.parametrize(
    "key", ["L", "torch_loss", "th.1.W", "om.0.b", "torch_final.1.b", "eta", "beta", "phi", "phi_0"]
)
def test_every_entry_of_a_golden_file_counts(tmp_path, key):
    data = beginning("sgd_MLP_Mom-a.npz")
    data[key].reshape(-1)[-1] += 1e-6
    np.savez(tmp_path / "other.npz", **data)
    for check in file_checks(tmp_path / "other.npz"):
        found = check.measure()
        assert found.difference > check.bound, check.name
        assert found.where.startswith(key.replace("torch_loss", "L of torch")), check.name


def test_a_golden_network_of_another_kind(tmp_path):
    """Three layers, tanh at the end, another input: its trajectory by autograd."""
    sizes, lr, momentum, dampening, tau = (3, 5, 4, 2), 0.05, 0.3, 0.2, 0.5
    spec = '[[5, "tanh"], [4, "linear"], [2, "tanh"]]'
    x, order = noise(1, 6, 3), np.arange(12) % 6
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    theta = {}
    for i in range(3):
        theta[f"{i}.W"] = noise(10 + i, sizes[i + 1], sizes[i]).requires_grad_()
        theta[f"{i}.b"] = noise(20 + i, sizes[i + 1]).requires_grad_()
    optimiser = torch.optim.SGD(theta.values(), lr, momentum, dampening)
    data = {f"th0.{k}": t.detach().clone().numpy() for k, t in theta.items()}
    rows = {k: [] for k in theta} | {f"om.{k}": [] for k in theta}
    losses = []
    for n in [*order, None]:
        for k, t in theta.items():
            rows[k].append(t.detach().clone().numpy())
            buffer = optimiser.state[t].get("momentum_buffer")
            rows[f"om.{k}"].append(np.zeros(t.shape) if buffer is None else buffer.clone().numpy())
        if n is None:
            break
        h = torch.tanh(functional.linear(x[n : n + 1], theta["0.W"], theta["0.b"]))
        h = functional.linear(h, theta["1.W"], theta["1.b"])
        h = torch.tanh(functional.linear(h, theta["2.W"], theta["2.b"]))
        loss = functional.cross_entropy(h, y[n : n + 1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    snap = [0, 1, 5, 12]
    for k in theta:
        data[f"th.{k}"] = np.stack([rows[k][j] for j in snap])
        data[f"om.{k}"] = np.stack([rows[f"om.{k}"][j] for j in snap])
        data[f"torch_final.{k}"] = rows[k][-1]
    numbers = {"lr": lr, "momentum": momentum, "dampening": dampening, "tau": tau}
    arrays = {"X": x.numpy(), "Y": y.numpy(), "order": order, "snap": np.array(snap), "spec": spec}
    curves = {"L": np.array(losses), "torch_loss": np.array(losses)}
    np.savez(tmp_path / "new.npz", **data, **numbers, **arrays, **curves)
    checks = file_checks(tmp_path / "new.npz")
    assert len(checks) == 3
    for check in checks:
        assert check.measure().difference <= check.bound, check.name


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("spec", '[[30, "gelu"], [3, "linear"]]', "'gelu'"),
        ("spec", "[]", "no layer"),
        ("torch_loss", np.zeros(3), "'torch_loss' has shape"),
        ("th0.0.W", np.zeros((2, 2)), "'th0.0.W' has shape"),
        ("snap", np.array([0, 401]), "'snap'"),
    ],
)
def test_a_golden_file_that_does_not_fit_fails_with_the_reason(tmp_path, key, value, message):
    data = beginning("sgd_MLP_Mom-a.npz")
    np.savez(tmp_path / "other.npz", **{**data, key: value})
    (check,) = file_checks(tmp_path / "other.npz")
    assert message in check.name
