"""Disks that are full, folders that cannot be written or go away: what was saved stays, and the error is clear."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import Run, Runs, records, steps
from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.common.errors import UserError
from torchtitan_style.launch.configure import load_config
from torchtitan_style.launch.preflight import preflight

LIMIT = 60_000
"""Bytes that a file may have: less than a rank's part of a checkpoint, more than metrics.jsonl."""


def limit(run: Run, size: int) -> None:
    """As if the disk were full; only the soft limit, so that it can be lifted."""
    for pid in run.ranks().values():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def whole_ones(folder: Path) -> list[int]:
    checkpoints = CheckpointFolder(folder / "checkpoint")
    assert [step for step in checkpoints.steps() if checkpoints.problem(step)] == []
    assert not list(checkpoints.root.glob("tmp-*"))
    return checkpoints.steps()


def start(runs: Runs, tmp_path: Path, *options: Any, nproc: int) -> Run:
    """Held in step 10, with checkpoints of steps 4 and 8."""
    mark = tmp_path / "mark"
    run = runs.start("run", *options, nproc=nproc, faults=[{"kind": "hold_step", "step": 10, "mark": str(mark)}])
    saved_and_held(run, mark)
    return run


def saved_and_held(run: Run, mark: Path) -> None:
    """In the background the save of step 8 may take longer than the steps."""
    run.until(lambda: all(Path(f"{mark}.{rank}").exists() for rank in range(run.nproc)), "step 10")
    run.until((run.folder / "checkpoint/step-8").exists, "the checkpoint of step 8")


@pytest.mark.parametrize(("mode", "nproc"), [("disabled", 2), ("async", 1)])
def test_a_full_disk_stops_the_run(runs: Runs, tmp_path: Path, mode: str, nproc: int) -> None:
    run = start(runs, tmp_path, "--checkpoint.async_mode", mode, nproc=nproc)
    limit(run, LIMIT)
    (tmp_path / "mark.go").touch()
    assert run.wait() == 1, run.output
    assert "error: the checkpoint of step 12 could not be saved: " in run.output
    assert "File too large" in run.output
    assert f"the last one is {run.folder / 'checkpoint/step-8'}" in run.output
    assert "Traceback" not in run.output
    assert run.output.count("error:") == 1
    assert whole_ones(run.folder) == [8, 4]
    assert sorted(steps(run.folder))[:12] == list(range(1, 13))
    if nproc == 1:  # there is room again
        resumed = runs(run.folder, "--checkpoint.async_mode", mode)
        assert "resuming after step 8" in resumed.output
        assert whole_ones(run.folder)[0] == 20


@pytest.mark.parametrize(("mode", "nproc"), [("disabled", 1), ("async", 2)])
def test_a_full_disk_is_warned_of_and_later_saves_work(runs: Runs, tmp_path: Path, mode: str, nproc: int) -> None:
    again = tmp_path / "again"
    mark = tmp_path / "mark"
    faults = [
        {"kind": "hold_step", "step": 10, "mark": str(mark)},
        {"kind": "hold_step", "step": 15, "mark": str(again)},
        {"kind": "mark_save", "step": 12, "mark": str(tmp_path / "failed")},
    ]
    options = ["--checkpoint.async_mode", mode, "--checkpoint.on_error", "warn"]
    run = runs.start("run", *options, nproc=nproc, faults=faults, env={"RUN_PIPE": ""})
    saved_and_held(run, mark)
    limit(run, LIMIT if mode == "async" else 1000)  # with 1000, metrics.jsonl cannot be written either
    (tmp_path / "mark.go").touch()
    run.until(lambda: all(Path(f"{again}.{rank}").exists() for rank in range(nproc)), "step 15")
    run.until(lambda: all((tmp_path / f"failed.{rank}").exists() for rank in range(nproc)), "the end of the save")
    limit(run, resource.RLIM_INFINITY)
    (tmp_path / "again.go").touch()
    assert run.wait() == 0, run.output
    output = run.output.replace("\n", " ")
    assert "warning: the checkpoint of step 12 could not be saved: " in output
    assert 'continuing, because checkpoint.on_error = "warn"' in output
    assert output.count("could not be saved") == 1
    assert ("metrics.jsonl cannot be written" in output) == (mode == "disabled")
    assert "Traceback" not in output
    found = whole_ones(run.folder)
    assert found[:2] == [20, 16]
    assert 12 not in found
    assert sorted(steps(run.folder)) == list(range(1, 21))
    assert sorted(records(run.folder, "val_loss")) == [0, 8, 16, 20]


