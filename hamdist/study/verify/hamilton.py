"""Hamilton's equations on a whole network at once, by automatic differentiation of H': the oracle
of the blocks, which see only their neighbours; and the checks against it.

A case is a mapping of arrays in the golden format (golden.py): what is given are its constants,
its samples and the first entry of every trajectory; `replay` computes the trajectories.

K: ticks, B: batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hamdist.study.verify.check import Check
from hamdist.study.verify.tick_golden import tick_checks

Array: TypeAlias = NDArray[Any]
Case: TypeAlias = dict[str, Array]
States: TypeAlias = dict[str, Tensor]


class _Network:
    """f_v, f^y and H' of a case, over all blocks at once."""

    def __init__(self, case: Mapping[str, Array]) -> None:
        spec = json.loads(str(case["spec"]))
        self.nodes: list[tuple[str, list[str], list[tuple[int, str]]]] = spec["nodes"]
        self.out: tuple[list[str], list[tuple[int, str]]] = spec["out"]
        self.names = [name for name, _, _ in self.nodes]
        self._cross_entropy = str(case["loss"]) == "ce"

    def velocity(self, u: Tensor, h: States, theta: States, c: float, m: Sequence[float]) -> States:
        """dh_v/dt = m_v c ( -h_v + f_v(parents) )."""
        f = {v: _chain(v, layers, _joined(u, h, ps), theta) for v, ps, layers in self.nodes}
        return {v: m[i] * c * (f[v] - h[v]) for i, v in enumerate(self.names)}

    def loss(self, u: Tensor, h: States, theta: States, target: Tensor) -> tuple[Tensor, Tensor]:
        """(y, L)."""
        parents, layers = self.out
        y = _chain("y", layers, _joined(u, h, parents), theta)
        if self._cross_entropy:
            return y, functional.cross_entropy(y, target)
        return y, 0.5 * (y - target).square().sum(1).mean()


def _joined(u: Tensor, h: States, parents: Sequence[str]) -> Tensor:
    return torch.cat([u if p == "u" else h[p] for p in parents], dim=1)


def _chain(name: str, layers: Sequence[tuple[int, str]], x: Tensor, theta: States) -> Tensor:
    for i, (_, activation) in enumerate(layers):
        x = x @ theta[f"{name}.{i}.W"].T + theta[f"{name}.{i}.b"]
        x = torch.tanh(x) if activation == "tanh" else x
    return x


def replay(case: Mapping[str, Array]) -> Case:
    """The case with its trajectories: h, z, om, th (K + 1 entries), y, L, Hp (K entries)."""
    net = _Network(case)
    K = len(case["u"])
    first = {
        q: {k.partition(".")[2]: torch.tensor(a[0]) for k, a in case.items() if _is(k, q)}
        for q in ("h", "z", "om", "th")
    }
    h, z, omega, theta = first["h"], first["z"], first["om"], first["th"]
    beta = {p: float(case.get(f"beta.{p}", case.get("beta", np.nan))) for p in theta}
    masks = case.get("mask_node", np.ones((K, len(net.names))))
    order, c, eta, s = str(case["order"]), float(case["c"]), float(case["eta"]), int(case["s"])
    entries: dict[str, list[Any]] = {q: [] for q in ("h", "z", "om", "th", "y", "L", "Hp")}
    for k in range(K + 1):
        for q, now in (("h", h), ("z", z), ("om", omega), ("th", theta)):
            entries[q].append(now)
        if k == K:
            break
        u, target = torch.tensor(case["u"][k]), torch.tensor(case["yhat"][k])
        tau, phi = float(case["tau"][k]), float(case["phi"][k])
        h, theta = _leaves(h), _leaves(theta)
        velocity = net.velocity(u, h, theta, c, masks[k])
        after = {v: (h[v] + tau * velocity[v]).detach() for v in h}
        work = _inner(z, velocity)
        if order == "sequential":
            seen = _leaves(after)
            y, L = net.loss(u, seen, theta, target)
            read, read_theta = _grad(phi * L, seen), _grad(phi * L, theta)
            carried = _grad(work, h)
            z_after = {v: z[v] + tau * (-s * (read[v] + carried[v]) - eta * z[v]) for v in z}
            moved = _grad(_inner(z_after, velocity), theta)
            slope = {p: read_theta[p] + moved[p] for p in theta}
        else:
            y, L = net.loss(u, h, theta, target)
            slope_h, slope = _grad(phi * L + work, h), _grad(phi * L + work, theta)
            z_after = {v: z[v] + tau * (-s * slope_h[v] - eta * z[v]) for v in z}
        later = {p: omega[p] + tau * (-s * slope[p] - eta * omega[p]) for p in theta}
        used = omega if order == "simultaneous" else later
        entries["y"].append(y.detach())
        entries["L"].append(L.item())
        entries["Hp"].append((phi * L + work).item())
        theta = {p: theta[p].detach() - tau * beta[p] * used[p] for p in theta}
        h, z, omega = after, z_after, later
    made = {k: a for k, a in case.items() if not any(_is(k, q) for q in first)}
    for q, values in first.items():
        for key in values:
            made[f"{q}.{key}"] = torch.stack([e[key].detach() for e in entries[q]]).numpy()
    made["y"] = torch.stack(entries["y"]).numpy()
    made["L"], made["Hp"] = np.array(entries["L"]), np.array(entries["Hp"])
    return made


def _is(key: str, quantity: str) -> bool:
    return key.startswith(f"{quantity}.")


def _leaves(values: States) -> States:
    return {key: value.detach().requires_grad_() for key, value in values.items()}


