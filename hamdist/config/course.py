"""A number that changes with time."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hamdist.config.section import Positive, Rate, Section


class CourseSettings(Section):
    """A number that changes with time: `values` one after the other, the last one from then on, or
    with `cycle` all of them again and again. every: ticks (or samples) that each value stands for;
    smooth: it goes on a straight line from one to the next instead."""

    values: Annotated[tuple[Rate, ...], Field(min_length=1)]
    cycle: bool = False
    every: Positive = 1
    smooth: bool = False
