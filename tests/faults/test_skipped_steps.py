"""Gradients that are not finite on one rank, and losses that jump."""

from __future__ import annotations

from pathlib import Path

from tests.faults.runs import Runs, records, same_tensors, steps

NAN = {"kind": "nan_gradient", "rank": 1}
EVERY_STEP = ["--checkpoint.interval", 1, "--checkpoint.keep_latest_k", 0, "--training.max_skipped_steps", 2]


def test_a_nan_on_one_rank_is_skipped_on_all(runs: Runs, whole_of_two: Path, tmp_path: Path) -> None:
    fault = NAN | {"steps": [6, 9, 10]}
    folder = runs("run", *EVERY_STEP, "--training.steps", 12, nproc=2, faults=[fault]).folder
    skipped = records(folder, "skipped")
    assert skipped == {6: True, 9: True, 10: True}
    for step in skipped:
        same_tensors(folder / f"checkpoint/step-{step - 1}", folder / f"checkpoint/step-{step}", tmp_path)
    rates, usual = records(folder, "lr"), records(whole_of_two, "lr")
    updates = [1, 2, 3, 4, 5, 6, 6, 7, 8, 8, 8, 9]
    assert [rates[step] for step in range(1, 13)] == [usual[update] for update in updates]
    losses, reference = steps(folder), steps(whole_of_two)
    assert [losses[step] for step in range(1, 7)] == [reference[step] for step in range(1, 7)]
    assert losses[7] != reference[7]  # an update was left out
    assert records(folder, "batch_hash") == {s: h for s, h in records(whole_of_two, "batch_hash").items() if s <= 12}

    # A resume right after a skipped step goes on the same way.
    again = runs.folder("again")
    runs(again, *EVERY_STEP, "--training.steps", 10, nproc=2, faults=[fault])
    runs(again, *EVERY_STEP, "--training.steps", 12, nproc=2)
    assert records(again, "lr") == rates
    assert steps(again) == losses
    same_tensors(again / "checkpoint/step-12", folder / "checkpoint/step-12", tmp_path)


def test_nans_for_ever_stop_the_run(runs: Runs, tmp_path: Path) -> None:
    fault = NAN | {"steps": list(range(4, 21))}
    run = runs("run", *EVERY_STEP, nproc=2, faults=[fault], status=1)
    assert "3 steps in a row were skipped (training.max_skipped_steps is 2)" in run.output
    assert run.output.count("error: 3 steps in a row") == 1  # and it was not tried again
    assert "Traceback" not in run.output
    assert list(records(run.folder, "skipped")) == [4, 5, 6]
    same_tensors(run.folder / "checkpoint/step-3", run.folder / "checkpoint/step-5", tmp_path)


SPIKE = ["--training.spike_sigma", 8, "--training.spike_window", 6]


def test_too_many_between_two_log_lines_stop_the_run(runs: Runs) -> None:
    fault = {"kind": "nan_gradient", "rank": 0, "steps": [4, 5, 6]}
    options = ["--metrics.log_freq", 10, "--training.max_skipped_steps", 2, "--training.steps", 12]
    run = runs("run", *options, faults=[fault], status=1)
    assert "3 steps in a row were skipped (training.max_skipped_steps is 2)" in run.output


def test_a_spike_is_skipped(runs: Runs, whole: Path, tmp_path: Path) -> None:
    options = [*SPIKE, "--checkpoint.interval", 9, "--checkpoint.keep_latest_k", 0]
    fault = {"kind": "high_loss", "steps": [10], "factor": 50}
    run = runs("run", *options, "--training.steps", 10, faults=[fault])
    assert records(run.folder, "skipped") == {10: True}
    assert "step 10 was skipped: loss " in run.output
    assert "a spike (training.spike_sigma)" in run.output
    same_tensors(run.folder / "checkpoint/step-9", run.folder / "checkpoint/step-10", tmp_path)
    runs(run.folder, *options, "--training.steps", 12)
    rates, usual = records(run.folder, "lr"), records(whole, "lr")
    assert [rates[10], rates[11], rates[12]] == [usual[10], usual[10], usual[11]]


def test_a_spike_is_gone_back_from(runs: Runs, whole: Path, tmp_path: Path) -> None:
    options = [*SPIKE, "--training.spike_action", "rewind"]
    fault = {"kind": "high_loss", "steps": [10], "factor": 50}
    run = runs("run", *options, "--training.steps", 14, nproc=1, faults=[fault | {"times": 1}])
    assert "rewinding to step 8; the data continues after step 10" in run.output
    assert "resuming after step 14" in runs(run.folder, *options, "--training.steps", 18).output
    hashes, usual = records(run.folder, "batch_hash"), records(whole, "batch_hash")
    assert [hashes[step] for step in range(1, 9)] == [usual[step] for step in range(1, 9)]
    assert [hashes[step] for step in range(9, 19)] == [usual[step + 2] for step in range(9, 19)]
    rates, usual = records(run.folder, "lr"), records(whole, "lr")
    assert rates == {step: rate for step, rate in usual.items() if step <= 18}
    assert steps(run.folder)[8] == steps(whole)[8]
    assert not records(run.folder, "skipped")
    assert records(run.folder, "tokens_seen")[18] == 20 * 4 * 16
    # The same, without a stop.
    once = runs("once", *options, "--training.steps", 18, faults=[fault | {"times": 1}]).folder
    assert steps(once) == steps(run.folder)
    same_tensors(once / "checkpoint/step-18", run.folder / "checkpoint/step-18", tmp_path)


def test_spikes_with_nothing_to_go_back_to_stop_the_run(runs: Runs) -> None:
    options = [*SPIKE, "--training.spike_action", "rewind", "--training.max_skipped_steps", 2]
    fault = {"kind": "high_loss", "steps": [10, 11, 12, 13], "factor": 50}
    run = runs("run", *options, "--checkpoint.enable", "false", "--training.steps", 16, faults=[fault], status=1)
    assert "3 steps in a row were skipped (training.max_skipped_steps), and there is no checkpoint" in run.output


def test_a_stop_right_after_going_back_keeps_that_it_went_back(runs: Runs, whole: Path) -> None:
    options = [*SPIKE, "--training.spike_action", "rewind"]
    faults = [{"kind": "high_loss", "steps": [10], "factor": 50, "times": 1}, {"kind": "stop_in_rewind"}]
    run = runs("run", *options, "--training.steps", 14, faults=faults)
    assert "stopped at step 8 by SIGTERM" in run.output
    runs(run.folder, *options, "--training.steps", 14)
    hashes, usual = records(run.folder, "batch_hash"), records(whole, "batch_hash")
    assert [hashes[step] for step in range(9, 15)] == [usual[step + 2] for step in range(9, 15)]


def test_spikes_without_end_stop_the_run(runs: Runs) -> None:
    options = [*SPIKE, "--training.spike_action", "rewind", "--training.max_skipped_steps", 2]
    fault = {"kind": "high_loss", "steps": [10], "factor": 50}
    run = runs("run", *options, nproc=2, faults=[fault], status=1)
    assert "rewound 2 times without getting past step 10 (training.max_skipped_steps)" in run.output
    assert "Traceback" not in run.output
