"""Micro-batches: how a batch is cut into parts that travel one behind the other (GPipe: Huang et
al. 2019), and in which ticks they enter.

With M parts, sample i enters as the pulses n = i M, ..., i M + M - 1, two ticks apart:

    forward of n at depth l      tick  (n div M) c + 2 (n mod M) + l
    backward                     2 (D - l) ticks later,    c = 2 (M - 1) + 2D + 1

Both ticks are even or both are odd at one depth, so a full block does one forward and one backward
in every second tick: the order of work of 1F1B (PipeDream: Narayanan et al. 2019), in which a block
at depth l keeps D - l + 1 parts.
"""

from __future__ import annotations

SPACING = 2  # ticks between two parts of a batch
MOST = 8  # parts that `auto` makes: M/(M + P - 1) is 0.89 for P = 2 actors
ROWS = 32  # of a part, below which products of matrices are slow (docs/pages/how-to/levels.md)
FEWEST = 8  # rows of a part, where a batch makes two


def auto_microbatches(batch: int) -> int:
    """Return how many parts `locality.microbatches: auto` makes of a batch.

    Two of FEWEST rows or more, and more (MOST at most) where each has ROWS rows. The number
    follows from the batch alone, so that both engines and a resumed run cut in the same way.
    """
    return max(1, min(2, batch // FEWEST), min(MOST, batch // ROWS))
