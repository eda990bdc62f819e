"""Ordinary blocks with frozen weights, looked at tick by tick, and backpropagation beside them.

With beta = 0 and eta_omega = 1/tau

    omega_{k+1} = tau phi G_k,      phi G_k = phi dL/dtheta_k + z_k^T dh'/dtheta_k

so omega is the local gradient of the moment t_k, scaled (docs: concepts/equations; s = -1).
B: batch, P: weights of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from hamdist.config import Order, Settings, TargetOf
from hamdist.dynamics.blocks.hold import HoldBlock, HoldReadout
from hamdist.dynamics.graph.graph import Graph
from hamdist.dynamics.graph.merged import MergedGraph, merged_module
from hamdist.errors import LevelError
from hamdist.runtime.nodes.hold import HoldNode
from hamdist.runtime.nodes.node import Node
from hamdist.runtime.plan.plan import make_plan
from hamdist.streams import from_iterable
from hamdist.study.shared.exact_runs import PlanNodes, float64_settings

FrozenRunBlock: TypeAlias = HoldBlock | HoldReadout
BlockObserver: TypeAlias = Callable[[str, int, FrozenRunBlock], None]


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
