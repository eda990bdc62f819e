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
        return slice(0, self.cell.hidden_size)

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
