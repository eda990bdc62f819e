"""The parts that sections of the settings share: their base, types of numbers, `on` and `off`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the settings: it refuses unknown names, and is immutable.

    The text below a field is its description (docs: reference/settings).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _no_nul(cls, raw: Any) -> Any:
        for name, value in raw.items() if isinstance(raw, Mapping) else ():
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"{name!r} has a NUL character ({value[:99]!r}): leave it out")
        return raw


LARGEST = 10**18  # of a whole number: sums and products with small ones still fit 64 bits


def _no_truth(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("give a number, not true or false")
    return value


Number = BeforeValidator(_no_truth)
# (`Number` last: a schema then shows the limits.)
Positive = Annotated[int, Field(ge=1, le=LARGEST), Number]
Seed = Annotated[int, Field(ge=0, le=LARGEST), Number]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False), Number]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False), Number]


def as_written(value: object) -> object:
    """Return `off` and `on` as they were written: YAML reads them as false and true."""
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value


class CourseSettings(Section):
    """A number that changes with time."""

    values: Annotated[tuple[Rate, ...], Field(min_length=1)]
    """The values, one after the other; the last one holds from then on."""
    cycle: bool = False
    """Begin again behind the last value."""
    every: Positive = 1
    """Ticks (of a factor of the step size: samples) that each value stands for."""
    smooth: bool = False
    """Go on a straight line from one value to the next."""

    def __call__(self, k: int) -> float:
        """Return the number in tick (or for sample) k."""
        at, rest = divmod(k, self.every)
        value = self._at(at)
        return value + (self._at(at + 1) - value) * rest / self.every if self.smooth else value

    def _at(self, i: int) -> float:
        n = len(self.values)
        return self.values[i % n if self.cycle else min(i, n - 1)]


class SignedCourseSettings(CourseSettings):
    """A number that changes with time, and may be negative."""

    values: Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], Field(min_length=1)]
    """The values, one after the other; the last one holds from then on."""
