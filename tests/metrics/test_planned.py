"""The line that holds a plan against the run."""

from __future__ import annotations

from types import SimpleNamespace

from torchtitan_style.metrics.planned import compared


def test_planned_and_measured_stand_beside_each_other() -> None:
    plan = SimpleNamespace(
        memory=SimpleNamespace(total=3 * 2**29), time=SimpleNamespace(tokens=2048, step_seconds=0.25)
    )
    record = {"step": 10, "peak_memory_gib": 1.75, "tokens_per_second": 4096.0}
    figures, line = compared(plan, record)
    assert figures == {"planned_memory_gib": 1.5, "planned_step_seconds": 0.25}
    assert line == "planned: 1.50 GiB and 0.25 s a step; measured: 1.75 GiB and 0.5 s"
