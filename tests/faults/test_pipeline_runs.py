"""Runs over a pipeline: like one process, resumed on other layouts, with bad steps, killed, held up by one stage."""

from __future__ import annotations

import json
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
CP = "--parallelism.context_parallel_degree"
SCHEDULE = "--parallelism.pipeline_parallel_schedule"
ZERO_BUBBLE = "ZBVZeroBubble" if torch_version() >= OLDEST_TORCH_OF["ZBVZeroBubble"] else "GPipe"
TWO_STAGES = [PP, 2, "--training.local_batch_size", 2]

LAYOUTS: list[tuple[int, int, list[object]]] = [
    (4, 2, [PP, 2, "--training.local_batch_size", 1]),
    (7, 2, [TP, 2]),
    (10, 2, [CP, 2]),
    (13, 4, [PP, 2, SCHEDULE, ZERO_BUBBLE, "--training.local_batch_size", 1]),
    (16, 1, []),
    (20, 4, [PP, 2, TP, 2, SCHEDULE, "Interleaved1F1B", "--training.local_batch_size", 2]),
]
"""Last step, processes and degrees, the fourth with two data-parallel ranks."""


def test_a_run_goes_on_with_and_without_a_pipeline(runs: Runs, command: Command, whole: Path, tmp_path: Path) -> None:
    folder, before = runs.folder("run"), 0
    for last, nproc, degrees in LAYOUTS:
        loaded = tmp_path / f"loaded-{before}"
        fault = {"kind": "save_what_was_loaded", "folder": str(loaded)}
        run = runs(folder, "--training.steps", last, *degrees, nproc=nproc, faults=[fault])
        if before:
            assert f"resuming after step {before}" in run.output
            same_tensors(loaded, folder / f"checkpoint/step-{before}", tmp_path)
        before = last
    for key in ("batch_hash", "lr"):
        assert records(folder, key) == records(whole, key)
    for key in ("loss", "grad_norm", "val_loss", "val_accuracy"):
        for step, right in records(whole, key).items():
            assert records(folder, key)[step] == pytest.approx(right, rel=1e-5), (key, step)
    checkpoint = folder / "checkpoint/step-20"
    assert read_manifest(checkpoint).mesh["pp"] == 2
    assert "pp 2" in command("torchtitan_style.commands.checkpoint", "show", checkpoint)
    command("torchtitan_style.commands.export_hf", "--checkpoint", checkpoint, "--output", tmp_path / "exported")
    options = ["--prompt", "a", "--max-new-tokens", 2]
    assert command("torchtitan_style.commands.generate", "--checkpoint", checkpoint, *options)


@pytest.mark.parametrize(
    ("nproc", "layout"),
    [
        (2, TWO_STAGES),
        pytest.param(4, [*TWO_STAGES, CP, 2], marks=pytest.mark.nightly),
        pytest.param(4, [*TWO_STAGES, TP, 2, SCHEDULE, "Interleaved1F1B"], marks=pytest.mark.nightly),
        pytest.param(4, [PP, 2, SCHEDULE, ZERO_BUBBLE, "--training.local_batch_size", 1], marks=pytest.mark.nightly),
    ],
    ids=["pp2", "pp2 × cp2", "pp2 × tp2", "pp2 × dp2"],
)
def test_muon_z_loss_and_samples_are_those_of_one_process(
    runs: Runs, tmp_path: Path, nproc: int, layout: list[object]
) -> None:
    options = ["--optimizer.name", "muon", "--training.z_loss", 0.01, "--training.steps", 8, "--validation.freq", 4]
    options += ["--generation.enable", "true", "--generation.max_new_tokens", 6]
    one = runs("one", *options).folder
    many = runs("many", *options, *layout, nproc=nproc).folder
    # Orthogonalising lifts the weakest directions, and with them the rounding of sums in another order.
    for key in ("loss", "grad_norm", "val_loss", "val_accuracy"):
        assert records(many, key) == pytest.approx(records(one, key), rel=1e-4), key
    assert samples(many) == samples(one)
    assert [step for step, _ in samples(one)] == [4, 8]


def samples(folder: Path) -> list[tuple[int, str]]:
    events = map(json.loads, (folder / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return [(event["step"], event["text"]) for event in events if event["event"] == "sample"]


def test_a_bad_step_is_skipped_on_every_stage(runs: Runs, tmp_path: Path) -> None:
    faults = [{"kind": "nan_gradient", "rank": stage, "steps": [7 + stage]} for stage in (0, 1)]
    faults += [{"kind": "high_loss", "rank": 1, "steps": [10], "factor": 50}]  # where the loss is
    options = ["--checkpoint.interval", 1, "--checkpoint.keep_latest_k", 0, "--training.steps", 11]
    options += ["--training.spike_sigma", 8, "--training.spike_window", 6]
    run = runs("run", *TWO_STAGES, *options, nproc=2, faults=faults)
    assert records(run.folder, "skipped") == {7: True, 8: True, 10: True}
    assert "step 10 was skipped: loss " in run.output
    assert "a spike (training.spike_sigma)" in run.output
    for step in (7, 8, 10):
        same_tensors(run.folder / f"checkpoint/step-{step - 1}", run.folder / f"checkpoint/step-{step}", tmp_path)


def test_a_stage_killed_in_a_step_is_restarted(runs: Runs, whole: Path, tmp_path: Path) -> None:
    options = [*TWO_STAGES, "--model.dropout", 0.1, "--activation_checkpoint.mode", "full"]
    undisturbed = runs("undisturbed", *options, nproc=2).folder
    assert steps(undisturbed)[1] != pytest.approx(steps(whole)[1], rel=1e-4)  # by what is dropped
    died = tmp_path / "died"
    fault = {"kind": "die", "rank": 1, "steps": [11], "once": str(died)}
    run = runs.start("run", *options, "--checkpoint.async_mode", "async", nproc=2, faults=[fault])
    run.at_step(2)
    first = run.ranks()
    run.until(died.exists, "rank 1 dies")
    run.until(lambda: not is_alive(first[0]), "rank 0 ends")
    assert run.wait() == 0, run.output
    assert re.search("resuming after step [48]", run.output)  # that of step 8 may have been under way
    assert curve(run.folder) == curve(undisturbed)
    same_tensors(run.folder / "checkpoint/step-20", undisturbed / "checkpoint/step-20", tmp_path)


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
