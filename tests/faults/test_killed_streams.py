"""A run on a streamed mixture that is killed, and goes on with other ranks and workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.corpora import write_streamed_mixture
from tests.faults.runs import Runs, records

STEPS = 120


def test_a_killed_run_goes_on_with_other_ranks_and_workers(runs: Runs, tmp_path: Path) -> None:
    config = write_streamed_mixture(tmp_path, steps=STEPS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs(whole, config=config)
    # Metrics are written every ten steps.
    run = runs.start(killed, "--data.num_workers", 1, nproc=2, config=config)
    run.at_step(30)
    assert run.poll() is None, "it was killed while it ran"
    run.end()
    resumed = runs(killed, "--data.num_workers", 2, config=config)
    assert "resuming after step" in resumed.output
    assert records(killed, "batch_hash") == records(whole, "batch_hash")
    assert records(killed, "loss") == pytest.approx(records(whole, "loss"), rel=1e-4)
    assert records(killed, "val_loss")[STEPS] == pytest.approx(records(whole, "val_loss")[STEPS], rel=1e-4)
    for name, share in (("lines", 2 / 3), ("table", 1 / 3)):
        found = records(whole, f"share_{name}")
        assert sum(found.values()) / STEPS == pytest.approx(share, abs=0.03)
    assert 0 < sum(records(whole, "padding_share").values()) / STEPS < 0.1

    fitting = runs(killed, "--training.steps", STEPS + 1, nproc=3, config=config, status=2).output
    assert "4 rows cannot be shared out evenly over 3" in fitting
