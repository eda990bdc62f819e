"""Local gradients and backpropagation's, which they approach as signals get faster.

Ordinary blocks with frozen weights are looked at tick by tick. With beta = 0 and eta_omega = 1/tau

    omega_{k+1} = tau phi G_k,      phi G_k = phi dL/dtheta_k + z_k^T dh'/dtheta_k

so omega is the local gradient of the moment t_k, scaled (docs: concepts/equations; s = -1).
These local gradients are compared with backpropagation's for the input and the target of the same
moment, G*_i = dL(u(t_i), target(t_i))/dtheta at moments t_i:

    error   = sqrt( sum_i |G_i - G*_i|^2 / sum_i |G*_i|^2 )
    1 - cos = mean_i ( 1 - cos(G_i, G*_i) )

c is a velocity: hops per second of the stream's time. A tick takes tau = (c tau)/c seconds and
shows u(k tau). What a block knows is a few hops old, so for a smooth stream error ~ 1/c and
1 - cos ~ 1/c^2 (NILP; docs: concepts/equations). Before every look the network runs for as
many ticks as it needs to forget what it held, so that no look sees a transient.

B: batch, P: weights of the network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from scipy.special import bdtr
from torch import Tensor

from hamdist.config import Order, Settings, TargetOf
from hamdist.dynamics.blocks.hold import HoldBlock, HoldReadout
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.merged import MergedGraph, merged_module
from hamdist.dynamics.objective.losses import cross_entropy
from hamdist.errors import GraphError, LevelError
from hamdist.runtime.nodes.hold import HoldNode
from hamdist.runtime.nodes.node import Node
from hamdist.runtime.plan.plan import make_plan
from hamdist.streams import from_iterable
from hamdist.study.propagation.streams import F64, StreamShapes, TimedStream
from hamdist.study.shared.exact_runs import PlanNodes, float64_settings

FrozenRunBlock: TypeAlias = HoldBlock | HoldReadout
BlockObserver: TypeAlias = Callable[[str, int, FrozenRunBlock], None]
CYCLE_HOPS = 200  # hops that count on a cycle, where a signal never ends
TRIED = tuple(digit * 10.0**power for power in range(6) for digit in (1, 2, 5))


def watch(
    graph: Graph,
    settings: Settings,
    samples: Iterable[tuple[Tensor, Tensor]],
    look: BlockObserver,
    *,
    classes: int | None = None,
    prepare: Callable[[str, FrozenRunBlock], None] | None = None,
) -> None:
    """Step `graph` through `samples` as the engine in one process does.

    Raises LevelError if blocks are not held.

    Args:
        graph: the graph.
        settings: of the run.
        samples: (u, target) of each sample.
        look: called with (block's name, k, block) after tick k of each block; h and omega are then
            those of k + 1, z is that of k, and in the sequential order omega is.
        classes: of class targets.
        prepare: sets a block's first states.
    """
    stream = from_iterable(samples, classes=classes)
    plan = make_plan(graph.copy(), settings, stream.spec)
    network = PlanNodes(plan)
    for name, node in network.nodes.items():
        if not isinstance(node, HoldNode):
            raise LevelError(
                f"level {settings.level.value!r} shows a sample for a moment; only blocks of "
                "presentation 'hold' relax towards a gradient: use level 'local'"
            )
        if prepare is not None:
            prepare(name, node.block)

    def after_step(node: Node, tick: int) -> None:
        if isinstance(node, HoldNode) and node.tick is not None:
            look(node.name, tick, node.block)

    network.run(stream, after_step)


def frozen(
    tau: float,
    c: float,
    *,
    order: Order = Order.SIMULTANEOUS,
    target: TargetOf = TargetOf.CURRENT,
    eta_z: float = 0.0,
    eta_omega: float | None = None,
    sign: int = -1,
) -> Settings:
    """Return settings of level `local` with beta = 0 and phi = 1.

    tau in seconds, c in 1/seconds; eta_omega is 1/tau unless given.
    """
    dynamics = {
        "tau": tau,
        "c": c,
        "beta": 0.0,
        "phi": 1.0,
        "eta_z": eta_z,
        "eta_omega": 1 / tau if eta_omega is None else eta_omega,
        "sign": sign,
    }
    return float64_settings("local", locality={"order": order, "target": target}, dynamics=dynamics)


def in_float64(graph: Graph) -> Graph:
    """Return a copy in float64, in evaluation mode: dropout would draw other masks."""
    copied = graph.copy()
    for spec in copied.blocks.values():
        for module in (spec.module, spec.output):
            if module is not None:
                module.double().eval()
    return copied


def omegas(block: FrozenRunBlock) -> list[Tensor]:
    """Return the weight costates of a block and of its output module."""
    output = block.output_weights if isinstance(block, HoldBlock) else None
    return [*block.weights.omega, *(output.omega if output is not None else [])]


class Backprop:
    """Backpropagation's gradient of the loss of `graph` (of the sum of its readouts' losses)."""

    def __init__(self, graph: Graph) -> None:
        states = {name: spec.state_dict() for name, spec in graph.blocks.items()}
        self._module = merged_module(graph, states).double().eval()
        self._losses = {n: b.loss for n, b in graph.blocks.items() if b.loss is not None}
        params = dict(self._module.named_parameters())
        whole = isinstance(self._module, MergedGraph)
        self._theta: dict[str, list[Tensor]] = {
            name: [params[key] for key in _keys(graph, name, whole=whole)] for name in graph.blocks
        }

    @property
    def weights(self) -> int:
        """Return P."""
        return sum(t.numel() for tensors in self._theta.values() for t in tensors)

    def predictions(self, u: Tensor) -> dict[str, Tensor]:
        """Return the prediction of each readout from u (B, ...)."""
        predicted = self._module(u)
        return predicted if isinstance(predicted, dict) else {next(iter(self._losses)): predicted}

    def __call__(self, u: Tensor, y: Tensor) -> dict[str, list[Tensor]]:
        """Return dL/dtheta by block, in the order of `omegas`. All readouts have the target y."""
        predictions = self.predictions(u)
        loss = torch.zeros((), dtype=u.dtype)
        for name, take in self._losses.items():
            loss = loss + take(predictions[name], y)
        theta = [t for tensors in self._theta.values() for t in tensors]
        gradients = iter(torch.autograd.grad(loss, theta, materialize_grads=True))
        return {name: [next(gradients) for _ in tensors] for name, tensors in self._theta.items()}


def _keys(graph: Graph, name: str, *, whole: bool) -> Iterator[str]:
    """Yield the names, in the merged module, of the weights of a block that learn."""
    spec = graph.blocks[name]
    for part, module in (("module", spec.module), ("output", spec.output)):
        prefix = f"blocks.{name}.{part}." if whole else ""
        for key, p in () if module is None else module.named_parameters():
            if p.requires_grad:
                yield prefix + key


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return all tensors as one vector (P,)."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@dataclass(frozen=True)
class Network:
    """A graph in float64, the shapes that it takes and compares with, and its oracle."""

    graph: Graph
    values: StreamShapes
    backprop: Backprop

    @property
    def hops(self) -> int:
        """Return the hops of the longest path from the input to a readout and from there to a
        weight.
        """
        if not self.graph.acyclic:
            return CYCLE_HOPS
        return 2 * (self.graph.depth + 1)


def as_network(graph: Graph, input_shape: Sequence[int], batch: int = 4) -> Network:
    """Return `graph` (unchanged) for inputs of `input_shape`, given without the batch.

    Raises GraphError if it does not take them, or if its readouts cannot share a target.
    """
    graph = in_float64(graph)
    u = torch.zeros(batch, *input_shape, dtype=F64)
    graph.shapes(u.shape, F64)
    backprop = Backprop(graph)
    predictions = backprop.predictions(u)
    shapes = {tuple(p.shape) for p in predictions.values()}
    losses = {graph.blocks[name].loss for name in predictions}
    if len(shapes) > 1 or len(losses) > 1:
        raise GraphError(
            f"the readouts {', '.join(predictions)} differ in shape or loss ({shapes}); a study of "
            "speed compares all of them with one target"
        )
    shape = shapes.pop()
    if cross_entropy in losses:
        values = StreamShapes(tuple(u.shape), (batch, *shape[2:]), shape[1])
    else:
        values = StreamShapes(tuple(u.shape), shape)
    return Network(graph, values, backprop)


@cache
def ticks_to_settle(hops: int, c_tau: float, share: float) -> int:
    """Return the smallest k with P[ Binomial(k, c tau) < hops ] <= share.

    A signal moves on with probability c tau in a tick, and arrives when it has moved `hops` times.
    """
    k = hops
    while not_through(k, hops, c_tau) > share:
        k += 1
    return k


def not_through(k: int, hops: int, a: float) -> float:
    """Return P[ Binomial(k, a) < hops ]."""
    return 1.0 if k < hops else float(bdtr(hops - 1, k, a))


def local_gradients(
    network: Network,
    stream: TimedStream,
    c: float,
    c_tau: float,
    target: TargetOf = TargetOf.CURRENT,
) -> tuple[list[Tensor], int]:
    """Return the local gradient (P,) at each of the stream's looks, and the number of ticks run.

    Args:
        c, c_tau: speed in hops a second, and the hops that a signal takes in a tick.
        target: with which input's label a prediction is compared.
    """
    tau = c_tau / c
    settle = ticks_to_settle(network.hops, c_tau, stream.forgotten) + 1
    windows = [_window(stream, t, tau, settle) for t in stream.looks]
    ends = {end - 1: i for i, end in enumerate(itertools.accumulate(windows))}
    seen: list[dict[str, list[Tensor]]] = [{} for _ in windows]

    def samples() -> Iterator[tuple[Tensor, Tensor]]:
        for t, ticks in zip(stream.looks, windows, strict=True):
            for back in reversed(range(ticks)):
                yield stream.u(t - back * tau), stream.y(t - back * tau)

    def look(name: str, k: int, block: FrozenRunBlock) -> None:
        if k in ends:
            seen[ends[k]][name] = [o / tau for o in omegas(block)]

    settings = frozen(tau, c, target=target)
    watch(network.graph, settings, samples(), look, classes=network.values.classes)
    order = list(network.graph.blocks)
    return [flat(g for name in order for g in by[name]) for by in seen], sum(windows)


def _window(stream: TimedStream, t: float, tau: float, settle: int) -> int:
    """Return the ticks to run for a look at t: `settle`, or as many as the stream has been on."""
    if stream.begins == -math.inf:
        return settle
    return min(settle, math.floor((t - stream.begins) / tau + 1e-9) + 1)


def exact_gradients(network: Network, stream: TimedStream) -> list[Tensor]:
    """Return backpropagation's gradient (P,) at each of the stream's looks."""
    by_look = [network.backprop(stream.u(t), stream.y(t)) for t in stream.looks]
    return [flat(g for block in by.values() for g in block) for by in by_look]


def relative_error(local: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the error of the formula above; NaN where the exact gradient is zero."""
    apart = sum(float((g - e).square().sum()) for g, e in zip(local, exact, strict=True))
    size = sum(float(e.square().sum()) for e in exact)
    return math.sqrt(apart / size) if size else math.nan


def one_minus_cos(local: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the mean of 1 - cos = |f/|f| - e/|e||^2 / 2, which loses no digits where it is small.

    It is 1 where a gradient is zero and has no direction.
    """
    angles = []
    for f, e in zip(local, exact, strict=True):
        sizes = float(f.norm()), float(e.norm())
        pointing = min(sizes) > 0
        apart = float((f / sizes[0] - e / sizes[1]).square().sum()) / 2 if pointing else 1.0
        angles.append(apart)
    return sum(angles) / len(angles)
