"""From the content of a file to values of known types, once, where it comes in."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .errors import shown

T = TypeVar("T")

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of something, or a place: what fits into 64 bits."""
Seconds = Annotated[float, Field(ge=0, lt=2.5e11, allow_inf_nan=False)]
"""A time since 1970, up to the last year that calendars have."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Content(BaseModel):
    """Base of what a file holds. Values of another type are errors; fields that it does not know are left alone."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


def typed(kind: type[T] | TypeAdapter[T], value: Any) -> T:
    """``value`` as ``kind``. Raises ValueError, naming the field, if it is something else."""
    try:
        adapter: TypeAdapter[T] = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ValueError(problem_in(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def problem_in(error: ValidationError) -> str:
    """The first of pydantic's errors in a line, and how many more there are."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part)[:80] for part in first["loc"])
    more = f" (and {error.error_count() - 1:,} more problems)" if error.error_count() > 1 else ""
    if first["type"] == "missing":
        return f"{where} is missing{more}"
    text = first["msg"][:1].lower() + first["msg"][1:200]
    return f"{where}{': ' if where else ''}{text}, not {shown(first['input'])}{more}"
