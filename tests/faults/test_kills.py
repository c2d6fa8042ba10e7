"""Ranks that are killed, and what is left of the run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT
from tests.faults.runs import PATIENCE, Runs, curve, is_alive, same_tensors, steps
from torchtitan_style.checkpoint.folder import CheckpointFolder


def test_a_rank_killed_in_a_step_is_restarted(runs: Runs, whole_of_two: Path, tmp_path: Path) -> None:
    died = tmp_path / "died"
    run = runs.start("run", nproc=2, faults=[{"kind": "die", "rank": 1, "steps": [11], "once": str(died)}])
    run.at_step(2)
    first = run.ranks()
    run.until(died.exists, "rank 1 dies")
    killed = time.monotonic()
    run.until(lambda: not is_alive(first[0]), "rank 0 ends")
    assert time.monotonic() - killed < 10
    assert run.wait() == 0, run.output
    assert "resuming after step 8" in run.output
    assert curve(run.folder) == curve(whole_of_two)
    same_tensors(run.folder / "checkpoint/step-20", whole_of_two / "checkpoint/step-20", tmp_path)
    assert not run.ranks()


@pytest.mark.parametrize(
    ("last", "in_steps", "early"), [(20, 4, 2), pytest.param(60, 14, 6, marks=pytest.mark.nightly)], ids=["6", "20"]
)
def test_kills_at_random_do_not_change_the_run(
    runs: Runs, tmp_path: Path, last: int, in_steps: int, early: int
) -> None:
    """Kills during each file operation of a save are in test_save_kills.py."""
    options = ["--training.steps", last, "--lr_scheduler.total_steps", last, "--checkpoint.interval", 2]
    options += ["--checkpoint.async_mode", "async", "--validation.freq", 10]
    whole = runs("undisturbed", *options).folder
    draw = random.Random(20)
    # At these steps, a moment later; but now and then soon after the start, whatever it is doing then.
    targets = sorted(draw.sample(range(1, last - 2), in_steps))
    kills: list[tuple[int, float]] = [(step, draw.uniform(0, 0.1)) for step in targets]
    for _ in range(early):
        kills.insert(draw.randrange(len(kills)), (0, draw.uniform(0, 1.5)))
    folder = runs.folder("killed")
    slow = [{"kind": "slow_steps", "seconds": 0.03}]
    for step, delay in kills:
        run = runs.start(folder, *options, faults=slow)
        if step:
            run.at_step(step)
        time.sleep(delay)
        assert run.poll() is None, f"it was to be killed at step {step}\n{run.output}"
        run.signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    runs(folder, *options)
    assert curve(folder) == curve(whole)
    same_tensors(folder / f"checkpoint/step-{last}", whole / f"checkpoint/step-{last}", tmp_path)
    left = {path.name for path in (folder / "checkpoint").iterdir()}
    assert {"best", f"step-{last}", f"step-{last - 2}", f"step-{last - 4}"} <= left
    assert not [name for name in left if name.startswith(("tmp-", "set-aside"))]


@pytest.mark.nightly
def test_the_same_with_interpreters_of_their_own(runs: Runs, tmp_path: Path) -> None:
    """Nothing forked here: a killed rank, then a signal to stop, as after ./run_train.sh."""
    folder, log = runs.folder("run"), tmp_path / "log"
    arguments = ["--config", runs.config, "--job.dump_folder", folder, "--training.steps", 100_000]
    command = [sys.executable, "-m", "torchtitan_style.launch", *map(str, arguments)]
    with log.open("w") as output:
        launcher = subprocess.Popen(
            command, env=ENVIRONMENT | {"NPROC": "2"}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    first: list[int] = []
    try:
        poll(lambda: max(steps(folder), default=0) >= 5, log)
        first = children(launcher.pid)
        assert len(first) == 2
        os.kill(first[1], signal.SIGKILL)
        killed = time.monotonic()
        poll(lambda: not is_alive(first[0]), log)
        assert time.monotonic() - killed < 10
        poll(lambda: "resuming after step" in log.read_text(), log)
        resumed = max(steps(folder))
        poll(lambda: max(steps(folder)) > resumed + 5, log)
        launcher.terminate()
        assert launcher.wait(PATIENCE) == 0, log.read_text()
        word = json.loads((folder / "preempted.json").read_text())
        assert CheckpointFolder(folder / "checkpoint").problem(word["step"]) is None
        assert "Traceback" not in log.read_text()
    finally:
        for pid in (*children(launcher.pid), launcher.pid):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()


def poll(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in file.read_text().split()] if file.exists() else []
