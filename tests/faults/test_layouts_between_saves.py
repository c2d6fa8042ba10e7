"""A run that goes on with another layout each time: the same state, the same data, the same curve."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.runs import Runs, records, same_tensors, steps

FIVE = [(4, 1, 0), (4, 2, 0), (1, 1, 2), (4, 4, 0), (4, 1, 1)]
"""Processes, tensor parallel degree, data workers."""
THREE = [(1, 1, 2), (4, 2, 0), (2, 1, 0)]


@pytest.mark.parametrize("layouts", [THREE, pytest.param(FIVE, marks=pytest.mark.nightly)], ids=["3", "5"])
def test_a_run_goes_on_in_other_layouts(
    runs: Runs, whole: Path, tmp_path: Path, layouts: list[tuple[int, int, int]]
) -> None:
    folder, last = runs.folder("run"), 4 * len(layouts)
    for number, (nproc, tp, workers) in enumerate(layouts):
        loaded, before = tmp_path / f"loaded-{number}", 4 * number
        options = ["--training.steps", before + 4, "--parallelism.tensor_parallel_degree", tp,
                   "--data.num_workers", workers]  # fmt: skip
        fault = {"kind": "save_what_was_loaded", "folder": str(loaded)}
        run = runs(folder, *options, nproc=nproc, faults=[fault])
        if number:
            assert f"resuming after step {before}" in run.output
            assert "dropout" not in run.output
            same_tensors(loaded, folder / f"checkpoint/step-{before}", tmp_path)
    for field in ("batch_hash", "lr"):
        usual = records(whole, field)
        assert records(folder, field) == {step: value for step, value in usual.items() if step <= last}
    losses, usual = steps(folder), steps(whole)
    assert losses.keys() == set(range(1, last + 1))
    for step, loss in losses.items():
        assert abs(usual[step] - loss) < 1e-5, step

    shutil.rmtree(folder / f"checkpoint/step-{last}")
    dropout = ["--model.dropout", 0.1, "--training.steps", last - 3]
    output = runs(folder, *dropout).output
    assert f"resuming after step {last - 4}" in output
    assert "the layout changed since the checkpoint, so dropout draws different numbers" in output


def test_a_save_in_the_background_is_the_same(runs: Runs, whole_of_two: Path, tmp_path: Path) -> None:
    run = runs("run", "--checkpoint.async_mode", "async", nproc=2)
    for step in (12, 16, 20):
        same_tensors(run.folder / f"checkpoint/step-{step}", whole_of_two / f"checkpoint/step-{step}", tmp_path)
