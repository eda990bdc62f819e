"""Recurrent cells as blocks (their graph as one module: graph/merged.py).

    cell = RecurrentCell(nn.GRUCell(8, 16))
    Graph([
        BlockSpec("cell", cell, ("u", "cell"), combine=Combine.ARGUMENTS, shape=(cell.size,)),
        BlockSpec("y", nn.Linear(16, 2), ("cell",), loss=cross_entropy),
    ])

B: batch, T: tokens, H: features of a cell's hidden state, S: of its whole state (LSTM: 2H).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hamdist.errors import GraphError

CELLS = (nn.RNNCell, nn.GRUCell, nn.LSTMCell)


class RecurrentCell(nn.Module):
    """f(x_1, ..., x_P, h) = h' of an nn.RNNCell, nn.GRUCell or nn.LSTMCell.

    The last argument is the cell's own state (B, S); the others are concatenated on the last axis
    to its input. The state of an LSTM is [h, c] in one tensor, since a block has one state; other
    blocks usually read only its part `hidden` (`Reads`).

    Args:
        cell: the cell.

    Raises:
        GraphError: `cell` is another module.
    """

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        if not isinstance(cell, CELLS):
            raise GraphError(
                f"a RecurrentCell holds an nn.RNNCell, nn.GRUCell or nn.LSTMCell, not a "
                f"{type(cell).__name__}"
            )
        self.cell = cell

    @property
    def size(self) -> int:
        """Return S, the features of the whole state."""
        return self.cell.hidden_size * (2 if isinstance(self.cell, nn.LSTMCell) else 1)

    @property
    def hidden(self) -> slice:
        """Return the place of h in the state."""
        return slice(0, self.units)

    @property
    def units(self) -> int:
        """Return H, the number of units."""
        return int(self.cell.hidden_size)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the next state, (B, S).

        Args:
            *inputs: inputs (B, ...), and as the last one the state before, (B, S).
        """
        *read, state = inputs
        x = read[0] if len(read) == 1 else torch.cat(read, dim=-1)
        if isinstance(self.cell, nn.LSTMCell):
            h, c = state.chunk(2, dim=-1)
            return torch.cat(self.cell(x, (h, c)), dim=-1)
        after: Tensor = self.cell(x, state)
        return after


class _OwnCell(nn.Module):
    """A cell with a state [first, second] of H features each, in one tensor (B, 2H)."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.inputs, self.units, self.size = inputs, units, 2 * units

    def _step(self, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next state, of x (B, inputs)."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the next state, (B, 2H).

        Args:
            *inputs: inputs (B, ...), and as the last one the state before, (B, 2H).
        """
        *read, state = inputs
        return torch.cat(self._step(torch.cat(read, -1), *state.chunk(2, -1)), -1)


class LeakyCell(_OwnCell):
    """Leaky integrators with rate or spiking outputs; other units read z alone, `hidden`.

        v' = alpha v + W x + U z + b,        z' = tanh(v')
        v' = alpha v + W x + U z + b - theta z,        z' = (v' > theta)

    The state is [z, v]. A spike has the pseudo-derivative 0.3 max(0, 1 - |v - theta| / theta) /
    theta, and none by what resets it (Bellec et al. 2020, Eq. 7 and 8, Methods).

    Args:
        inputs: features of x; units: H.
        decay: alpha.
        threshold: theta; None for rates.
    """

    def __init__(
        self, inputs: int, units: int, decay: float = 0.9, threshold: float | None = None
    ) -> None:
        super().__init__(inputs, units)
        self.decay, self.threshold, self.hidden = decay, threshold, slice(0, units)
        self.input, self.recurrent = nn.Linear(inputs, units), nn.Linear(units, units, bias=False)

    def _step(self, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        v = self.decay * second + self.input(x) + self.recurrent(first)
        if self.threshold is None:
            return torch.tanh(v), v
        v = v - self.threshold * first.detach()
        slope = 0.3 * (1 - (v / self.threshold - 1).abs()).clamp(min=0) / self.threshold
        pseudo = slope.detach() * v
        return (v > self.threshold).to(v) + pseudo - pseudo.detach(), v


class DiagonalCell(_OwnCell):
    """Linear recurrent unit: a diagonal, complex state space (Orvieto et al. 2023, section 3).

        s' = lambda s + gamma (B x),        lambda = exp(-exp(nu) + i exp(phase))
        gamma = sqrt(1 - |lambda|^2)

    The state is [Re s, Im s]; no unit reads another one.

    Args:
        inputs: features of x; units: H.
        least, most: of |lambda| at the beginning, between which it is drawn.
    """

    def __init__(self, inputs: int, units: int, least: float = 0.5, most: float = 0.99) -> None:
        super().__init__(inputs, units)
        squared = torch.rand(units) * (most**2 - least**2) + least**2
        self.nu = nn.Parameter((-0.5 * squared.log()).log())
        self.phase = nn.Parameter((torch.rand(units) * torch.pi).clamp(min=1e-3).log())
        self.real = nn.Linear(inputs, units, bias=False)
        self.imaginary = nn.Linear(inputs, units, bias=False)

    def _step(self, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        size, angle = torch.exp(-torch.exp(self.nu)), torch.exp(self.phase)
        a, b = size * torch.cos(angle), size * torch.sin(angle)
        gamma = torch.sqrt(1 - size**2)
        real = a * first - b * second + gamma * self.real(x)
        return real, a * second + b * first + gamma * self.imaginary(x)


class Reads(nn.Module):
    """Module that sees only a part of the features that its block reads.

        BlockSpec("y", Reads(nn.Linear(16, 2), cell.hidden), ("cell",), loss=mse)

    Messages about the other features are zeros.

    Args:
        module: the module.
        *parts: per argument the features that it sees (a slice of the last axis), or None for all.
    """

    def __init__(self, module: nn.Module, *parts: slice | None) -> None:
        super().__init__()
        self.module = module
        self.parts = parts

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the module's output for its parts of the inputs.

        Args:
            *inputs: the block's arguments, (B, ...) each.
        """
        seen = (
            x if part is None else x[..., part] for x, part in zip(inputs, self.parts, strict=True)
        )
        result: Tensor = self.module(*seen)
        return result

    def extra_repr(self) -> str:
        return ", ".join("all" if p is None else f"{p.start}:{p.stop}" for p in self.parts)
