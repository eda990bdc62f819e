"""One row of `hamdist verify`: two sides, and the largest allowed difference between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from hamdist.errors import HamdistError

# What a check may raise, to fail with the message as its reason: hamdist's own refusals, and what
# comes from torch, from numpy or from a file that is none.
FAULTS = (
    HamdistError,
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference, and where it is (or a remark on it)."""

    difference: float
    where: str


@dataclass(frozen=True, slots=True)
class Check:
    """A check that has not run yet.

    Attributes:
        name: of the checked statement; oracle: the other side.
        measure: runs both sides and returns their difference (the largest absolute one, unless
            `name` says otherwise).
        bound: the largest difference with which the check passes; 0: equal to the bit.
    """

    name: str
    oracle: str
    bound: float
    measure: Callable[[], float | Difference]


def absolute(a: Tensor, b: Tensor) -> float:
    """Return max |a - b|."""
    return float((a - b).detach().abs().max())


def largest(differences: Iterable[tuple[str, float]]) -> Difference:
    """Return the largest of differences by name, or the first that is NaN."""
    worst = Difference(0.0, "")
    for name, difference in differences:
        if not difference <= worst.difference:
            worst = Difference(difference, name)
        if difference != difference:
            break
    return worst


def reason(error: Exception) -> str:
    """Return one line about `error`."""
    first = str(error).strip().split("\n")[0]
    if isinstance(error, HamdistError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def failure(name: str, error: Exception) -> Check:
    """Return a check that fails with `error`."""

    def measure() -> float:
        raise error

    return Check(name, "-", 0.0, measure)
