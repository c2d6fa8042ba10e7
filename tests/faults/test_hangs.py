"""Ranks that hang: the error says which one, where, and the run ends."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.faults.runs import Runs

TIMEOUT = 5
OPTIONS = [
    "--comm.train_timeout_seconds",
    TIMEOUT,
    "--comm.shutdown_timeout_seconds",
    5,
    "--validation.enable",
    "false",
]


def check(output: str, folder: Path) -> None:
    assert re.search(r"others wait in collective \d+, \S+ of \[", output), output
    found = sorted(path.name for path in (folder / "hang").iterdir())
    assert found
    assert all("Thread 0x" in (folder / "hang" / name).read_text() for name in found)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_the_run_ends(runs: Runs, rank: int) -> None:
    slow = [{"kind": "slow_steps", "seconds": 0.2}]
    run = runs.start("run", "--checkpoint.interval", 100, *OPTIONS, nproc=2, faults=slow, env={"MAX_RESTARTS": "0"})
    run.at_step(6)
    run.signal(signal.SIGSTOP, rank)
    stopped = time.monotonic()
    assert run.wait() == 1
    assert time.monotonic() - stopped < TIMEOUT + 15
    assert re.search(rf"error: rank {rank} does not answer .* after step \d+, for \d+ s", run.output), run.output
    check(run.output, run.folder)
    assert not run.ranks()


def test_a_rank_that_sleeps_is_named_and_the_run_ends(runs: Runs, tmp_path: Path) -> None:
    hang = [{"kind": "hang", "rank": 1, "steps": [6], "mark": str(tmp_path / "mark")}]
    run = runs.start("run", *OPTIONS, nproc=2, faults=hang, env={"MAX_RESTARTS": "0"})
    run.until((tmp_path / "mark").exists, "rank 1 hangs")
    hung = time.monotonic()
    assert run.wait() == 1
    assert time.monotonic() - hung < TIMEOUT + 15
    assert "error: rank 1 hangs after step 5" in run.output, run.output
    check(run.output, run.folder)
    assert "sleep_for_ever" in (run.folder / "hang/step-5-rank-1.txt").read_text()
    assert not run.ranks()
