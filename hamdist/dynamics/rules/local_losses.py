"""Rules with a small learned model at each block: of the classes, of the message, of the inputs.

Mono-Forward    cross-entropy of M h; M and theta learn at once
                (Gong, Li and Abdulla 2025, arXiv:2501.09238)
Forward-        log(1 + exp(-s (g - theta))), g = mean h^2; s = 1 of real rows, -1 of others
Forward         (Hinton 2022, arXiv:2212.13345, Eq. 1)
synthetic       d = A h + c predicts B z; theta learns by d at once, A and c when z comes
gradients       (Jaderberg et al. 2017, Eq. 2 and 3)
difference      g(h) = tanh(V h + c) learns to undo f; with the displacement d of a state from
target prop.    its target: d_x = g(h) - g(h - d)     (Lee et al. 2015, Eq. 14 and 15)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hamdist.dynamics.rules.rule import BlockView, Messages, Rule, Signals, Updates
from hamdist.errors import GraphError


def _drawn(block: BlockView, outputs: int, inputs: int) -> nn.Parameter:
    """Return a matrix (outputs, inputs) that learns, N(0, 1/inputs)."""
    return nn.Parameter(block.randn_like(block.h.new_empty(outputs, inputs)) * inputs**-0.5)


class MonoForward(Rule):
    """Each block classifies by a matrix of its own; the label travels along, nothing comes back."""

    signals = Signals(back="none", label=True)

    def start(self, block: BlockView) -> dict[str, Any]:
        return {"M": _drawn(block, block.outputs[-1], block.h[0].numel())}

    def forward(self, block: BlockView, inputs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        h = block.f(inputs)
        return h, {"x": list(inputs), "h": h}

    def learn(self, block: BlockView, kept: Any, label: Tensor | None) -> Updates:
        h, M = (t.detach().requires_grad_() for t in (kept["h"], block.memory["M"]))
        with torch.enable_grad():
            loss = functional.cross_entropy(h.flatten(1) @ M.T, label)  # type: ignore[arg-type]
        z, dM = torch.autograd.grad(loss, (h, M))
        return {**block.vjp(kept["x"], z)[1], "memory:M": dM}


class ForwardForward(Rule):
    """Activity is to be high on real rows, low on others; nothing comes back, and no label.

    The last third of a batch's rows are not real, the third before them are: with a wrong and with
    the right label in their inputs, say. Of the others nothing is learned here; those are for the
    readout. The model takes the length out of each h before the next layer (nn.RMSNorm without
    weights).

    Args:
        threshold: theta.
    """

    signals = Signals(back="none")

    def __init__(self, threshold: float = 1.0) -> None:
        self.threshold = threshold

    def forward(self, block: BlockView, inputs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        h = block.f(inputs)
        return h, {"x": list(inputs), "h": h}

    def learn(self, block: BlockView, kept: Any, label: Tensor | None) -> Updates:  # noqa: ARG002
        h, rows = kept["h"].flatten(1), block.batch // 3
        if not rows:
            raise GraphError(
                f"block {block.name!r}: ForwardForward compares a third of a batch with another "
                f"one; this one has {block.batch} rows, give 3 or more"
            )
        s = torch.zeros_like(h[:, :1])
        s[-2 * rows : -rows], s[-rows:] = 1.0, -1.0
        g = h.square().mean(1, keepdim=True)
        slope = -s * torch.sigmoid(-s * (g - self.threshold)) * 2 * h / h.shape[1] / (2 * rows)
        return block.vjp(kept["x"], slope.view_as(kept["h"]))[1]


class SyntheticGradients(Rule):
    """A linear model of the message moves the weights at once, and learns when it comes."""

    def start(self, block: BlockView) -> dict[str, Any]:
        n = block.h[0].numel()
        zeros = block.h.new_zeros
        return {"A": nn.Parameter(zeros(n, n)), "c": nn.Parameter(zeros(n))}

    def forward(self, block: BlockView, inputs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        h = block.f(inputs)
        d = h.flatten(1) @ block.memory["A"].T + block.memory["c"]
        return h, {"x": list(inputs), "h": h, "d": d.view_as(h)}

    def learn(self, block: BlockView, kept: Any, label: Tensor | None) -> Updates:  # noqa: ARG002
        return block.vjp(kept["x"], kept["d"] / block.batch)[1]

    def backward(self, block: BlockView, kept: Any, message: Tensor) -> tuple[Messages, Updates]:
        messages, _ = block.vjp(kept["x"], kept["d"] / block.batch)
        wrong = kept["d"].flatten(1) / block.batch - message.flatten(1)
        return messages, {"memory:A": wrong.T @ kept["h"].flatten(1), "memory:c": wrong.sum(0)}


class DifferenceTargetPropagation(Rule):
    """Displacements of states from their targets go down through learned inverses.

    A message is z / eta of a state, d = eta B z its displacement: that of the readout is its own.

    Args:
        eta: size of a displacement; noise: of the inputs by which an inverse learns.
    """

    def __init__(self, eta: float = 0.1, noise: float = 0.1) -> None:
        self.eta, self.noise = eta, noise

    def start(self, block: BlockView) -> dict[str, Any]:
        if len(block.wanted) != 1:
            parents = len(block.wanted)
            raise GraphError(f"block {block.name!r} has {parents} parents: its inverse is of one")
        n, m = block.h[0].numel(), torch.Size(block.inputs[0]).numel()
        zeros = nn.Parameter(block.h.new_zeros(m))
        return {"V": _drawn(block, m, n), "c": zeros} if any(block.wanted) else {}

    def backward(self, block: BlockView, kept: Any, message: Tensor) -> tuple[Messages, Updates]:
        _, updates = block.vjp(kept, message)
        if not any(block.wanted):
            return [None], updates
        (x,), V, c = kept, block.memory["V"], block.memory["c"]

        def g(h: Tensor) -> Tensor:
            return torch.tanh(h.flatten(1) @ V.T + c)

        h, step = block.f(kept), self.eta * block.batch
        to_parent = (g(h) - g(h - step * message)).view_as(x) / step
        there = x + self.noise * block.randn_like(x)  # of g: 1/2 |g(f(there)) - there|^2
        then = block.f([there])
        wrong = (g(then) - there.flatten(1)) * (1 - g(then) ** 2) / block.batch
        inverse_updates = {"memory:V": wrong.T @ then.flatten(1), "memory:c": wrong.sum(0)}
        return [to_parent], {**updates, **inverse_updates}
