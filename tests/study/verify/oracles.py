"""Oracles of golden files: Hamilton's equations on a whole network at once, by automatic
differentiation of H' (blocks see only their neighbours); the midpoint rule by hand, in numpy.

A case is a mapping of arrays in the golden format (hamdist/study/verify/oracles/golden.py): what is
given are its constants, its samples and the first entry of every trajectory; `replay` computes the
trajectories. `python tests/study/verify/oracles.py` writes `shipped_cases` into
tests/golden/autograd.

K: ticks, B: batch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

StateArray: TypeAlias = NDArray[Any]
NetworkCase: TypeAlias = dict[str, StateArray]
States: TypeAlias = dict[str, Tensor]

TRAJECTORIES = ("h", "z", "om", "th")


class _Network:
    """f_v, f^y and H' of a case, over all blocks at once, and its constants. eta_z: by block;
    eta_omega, beta: by parameter."""

    def __init__(self, case: Mapping[str, StateArray], theta: Sequence[str]) -> None:
        spec = json.loads(str(case["spec"]))
        self.nodes: list[tuple[str, list[str], list[tuple[int, str]]]] = spec["nodes"]
        self.out: tuple[list[str], list[tuple[int, str]]] = spec["out"]
        self.names = [name for name, _, _ in self.nodes]
        self.sign = int(case["s"])
        self._cost = float(case.get("r_w", 0.0))
        self._cross_entropy = str(case["loss"]) == "ce"
        self._c = {v: float(case.get(f"c.{v}", case["c"])) for v in self.names}

        def eta(block: str, costate: str) -> float:
            return float(case.get(f"eta.{block}", case.get(costate, case["eta"])))

        self.eta_z = {v: eta(v, "eta_z") for v in self.names}
        self.eta_omega = {p: eta(p.partition(".")[0], "eta_omega") for p in theta}
        self.beta = {p: float(case.get(f"beta.{p}", case.get("beta", np.nan))) for p in theta}

    def velocity(self, u: Tensor, h: States, theta: States, m: Sequence[float]) -> States:
        """dh_v/dt = m_v c_v ( -h_v + f_v(parents) )."""
        f = {v: _chain(v, layers, _joined(u, h, ps), theta) for v, ps, layers in self.nodes}
        return {v: m[i] * self._c[v] * (f[v] - h[v]) for i, v in enumerate(self.names)}

    def loss(self, u: Tensor, h: States, theta: States, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return (y, L)."""
        parents, layers = self.out
        y = _chain("y", layers, _joined(u, h, parents), theta)
        if self._cross_entropy:
            return y, functional.cross_entropy(y, target)
        return y, 0.5 * (y - target).square().sum(1).mean()

    def cost(self, theta: States) -> Tensor:
        """r_w/2 |theta|^2."""
        total = torch.zeros((), dtype=torch.float64)
        for t in theta.values():
            total = total + t.square().sum()
        return 0.5 * self._cost * total


def _joined(u: Tensor, h: States, parents: Sequence[str]) -> Tensor:
    return torch.cat([u if p == "u" else h[p] for p in parents], dim=1)


def _chain(name: str, layers: Sequence[tuple[int, str]], x: Tensor, theta: States) -> Tensor:
    for i, (_, activation) in enumerate(layers):
        x = x @ theta[f"{name}.{i}.W"].T + theta[f"{name}.{i}.b"]
        x = torch.tanh(x) if activation == "tanh" else x
    return x


