"""Runs over a pipeline: resumed on other layouts, killed, and held up by one stage."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.faults.runs import Command, Runs, curve, is_alive, records, same_tensors, steps
from torchtitan_style.checkpoint.manifest import read_manifest
from torchtitan_style.launch.preflight import OLDEST_TORCH_OF, torch_version

PP, TP = "--parallelism.pipeline_parallel_degree", "--parallelism.tensor_parallel_degree"
SCHEDULE = "--parallelism.pipeline_parallel_schedule"
ZERO_BUBBLE = "ZBVZeroBubble" if torch_version() >= OLDEST_TORCH_OF["ZBVZeroBubble"] else "GPipe"
TWO_STAGES = [PP, 2, "--training.local_batch_size", 2]

LAYOUTS: list[tuple[int, list[object]]] = [
    (2, [PP, 2, "--training.local_batch_size", 1]),
    (2, [TP, 2]),
    (1, []),
    (4, [PP, 2, SCHEDULE, ZERO_BUBBLE, "--training.local_batch_size", 1]),
    (4, [PP, 2, TP, 2, SCHEDULE, "Interleaved1F1B", "--training.local_batch_size", 2]),
]
"""Processes and degrees, the fourth with two data-parallel ranks."""


def test_a_run_goes_on_with_and_without_a_pipeline(runs: Runs, command: Command, whole: Path, tmp_path: Path) -> None:
    folder = runs.folder("run")
    for number, (nproc, degrees) in enumerate(LAYOUTS):
        loaded, before = tmp_path / f"loaded-{number}", 4 * number
        fault = {"kind": "save_what_was_loaded", "folder": str(loaded)}
        run = runs(folder, "--training.steps", before + 4, *degrees, nproc=nproc, faults=[fault])
        if number:
            assert f"resuming after step {before}" in run.output
            same_tensors(loaded, folder / f"checkpoint/step-{before}", tmp_path)
    for key in ("batch_hash", "lr"):
        assert records(folder, key) == records(whole, key)
    for key in ("loss", "val_loss"):
        for step, right in records(whole, key).items():
            assert records(folder, key)[step] == pytest.approx(right, rel=1e-5), (key, step)
    checkpoint = folder / "checkpoint/step-20"
    assert read_manifest(checkpoint).mesh["pp"] == 2
    assert "pp 2" in command("torchtitan_style.commands.checkpoint", "show", checkpoint)
    command("torchtitan_style.commands.export_hf", "--checkpoint", checkpoint, "--output", tmp_path / "exported")
    options = ["--prompt", "a", "--max-new-tokens", 2]
    assert command("torchtitan_style.commands.generate", "--checkpoint", checkpoint, *options)


def test_a_stage_killed_in_a_step_is_restarted(runs: Runs, tmp_path: Path) -> None:
    whole = runs("whole", *TWO_STAGES, nproc=2).folder
    died = tmp_path / "died"
    fault = {"kind": "die", "rank": 1, "steps": [11], "once": str(died)}
    run = runs.start("run", *TWO_STAGES, "--checkpoint.async_mode", "async", nproc=2, faults=[fault])
    run.at_step(2)
    first = run.ranks()
    run.until(died.exists, "rank 1 dies")
    run.until(lambda: not is_alive(first[0]), "rank 0 ends")
    assert run.wait() == 0, run.output
    assert re.search("resuming after step [48]", run.output)  # that of step 8 may have been under way
    assert curve(run.folder) == curve(whole)
    same_tensors(run.folder / "checkpoint/step-20", whole / "checkpoint/step-20", tmp_path)


def test_the_stage_that_hangs_is_named(runs: Runs, tmp_path: Path) -> None:
    hang = [{"kind": "hang", "rank": 1, "steps": [6], "mark": str(tmp_path / "mark")}]
    options = ["--comm.train_timeout_seconds", 5, "--comm.shutdown_timeout_seconds", 5, "--validation.enable", "false"]
    run = runs.start("run", *TWO_STAGES, *options, nproc=2, faults=hang, env={"MAX_RESTARTS": "0"})
    assert run.wait() == 1
    assert "error: rank 1 (pipeline stage 1) hangs after step 5" in run.output, run.output
    assert "sleep_for_ever" in (run.folder / "hang/step-5-rank-1.txt").read_text()


def test_a_signal_saves_and_the_run_goes_on(runs: Runs, tmp_path: Path) -> None:
    slow = [{"kind": "slow_steps", "seconds": 0.1}]
    run = runs.start("run", *TWO_STAGES, nproc=2, faults=slow)
    run.at_step(5)
    run.signal(signal.SIGTERM)
    assert run.wait() == 0, run.output
    assert (stopped := re.search(r"stopped at step (\d+) by SIGTERM", run.output)), run.output
    again = runs(run.folder, *TWO_STAGES, nproc=2)
    assert f"resuming after step {stopped[1]}" in again.output
    assert sorted(steps(run.folder)) == list(range(1, 21))


@pytest.mark.nightly
def test_kills_at_random_do_not_change_a_pipelined_run(runs: Runs, tmp_path: Path) -> None:
    last = 40
    options = ["--training.steps", last, "--lr_scheduler.total_steps", last, "--checkpoint.interval", 2]
    options += [*TWO_STAGES, "--checkpoint.async_mode", "async", "--validation.freq", 10]
    whole = runs("undisturbed", *options, nproc=2).folder
    draw = random.Random(22)
    folder = runs.folder("killed")
    for step in sorted(draw.sample(range(1, last - 2), 8)):
        slow = [{"kind": "slow_steps", "seconds": 0.03}]
        run = runs.start(folder, *options, nproc=2, faults=slow, env={"MAX_RESTARTS": "0"})
        run.at_step(step)
        time.sleep(draw.uniform(0, 0.1))
        run.signal(signal.SIGKILL, draw.randrange(2))
        assert run.wait() != 0
    runs(folder, *options, nproc=2)
    assert curve(folder) == curve(whole)
    same_tensors(folder / f"checkpoint/step-{last}", whole / f"checkpoint/step-{last}", tmp_path)
