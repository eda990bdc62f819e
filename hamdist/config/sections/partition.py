"""The section `partition`: how the model is cut into blocks, and how long signals travel."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from pydantic import model_validator

from hamdist.config.sections.section import Positive, Section


class CutBalance(str, Enum):
    """What `blocks: N` balances between blocks: what they learn, what they take, or the real
    numbers that they make (which a trace keeps)."""

    PARAMETERS = "parameters"
    TIME = "time"
    ACTIVATIONS = "activations"


class PartitionSettings(Section):
    """How the model is cut into blocks: a number of blocks, or the names of the modules that begin
    a block (at any depth: `layer2.1.conv2`); without either the level's grouping decides. blocks:
    on the way from the input to an output; every further output is a block more. balance: what
    `blocks` balances.

    slices: by block (patterns as in a shell, names first), over how many blocks its neurons are
    spread. delay: ticks per edge; delays: of single edges, by name ('block0->block1', 'block*->*';
    names first; a sliced block's name stands for all its slices); auto: the fewest that keep every
    block busy, by a measurement of the links at start (engine 'ray')."""

    blocks: Positive | None = None
    cuts: tuple[str, ...] | None = None
    balance: CutBalance = CutBalance.PARAMETERS
    delay: Positive = 1
    slices: dict[str, Positive] = {}
    delays: dict[str, Positive] | Literal["auto"] = {}

    @model_validator(mode="after")
    def _one_way(self) -> PartitionSettings:
        if self.blocks is not None and self.cuts is not None:
            raise ValueError("give 'blocks' or 'cuts', not both")
        return self
