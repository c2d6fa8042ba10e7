"""What was planned beside what is measured, once, after the first steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class PlannedMemory(Protocol):
    @property
    def total(self) -> int:
        """Bytes at the peak."""
        ...


class PlannedTime(Protocol):
    @property
    def tokens(self) -> int:
        """Of a step."""
        ...

    @property
    def step_seconds(self) -> float: ...


class Planned(Protocol):
    """A plan of the run, as planner/plan.py makes it."""

    @property
    def memory(self) -> PlannedMemory: ...
    @property
    def time(self) -> PlannedTime: ...


MakePlan = Callable[[], Planned | None]
"""Makes the plan when it is called, which takes a moment; None if the device is unknown."""


def compared(plan: Planned, record: dict[str, Any]) -> tuple[dict[str, float], str]:
    """The planned figures for a record of the metrics, and a line about memory and time for a person."""
    memory, seconds = plan.memory.total / 2**30, plan.time.step_seconds
    took = plan.time.tokens / record["tokens_per_second"]
    line = (
        f"planned: {memory:.2f} GiB and {seconds:.3g} s a step; "
        f"measured: {record['peak_memory_gib']:.2f} GiB and {took:.3g} s"
    )
    return {"planned_memory_gib": memory, "planned_step_seconds": seconds}, line
