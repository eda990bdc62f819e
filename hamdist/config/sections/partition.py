"""The section `partition`: how the model is cut into blocks, and how long signals travel."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from pydantic import model_validator

from hamdist.config.sections.section import Positive, Section


class CutBalance(str, Enum):
    """Quantity that `blocks: N` balances between blocks: learned numbers, time, or the real numbers
    that they compute (which a trace keeps).
    """

    PARAMETERS = "parameters"
    TIME = "time"
    ACTIVATIONS = "activations"


class PartitionSettings(Section):
    """Cuts of the model into blocks, and delays of signals.

    Without `blocks` and `cuts` the level's grouping decides.
    """

    blocks: Positive | None = None
    """Number of blocks on the way from the input to an output; every further output is a block
    more."""
    cuts: tuple[str, ...] | None = None
    """Names of the modules that begin a block, at any depth (`layer2.1.conv2`)."""
    balance: CutBalance = CutBalance.PARAMETERS
    """What `blocks` balances."""
    delay: Positive = 1
    """Ticks of every edge."""
    slices: dict[str, Positive] = {}
    """Over how many blocks a block's neurons are spread, by block (patterns as in a shell, names
    first)."""
    delays: dict[str, Positive] | Literal["auto"] = {}
    """Ticks of single edges by name (`block0->block1`, `block*->*`); `auto`: the fewest that keep
    every block busy, by measurement (engine `ray`)."""

    @model_validator(mode="after")
    def _one_way(self) -> PartitionSettings:
        if self.blocks is not None and self.cuts is not None:
            raise ValueError("give 'blocks' or 'cuts', not both")
        return self