def _inner(z: States, velocity: States) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for v in z:
        total = total + (z[v].detach() * velocity[v]).sum()
    return total


def _grad(of: Tensor, wrt: States) -> States:
    """Zero where `of` does not depend on something."""
    if not of.requires_grad:
        return {key: torch.zeros_like(value) for key, value in wrt.items()}
    found = torch.autograd.grad(of, list(wrt.values()), retain_graph=True, allow_unused=True)
    return {
        key: torch.zeros_like(value) if g is None else g
        for (key, value), g in zip(wrt.items(), found, strict=True)
    }


def make_case(
    nodes: Sequence[tuple[str, Sequence[str], Sequence[tuple[int, str]]]],
    out: tuple[Sequence[str], Sequence[tuple[int, str]]],
    *,
    inputs: int,
    ticks: int,
    seed: int,
    order: str = "simultaneous",
    loss: str = "mse",
    batch: int = 1,
    held: int = 1,
    tau: Sequence[float] = (0.5,),
    phi: Sequence[float] = (1.0,),
    c: float = 1.5,
    eta: float = 0.2,
    s: int = -1,
    beta: Sequence[float] = (0.1,),
    mask: Array | None = None,
    rest: bool = False,
) -> Case:
    """What is given in a case, drawn from `seed`.

    held: ticks that a sample is shown. tau, phi: repeated to the length of the case. beta: one for
    all parameters, or several to be dealt out. rest: h, z and omega begin at zero.
    """
    random = np.random.default_rng(seed)
    dims = {"u": inputs, **{name: layers[-1][0] for name, _, layers in nodes}}
    outputs = out[1][-1][0] if out[1] else sum(dims[p] for p in out[0])
    shown = np.arange(ticks) // held
    samples = int(shown[-1]) + 1
    u = random.normal(size=(samples, batch, inputs))
    yhat: Array = random.normal(size=(samples, batch, outputs))
    if loss == "ce":
        yhat = random.integers(outputs, size=(samples, batch))
    case: Case = {
        "spec": np.array(json.dumps({"nodes": nodes, "out": out, "dims": dims})),
        "u": u[shown],
        "yhat": yhat[shown],
        "tau": np.resize(np.array(tau), ticks),
        "phi": np.resize(np.array(phi), ticks),
        "c": np.array(c),
        "eta": np.array(eta),
        "s": np.array(s),
        "order": np.array(order),
        "loss": np.array(loss),
    }
    names = []
    for name, parents, layers in (*nodes, ("y", *out)):
        width = sum(dims[p] for p in parents)
        for i, (size, _) in enumerate(layers):
            for part, shape in (("W", (size, width)), ("b", (size,))):
                names.append(f"{name}.{i}.{part}")
                scale = 1 / np.sqrt(width)
                case[f"th.{names[-1]}"] = scale * random.normal(size=(1, *shape))
                start = np.zeros(shape) if rest else 0.1 * random.normal(size=shape)
                case[f"om.{names[-1]}"] = start[None]
            width = size
    for name, _, _ in nodes:
        shape = (batch, dims[name])
        for q in ("h", "z"):
            start = np.zeros(shape) if rest else 0.3 * random.normal(size=shape)
            case[f"{q}.{name}"] = start[None]
    if len(beta) == 1:
        case["beta"] = np.array(beta[0])
    else:
        case |= {f"beta.{n}": np.array(beta[i % len(beta)]) for i, n in enumerate(names)}
    if mask is not None:
        case["mask_node"] = mask
    return case


LOOPS = (
    ("A", ("u", "A"), ((3, "tanh"),)),
    ("B", ("u", "A", "C"), ((4, "tanh"), (3, "tanh"))),
    ("C", ("B",), ((3, "tanh"),)),
    ("D", ("A", "C", "D"), ((2, "tanh"),)),
)
CHAIN = (
    ("l1", ("u",), ((5, "tanh"),)),
    ("l2", ("l1",), ((4, "tanh"),)),
    ("l3", ("l2",), ((2, "linear"),)),
)
UNEVEN = (0.3, 0.5, 0.2, 0.6, 0.45)
WAVING = (1.0, 0.4, 0.0, 1.3)


def cases() -> Iterator[tuple[str, Case]]:
    """Names and cases: together every term of the equations, in every order."""
    read = (("C", "u", "D"), ((4, "tanh"), (3, "linear")))
    for order in ("simultaneous", "omega_first", "sequential"):
        yield (
            f"{order}: cycles, self-loops, an output net on blocks and u",
            make_case(LOOPS, read, inputs=2, ticks=24, seed=1, order=order, batch=2),
        )
    for order in ("omega_first", "sequential"):
        yield (
            f"{order}: uneven tau, phi by tick, beta by parameter, cross-entropy",
            make_case(
                CHAIN, (("l3",), ((3, "linear"),)), inputs=3, ticks=24, seed=2, order=order,
                loss="ce", batch=3, tau=UNEVEN, phi=WAVING, beta=(0.1, 0.05, 0.3),
            ),
        )  # fmt: skip
    mask = np.random.default_rng(4).integers(2, size=(24, 3)).astype(float)
    yield (
        "sequential: a readout with a state, a mask",
        make_case(CHAIN, (("l3",), ()), inputs=3, ticks=24, seed=3, order="sequential", mask=mask),
    )
    yield (
        "simultaneous: s = +1",
        make_case(CHAIN, (("l3",), ()), inputs=3, ticks=10, seed=5, s=1, tau=(0.25,)),
    )


def checks(full: bool) -> Iterator[Check]:  # noqa: ARG001
    for name, case in cases():
        yield from tick_checks(replay(case), name, "autograd of H'")