def test_output_that_goes_to_the_full_disk_does_not_end_the_run(runs: Runs, tmp_path: Path) -> None:
    again = tmp_path / "again"
    faults = [
        {"kind": "hold_step", "step": 10, "mark": str(tmp_path / "mark")},
        {"kind": "hold_step", "step": 15, "mark": str(again)},
    ]
    run = runs.start("run", "--checkpoint.on_error", "warn", faults=faults)
    saved_and_held(run, tmp_path / "mark")
    limit(run, 1000)
    (tmp_path / "mark.go").touch()
    run.until(Path(f"{again}.0").exists, "step 15")
    limit(run, resource.RLIM_INFINITY)
    again.with_suffix(".go").touch()
    assert run.wait() == 0, run.output
    assert "step 20/20" in run.output
    assert whole_ones(run.folder)[:2] == [20, 16]
    assert sorted(steps(run.folder)) == list(range(1, 21))


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_the_last_save_must_not_fail(runs: Runs, tmp_path: Path, mode: str) -> None:
    options = ["--checkpoint.async_mode", mode, "--checkpoint.on_error", "warn"]
    run = start(runs, tmp_path, *options, nproc=1)
    limit(run, LIMIT)
    (tmp_path / "mark.go").touch()
    assert run.wait() == 1, run.output
    assert "error: the checkpoint of step 20 could not be saved: " in run.output
    assert "Traceback" not in run.output
    assert whole_ones(run.folder) == [8, 4]
    assert sorted(steps(run.folder)) == list(range(1, 21))


def test_a_folder_that_goes_away_ends_the_run(runs: Runs, tmp_path: Path) -> None:
    run = start(runs, tmp_path, nproc=1)
    run.folder.rename(tmp_path / "elsewhere")
    (tmp_path / "mark.go").touch()
    assert run.wait() == 1, run.output
    assert f"{run.folder} is gone" in run.output
    assert "Traceback" not in run.output
    assert not run.folder.exists()
    assert whole_ones(tmp_path / "elsewhere") == [8, 4]
    runs(tmp_path / "elsewhere")
    assert whole_ones(tmp_path / "elsewhere")[0] == 20


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("where", ["below a file", "/proc/nothing", "/sys/nothing"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_start(
    runs: Runs, tmp_path: Path, where: str, nproc: int
) -> None:
    if where == "below a file":
        (tmp_path / "file").touch()
        where = str(tmp_path / "file" / "run")
    run = runs(Path(where), nproc=nproc, status=2)
    assert f"error: job.dump_folder: {where} cannot be written" in run.output
    assert len(run.output.splitlines()) == 1


def test_too_little_room_is_refused_before_the_start(runs: Runs, tmp_path: Path, monkeypatch) -> None:
    said: list[str] = []

    def check(free: int, *options: Any) -> None:
        usage = shutil._ntuple_diskusage(10**12, 10**12 - free, free)  # type: ignore[attr-defined]
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
        overrides = ["--job.dump_folder", str(tmp_path / "run"), *map(str, options)]
        preflight(load_config(str(runs.config), overrides, world_size=1), world_size=1, say=said.append)

    check(10**9)
    size = said[0]
    assert "free" in size
    with pytest.raises(UserError, match=r"only 1 MB are free in .*/run: lower checkpoint.keep_latest_k"):
        check(10**6)
    check(10**6, "--checkpoint.enable", "false")
    with pytest.raises(UserError, match=r"set checkpoint\.keep_latest_k"):
        check(10**6, "--checkpoint.keep_latest_k", 0, "--training.steps", 1000)
    assert not (tmp_path / "run").exists()
