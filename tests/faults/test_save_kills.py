"""Saves that are cut short anywhere: there is a whole checkpoint before and after, and never a half one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import Command


@pytest.mark.parametrize("mode", [pytest.param("disabled", marks=pytest.mark.nightly), "async"])
def test_a_kill_anywhere_in_a_save_leaves_the_one_before_or_the_new_one(
    command: Command, tmp_path: Path, mode: str
) -> None:
    command("tests.faults.checkpoints", "kill", tmp_path, mode)
    logs = sorted(tmp_path.glob("*.events"), key=lambda path: int(path.stem))
    # Each kill was one dealing with files later than the one before, up to the last one.
    assert len(logs) > 25
    events = logs[-1].read_text().splitlines()
    assert [len(log.read_text().splitlines()) for log in logs] == list(range(1, len(events) + 1))
    assert events[-1] == "end"
    # What a power cut would leave cannot be tried, but it depends on the order.
    name = events.index("os.rename step-2")
    temporary = {event.partition(" ")[2] for event in events[:name] if event.startswith("open tmp-step-2/")}
    assert {"tmp-step-2/__0_0.distcp", "tmp-step-2/manifest.json", "tmp-step-2/train_state.json"} <= temporary
    for path in temporary:
        if "/.metadata" not in path:  # DCP writes it under another name, and renames it
            written = max(at for at, event in enumerate(events) if event == f"open {path}")
            assert f"fsync {path}" in events[written:name], path
    assert "fsync tmp-step-2/.metadata" in events[:name]
    assert events[name - 1] == "fsync tmp-step-2"
    assert events[name + 1] == "fsync ."
    deletions = [at for at, event in enumerate(events) if "tmp-deleted-step-1" in event]
    assert min(deletions) > name
