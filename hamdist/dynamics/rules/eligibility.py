"""Rules of recurrent blocks that carry eligibility traces J forward instead of going back in time.

    h_t = f(x_t, h_(t-1); theta),        D_t = df/dh_(t-1),        I_t = df/dtheta
    J_t = I_t + D_t J_(t-1),             dL_t/dtheta = z_t^T J_t

With all of J that is real-time recurrent learning (Williams and Zipser 1989), at n times the
weights. Here a unit has traces of its own weights alone, by what of D_t lies within units:

    e-prop      what passes through no state that other units read      Bellec et al. 2020
    SnAp-1      all of it, in the pattern of I_t                         Menick et al. 2021
    diagonal    all of it: exact, as units do not read each other        Zucchet et al. 2023

A state has n units of k numbers each, number a of unit j at a n + j; unit j has the rows r of a
weight with r mod n = j. That is so of nn.RNNCell, GRUCell (k = 1), LSTMCell, and of `LeakyCell`,
`DiagonalCell` (k = 2). Another module names n by an attribute `units` (else k = 1), and by a slice
`hidden` the part of its state that other units read (else all of it).

B: batch, g: rows of one unit in a weight. What goes to the parents is of the same token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hamdist.dynamics.rules.rule import BlockView, Messages, Rule, Signals, Updates
from hamdist.errors import GraphError, SettingsError


class SnAp1(Rule):
    """Traces by all that a unit's state does to itself, for which D_t is made whole."""

    presentation = "sequence"
    in_pattern: ClassVar[bool] = True  # of I_t: (k, g) by weight, found on random inputs

    def start(self, block: BlockView) -> dict[str, Any]:
        n, size = _units(block), block.shape[0]
        rows = {f"weight {name!r}": len(w) for name, w in block.theta.items()}
        for name, number in {"its state": size, **rows}.items():
            if len(block.shape) != 1 or number % n:
                self._refuse(block, f"{name} has {number} rows for {n} units")
        x = [block.randn_like(block.h.new_empty(len(block.h), *s)) for s in block.inputs]
        D, direct = self.local(block, x)
        # With one random cotangent, sums over all units differ from those within, if anything does.
        z = block.randn_like(block.h[0])
        to_state, to_theta = block.row_jacobians(x, z[None])
        z = z.view(-1, n)
        for name, i in direct.items():
            within = torch.einsum("kn,bkgn...->bgn...", z, i)
            self._check_equal(block, to_theta[name], within, f"weights {name!r}")
        alone = ~self.read_by_others(block)
        state = to_state.reshape(len(D), -1, n)[:, alone]
        self._check_equal(block, state, torch.einsum("an,bacn->bcn", z, D)[:, alone], "states")
        if not self.in_pattern:
            return {}
        return {"pattern": {name: (i != 0).flatten(3).any(-1).any(0) for name, i in direct.items()}}

    def read_by_others(self, block: BlockView) -> Tensor:
        """Return by each of the k numbers of a unit whether other units may read it.

        Args:
            block: the block.
        """
        return torch.ones(block.shape[0] // _units(block), dtype=torch.bool)

    def local(self, block: BlockView, inputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return D_t (B, k, k, n), and I_t by weight (B, k, g, n, ...), within units.

        Args:
            block: the block.
            inputs: as of `forward`.
        """
        D, direct = _sums_over_units(block, inputs)
        whole, _ = block.row_jacobians(inputs, _eye(block, inputs), weights=False)
        k, n = D.shape[2:]
        return whole.reshape(-1, k, n, k, n).diagonal(dim1=2, dim2=4), direct

    def forward(self, block: BlockView, inputs: Sequence[Tensor]) -> tuple[Tensor, Any]:
        h = block.f(inputs)
        D, J = self.local(block, inputs)
        if not block.begins:
            for name, before in block.memory["J"].items():
                on = torch.einsum("bacn,bcgn...->bagn...", D, before)
                if self.in_pattern:
                    pattern = block.memory["pattern"][name]
                    on = on * pattern.view(*pattern.shape, *[1] * (on.dim() - 3))
                J[name] = J[name] + on
        block.memory["J"] = J
        return h, {"x": list(inputs), "J": J}

    def backward(self, block: BlockView, kept: Any, message: Tensor) -> tuple[Messages, Updates]:
        z = message.reshape(len(message), -1, _units(block))
        g = {name: torch.einsum("bkn,bkgn...->gn...", z, J) for name, J in kept["J"].items()}
        updates = {name: t.reshape(block.theta[name].shape) for name, t in g.items()}
        return block.vjp(kept["x"], message)[0], updates

    def _check_equal(self, block: BlockView, sums: Tensor, within: Tensor, name: str) -> None:
        if not torch.allclose(sums.flatten(), within.flatten(), rtol=1e-3, atol=1e-5):
            self._refuse(block, f"units depend on {name} of other units (n = {_units(block)})")

    def _refuse(self, block: BlockView, text: str) -> None:
        who = f"block {block.name!r}: {type(self).__name__} has traces by unit"
        raise GraphError(f"{who}, but {text}")


class DiagonalTraces(SnAp1):
    """Exact traces of a block whose units do not read each other, such as `DiagonalCell`."""

    in_pattern = False

    def read_by_others(self, block: BlockView) -> Tensor:
        return torch.zeros_like(super().read_by_others(block))

    def local(self, block: BlockView, inputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return _sums_over_units(block, inputs)


class EProp(SnAp1):
    """Traces through states that no other unit reads, such as c of an LSTM.

    Args:
        feedback: `symmetric`: the learning signal is the message; `random`: a fixed random
            projection of the readout's error, L_j = sum_o B_oj e_o.
    """

    in_pattern = False

    def __init__(self, feedback: str = "symmetric") -> None:
        if feedback not in ("symmetric", "random"):
            raise SettingsError(f"e-prop: feedback {feedback!r}; give 'symmetric' or 'random'")
        if feedback == "random":
            self.signals = Signals(back="error")  # type: ignore[misc]

    def start(self, block: BlockView) -> dict[str, Any]:
        memory = super().start(block)
        if self.read_by_others(block).all():
            whole = "other units read all of its state, so no trace reaches back"
            self._refuse(block, f"{whole}: take an LSTMCell, a LeakyCell, or the rule snap-1")
        rows = block.outputs[-1]
        B = block.randn_like(block.h.new_empty(rows, _units(block))) * rows**-0.5
        return memory if self.signals.back == "message" else {**memory, "B": B}

    def read_by_others(self, block: BlockView) -> Tensor:
        hidden = range(block.shape[0])[_said(block, "hidden", slice(None))]
        return torch.tensor([first in hidden for first in range(0, block.shape[0], _units(block))])

    def local(self, block: BlockView, inputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        D, direct = _sums_over_units(block, inputs)
        return D.masked_fill(self.read_by_others(block)[:, None].to(D.device), 0.0), direct

    def backward(self, block: BlockView, kept: Any, message: Tensor) -> tuple[Messages, Updates]:
        if self.signals.back == "error":
            L = message @ block.memory["B"]
            message = torch.cat([L * read for read in self.read_by_others(block).to(L)], -1)
        return super().backward(block, kept, message)


def _units(block: BlockView) -> int:
    """Return n."""
    return int(_said(block, "units", block.shape[0]))


def _said(block: BlockView, name: str, otherwise: Any) -> Any:
    """Return an attribute of the block's module, or of the first part of it that has that."""
    parts = block.module.modules()
    return next((getattr(part, name) for part in parts if hasattr(part, name)), otherwise)


def _eye(block: BlockView, inputs: Sequence[Tensor]) -> Tensor:
    """Return the identity of the block's own state, of that one's type."""
    h = inputs[block.own or 0]
    return torch.eye(h.shape[1], dtype=h.dtype, device=h.device)


def _sums_over_units(
    block: BlockView, inputs: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return D_t and I_t summed over the units that depend on a number: within units, if only one
    does."""
    n = _units(block)
    ones = _eye(block, inputs).view(-1, n, block.shape[0]).sum(1)  # by each of the k numbers
    D, direct = block.row_jacobians(inputs, ones)
    by_unit = {name: i.reshape(*i.shape[:2], -1, n, *i.shape[3:]) for name, i in direct.items()}
    return D.reshape(*D.shape[:2], -1, n), by_unit
