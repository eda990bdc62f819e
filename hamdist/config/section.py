"""What the sections of the settings share: their base, types of numbers, `on` and `off`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of the settings: refuses names that it does not know, and is not changed once made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def as_written(value: object) -> object:
    """`off` and `on` as they were written: YAML reads them as false and true."""
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value
