"""Signals to stop, at any moment, to the launcher or to a rank: the run saves, ends well, and goes on as if never
stopped."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import Runs, curve, is_alive, same_tensors, steps
from torchtitan_style.checkpoint.folder import CheckpointFolder

# Signal, the rank that gets it (None: the launcher), the moment, and the step at which the run then stops.
Stop = tuple[signal.Signals, int | None, str, int, int]

CHAINS: dict[str, tuple[int, str, list[Stop]]] = {
    "one process": (
        1,
        "async",
        [
            (signal.SIGUSR1, None, "start", 0, 0),
            (signal.SIGTERM, None, "step", 2, 2),
            (signal.SIGINT, None, "validation", 8, 8),
            (signal.SIGUSR1, None, "save", 12, 12),
        ],
    ),
    "two": (
        2,
        "async",
        [
            (signal.SIGTERM, 1, "step", 2, 2),
            (signal.SIGINT, None, "start", 2, 2),
            (signal.SIGTERM, 0, "validation", 8, 8),
            (signal.SIGUSR1, None, "save", 12, 12),
        ],
    ),
    "the launcher of two": (
        2,
        "disabled",
        [
            (signal.SIGINT, None, "step", 2, 2),
            (signal.SIGTERM, None, "start", 2, 2),
            (signal.SIGUSR1, None, "validation", 8, 8),
            (signal.SIGINT, None, "save", 12, 12),
        ],
    ),
    "one rank of two": (
        2,
        "async",
        [
            (signal.SIGTERM, 1, "step", 2, 2),
            (signal.SIGINT, 1, "start", 2, 2),
            (signal.SIGTERM, 0, "validation", 8, 8),
            (signal.SIGUSR1, 1, "save", 12, 12),
        ],
    ),
}


@pytest.mark.parametrize(
    "chain",
    [
        "one process",
        "two",
        *(pytest.param(f"{who} of two", marks=pytest.mark.nightly) for who in ("the launcher", "one rank")),
    ],
)
def test_a_run_that_is_told_to_stop_saves_and_goes_on(
    runs: Runs, whole: Path, whole_of_two: Path, tmp_path: Path, chain: str
) -> None:
    nproc, mode, stops = CHAINS[chain]
    options: list[Any] = ["--checkpoint.async_mode", mode]
    folder = runs.folder("run")
    for number, whom, moment, step, stopped in stops:
        mark = tmp_path / f"{moment}-{step}"
        fault = {"kind": f"hold_{moment}", "mark": str(mark)} | ({} if moment == "start" else {"step": step})
        workers = 2 if moment == "start" else 0  # they take seconds to start
        run = runs.start(folder, *options, "--data.num_workers", workers, nproc=nproc, faults=[fault])
        run.until(lambda: all(Path(f"{mark}.{r}").exists() for r in range(nproc)), moment)  # noqa: B023
        run.signal(number, whom)
        if whom is not None:
            Path(f"{mark}.go").touch()
        assert run.wait() == 0, run.output
        assert "Traceback" not in run.output
        assert not run.ranks()
        word = json.loads((folder / "preempted.json").read_text())
        # Several ranks agree on it while they compute another step, or two if only one of them knows.
        late = 0 if nproc == 1 else 1 if whom is None else 2
        if moment == "save" and mode == "async":
            late += 4  # training goes on meanwhile, up to the next save, which waits for this one
        assert stopped <= word["step"] <= stopped + late, (moment, word)
        if word["step"]:
            assert word["checkpoint"] == str(folder / f"checkpoint/step-{word['step']}")
            assert CheckpointFolder(folder / "checkpoint").problem(word["step"]) is None
        assert f"stopped at step {word['step']} by {word['signal']}" in run.output
        if whom in (None, 0):
            assert word["signal"] in (number.name, "SIGTERM")  # torchrun hands on any as SIGTERM
        assert max(steps(folder), default=0) == word["step"]
    run = runs(folder, *options, nproc=nproc)
    assert f"resuming after step {word['step']}" in run.output
    assert not (folder / "preempted.json").exists()
    reference = whole if nproc == 1 else whole_of_two
    assert curve(folder) == curve(reference)
    same_tensors(folder / "checkpoint/step-20", reference / "checkpoint/step-20", tmp_path)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_that_is_told_to_stop_in_its_last_save_is_done(runs: Runs, tmp_path: Path, nproc: int) -> None:
    mark = tmp_path / "mark"
    options = ["--training.steps", 4, "--validation.enable", "false"]
    run = runs.start("run", *options, nproc=nproc, faults=[{"kind": "hold_save", "step": 4, "mark": str(mark)}])
    run.until(lambda: all(Path(f"{mark}.{rank}").exists() for rank in range(nproc)), "the last save")
    run.signal(signal.SIGTERM)
    assert run.wait() == 0, run.output
    assert "Traceback" not in run.output
    assert "done: 4 steps" in run.output
    assert not (run.folder / "preempted.json").exists()
    assert CheckpointFolder(run.folder / "checkpoint").problem(4) is None


def test_a_second_ctrl_c_ends_at_once(runs: Runs, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    run = runs.start("run", faults=[{"kind": "hang", "steps": [6], "mark": str(mark)}])
    run.until(mark.exists, "step 6")
    run.signal(signal.SIGINT)
    time.sleep(1.5)  # a repeated signal within a second is taken for the same one
    assert run.poll() is None, run.output
    run.signal(signal.SIGINT)
    told = time.monotonic()
    assert run.wait() == 130, run.output
    assert time.monotonic() - told < 10
    assert "interrupted at step 6. The last checkpoint is" in run.output
    assert "Traceback" not in run.output


def test_ranks_whose_launcher_is_killed_save_and_end(runs: Runs, whole_of_two: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    fault = {"kind": "hold_save", "step": 12, "mark": str(mark), "stubborn": True}
    first = runs.start("run", nproc=2, faults=[fault])
    first.until(lambda: all(Path(f"{mark}.{rank}").exists() for rank in range(2)), "the save of step 12")
    ranks = first.ranks()
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    second = runs(first.folder, nproc=2, status=2)
    assert f"is in use by another run, process {ranks[0]} on {socket.gethostname()}" in second.output
    assert all(map(is_alive, ranks.values()))
    told = [Path(f"{mark}.told.{rank}") for rank in ranks]
    deadline = time.monotonic() + 20
    while not all(file.exists() for file in told):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    Path(f"{mark}.go").touch()
    released = time.monotonic()
    while any(map(is_alive, ranks.values())):
        assert time.monotonic() - released < 30, first.output
        time.sleep(0.01)
    word = json.loads((first.folder / "preempted.json").read_text())
    assert (word["step"], word["signal"]) in ((12, "SIGTERM"), (13, "SIGTERM"))
    assert "Traceback" not in first.output
    runs(first.folder, nproc=2)
    assert curve(first.folder) == curve(whole_of_two)
