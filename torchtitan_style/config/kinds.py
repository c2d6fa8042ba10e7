"""Kinds of values that settings have, and the bounds of each."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

MOST = 2**24
"""Of what is held in memory by number: rows of a batch, tokens of a row, ranks."""
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
TimeLimit = Annotated[int, Field(ge=1, le=10**8)]
"""Seconds, up to three years."""
FiniteNonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _positive_or_rest(value: int) -> int:
    if value < 1 and value != -1:
        raise PydanticCustomError("positive_or_rest", "must be -1 or at least 1")
    if value > MOST:
        raise PydanticCustomError("positive_or_rest", f"must be at most {MOST}")
    return value


PipelineSchedule = Literal["1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble"]

PositiveOrRest = Annotated[int, AfterValidator(_positive_or_rest)]
"""A count, or -1 for whatever the other settings leave."""


def _path(text: str) -> str:
    if any(len(os.fsencode(part)) > 255 for part in text.split("/")) or len(text) > 4095:
        raise PydanticCustomError("path", "is too long for the name of a file")
    return text


PathText = Annotated[str, AfterValidator(_path)]
"""A path, or a name where a path may stand."""