def replay(case: Mapping[str, StateArray]) -> NetworkCase:
    """Return the case with its trajectories: h, z, om, th (K + 1 entries), y, L, Hp (K entries).
    Without a target y is NaN and L is 0."""
    K = len(case["u"])
    h, z, omega, theta = (
        {key.partition(".")[2]: torch.tensor(a[0]) for key, a in case.items() if _is(key, q)}
        for q in TRAJECTORIES
    )
    net = _Network(case, list(theta))
    masks = case.get("mask_node", np.ones((K, len(net.names))))
    missing = case.get("missing", np.zeros(K, dtype=bool))
    order, held = str(case["order"]), int(case.get("held", 1))
    entries: dict[str, list[Any]] = {q: [] for q in (*TRAJECTORIES, "y", "L", "Hp")}
    for k in range(K + 1):
        if case.get("reset", False) and k and k % held == 0:
            h, z = ({v: torch.zeros_like(t) for v, t in s.items()} for s in (h, z))
        for q, now in zip(TRAJECTORIES, (h, z, omega, theta), strict=True):
            entries[q].append(now)
        if k == K:
            break
        u, target = torch.tensor(case["u"][k]), torch.tensor(case["yhat"][k])
        tau, phi = float(case["tau"][k]), 0.0 if missing[k] else float(case["phi"][k])
        h, theta = _leaves(h), _leaves(theta)
        velocity = net.velocity(u, h, theta, masks[k])
        after = {v: (h[v] + tau * velocity[v]).detach() for v in h}
        work, cost = _inner(z, velocity), net.cost(theta)
        seen = _leaves(after) if order == "sequential" else h
        y, L = net.loss(u, seen, theta, target)
        read, carried = _grad(phi * L, seen), _grad(work, h)
        z_after = {
            v: z[v] + tau * (-net.sign * (read[v] + carried[v]) - net.eta_z[v] * z[v]) for v in z
        }
        moving = _inner(z_after if order == "sequential" else z, velocity)
        slope = _grad(phi * L + cost + moving, theta)
        later = {
            p: omega[p] + tau * (-net.sign * slope[p] - net.eta_omega[p] * omega[p]) for p in theta
        }
        used = omega if order == "simultaneous" else later
        entries["y"].append(torch.full_like(y, torch.nan) if missing[k] else y.detach())
        entries["L"].append(0.0 if missing[k] else L.item())
        entries["Hp"].append((phi * L + cost + work).item())
        theta = {p: theta[p].detach() - tau * net.beta[p] * used[p] for p in theta}
        h, z, omega = after, z_after, later
    replayed = {k: a for k, a in case.items() if k.partition(".")[0] not in TRAJECTORIES}
    for q in TRAJECTORIES:
        for key in entries[q][0]:
            replayed[f"{q}.{key}"] = torch.stack([e[key].detach() for e in entries[q]]).numpy()
    replayed["y"] = torch.stack(entries["y"]).numpy()
    replayed["L"], replayed["Hp"] = np.array(entries["L"]), np.array(entries["Hp"])
    return replayed


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
    """Return the gradients of `of`, zero by what it does not depend on."""
    if not of.requires_grad:
        return {key: torch.zeros_like(value) for key, value in wrt.items()}
    grads = torch.autograd.grad(of, list(wrt.values()), retain_graph=True, allow_unused=True)
    return {
        key: torch.zeros_like(value) if g is None else g
        for (key, value), g in zip(wrt.items(), grads, strict=True)
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
    mask: StateArray | None = None,
    rest: bool = False,
    more: Mapping[str, Any] | None = None,
) -> NetworkCase:
    """Return a case without its trajectories, drawn from `seed`.

    held: ticks that a sample is shown. tau, phi: repeated to the length of the case. beta: one for
    all parameters, or several to be dealt out. rest: h, z and omega begin at zero. more: entries
    beyond the golden format.
    """
    random = np.random.default_rng(seed)
    dims = {"u": inputs, **{name: layers[-1][0] for name, _, layers in nodes}}
    outputs = out[1][-1][0] if out[1] else sum(dims[p] for p in out[0])
    shown = np.arange(ticks) // held
    samples = int(shown[-1]) + 1
    u = random.normal(size=(samples, batch, inputs))
    yhat: StateArray = random.normal(size=(samples, batch, outputs))
    if loss == "ce":
        yhat = random.integers(outputs, size=(samples, batch))
    case: NetworkCase = {
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
    return case | {key: np.array(value) for key, value in (more or {}).items()}


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


def cases() -> Iterator[tuple[str, NetworkCase]]:
    """Yield names and cases: together they have every term of the equations, in every order."""
    read = (("C", "u", "D"), ((4, "tanh"), (3, "linear")))
    for order in ("simultaneous", "omega_first", "sequential"):
        yield (
            f"{order}: cycles, self-loops, an output net on blocks and u",
            make_case(LOOPS, read, inputs=2, ticks=12, seed=1, order=order, batch=2),
        )
    for order in ("omega_first", "sequential"):
        yield (
            f"{order}: uneven tau, phi by tick, beta by parameter, cross-entropy",
            make_case(
                CHAIN, (("l3",), ((3, "linear"),)), inputs=3, ticks=12, seed=2, order=order,
                loss="ce", batch=3, tau=UNEVEN, phi=WAVING, beta=(0.1, 0.05, 0.3),
            ),
        )  # fmt: skip
    mask = np.random.default_rng(4).integers(2, size=(12, 3)).astype(float)
    yield (
        "sequential: a readout with a state, a mask",
        make_case(CHAIN, (("l3",), ()), inputs=3, ticks=12, seed=3, order="sequential", mask=mask),
    )
    yield (
        "simultaneous: s = +1",
        make_case(CHAIN, (("l3",), ()), inputs=3, ticks=10, seed=5, s=1, tau=(0.25,)),
    )
    for order in ("simultaneous", "sequential"):
        yield (
            f"{order}: a block with a state and an output module",
            make_case(
                CHAIN, (("l3",), ((4, "tanh"), (3, "linear"))), inputs=3, ticks=12, seed=10,
                order=order, beta=(0.1, 0.05, 0.3), more={"inner": True},
            ),
        )  # fmt: skip
        by_block = {"c.l2": 0.7, "eta.l1": 0.4, "eta_z": 0.1, "eta_omega": 0.3}
        yield (
            f"{order}: c and eta by block, eta_z and eta_omega",
            make_case(
                CHAIN, (("l3",), ((3, "linear"),)), inputs=3, ticks=12, seed=6, order=order,
                more=by_block,
            ),
        )  # fmt: skip
        yield (
            f"{order}: weight costs, missing targets",
            make_case(
                LOOPS, (("D",), ((3, "linear"),)), inputs=2, ticks=12, seed=7, order=order,
                more={"r_w": 0.2, "missing": np.arange(12) % 5 > 2},
            ),
        )  # fmt: skip
        yield (
            f"{order}: h and z cleared before each sample of 6 ticks",
            make_case(
                CHAIN, (("l3",), ()), inputs=3, ticks=12, seed=8, order=order, held=6,
                more={"held": 6, "reset": True},
            ),
        )  # fmt: skip
    yield (
        "omega_first: tau from the stream's time stamps",
        make_case(
            CHAIN, (("l3",), ((2, "linear"),)), inputs=3, ticks=12, seed=9, order="omega_first",
            tau=UNEVEN, more={"stamped": True},
        ),
    )  # fmt: skip


# -- the midpoint rule -----------------------------------------------------------------------------

LEAPFROG: dict[str, dict[str, Any]] = {
    "leapfrog tanh(W h + b)": {"kind": "tanh", "steps": 37, "seed": 17},
    "leapfrog tanh((W - W^T) h + b)": {"kind": "anti", "steps": 41, "seed": 18},
    "leapfrog -0.3 h + tanh(W h + b)": {"kind": "tanh", "steps": 26, "seed": 19, "leak": 0.3},
}


def leapfrog(
    kind: str, *, steps: int, tau: float, size: int, seed: int, leak: float = 0.0
) -> dict[str, StateArray]:
    """Return a case of the kind leapfrog, drawn from `seed`, by the equations in numpy

        z_N = dL/dh_N, z_{N+1} = 0,  z_k = z_{k+2} + 2 tau J_k^T z_{k+1}
        z_0 = z_2 + z_1 + tau J_0^T z_1,   dA = sum_k (tau or 2 tau) (z_{k+1} (1 - f_k^2)) h_k^T

    with J_k = diag(1 - f_k^2) A - lambda. leak: lambda.
    """
    random = np.random.default_rng(seed)
    W, b = random.normal(size=(size, size)) / np.sqrt(size), 0.1 * random.normal(size=size)
    h0, y = random.normal(size=size), random.normal(size=size)
    A = W - W.T if kind == "anti" else W

    def f(x: StateArray) -> StateArray:
        return np.asarray(np.tanh(A @ x + b))

    h = [h0, h0 + tau * (f(h0) - leak * h0)]
    for k in range(1, steps):
        h.append(h[k - 1] + 2 * tau * (f(h[k]) - leak * h[k]))
    dA, db = np.zeros_like(W), np.zeros_like(b)
    z, later = h[steps] - y, np.zeros_like(y)  # z_{k+1}, z_{k+2}
    for k in range(steps - 1, -1, -1):
        step = tau if k == 0 else 2 * tau
        slope = step * (1 - f(h[k]) ** 2) * z
        dA, db = dA + np.outer(slope, h[k]), db + slope
        before = later + A.T @ slope - step * leak * z
        z, later = (before + z if k == 0 else before), z
    return {
        "W": W, "b": b, "h0": h0, "y": y, "tau": np.array(tau), "N": np.array(steps),
        "kind": np.array(kind), "leak": np.array(leak), "h": np.stack(h), "db": db, "dh0": z,
        "dW": dA - dA.T if kind == "anti" else dA,
        "loss": np.array(0.5 * np.square(h[steps] - y).sum()),
    }  # fmt: skip


# -- files -----------------------------------------------------------------------------------------

NU, TAU = 4, 0.5
DEEP = (
    ("l1", ("u",), ((6, "tanh"),)),
    ("l2", ("l1",), ((5, "tanh"),)),
    ("l3", ("l2",), ((4, "tanh"),)),
    ("l4", ("l3",), ((2, "linear"),)),
)


def delay_free(samples: int = 12) -> NetworkCase:
    """Return HL Eq. 10, second form: phi = 1/tau in the tick in which the last layer moves."""
    ticks = NU * samples
    mask = np.equal.outer(np.arange(ticks) % NU, np.arange(NU)).astype(float)
    return make_case(
        DEEP, (("l4",), ()), inputs=3, ticks=ticks, seed=11, order="sequential", held=NU,
        tau=(TAU,), c=1 / TAU, eta=0.1, phi=(*[0.0] * (NU - 1), 1 / TAU), beta=(0.05,), mask=mask,
    )  # fmt: skip


def shipped_cases() -> dict[str, NetworkCase]:
    """Return the content of the files in tests/golden/autograd, by name."""
    named = {**dict(cases()), "delay-free: second form": delay_free()}
    made = {name: replay(case) for name, case in named.items()}
    made |= {name: leapfrog(**case, tau=0.08, size=6) for name, case in LEAPFROG.items()}
    words = {"s = +1": "s = plus 1", "-0.3 h": "leak", "W - W^T": "anti"}
    files = {}
    for name, entries in made.items():
        for text, word in words.items():
            name = name.replace(text, word)
        files["-".join(re.findall(r"\w+", name))] = entries
    return files


if __name__ == "__main__":
    folder = Path(__file__).parents[2] / "golden" / "autograd"
    folder.mkdir(exist_ok=True)
    for stem, entries in shipped_cases().items():
        np.savez_compressed(folder / f"{stem}.npz", **entries)
