"""Layouts of experts against the loop over them, as the command verifies them."""

from __future__ import annotations

import pytest

from torchtitan_style.verification.routing import Otherwise, check_routing


@pytest.mark.parametrize("other", [
    "--parallelism.pipeline_parallel_degree",
    pytest.param("--parallelism.tensor_parallel_degree", marks=pytest.mark.nightly),
])  # fmt: skip
def test_a_layout_of_experts_agrees(python, tmp_path, other: str) -> None:
    degrees = ["--parallelism.expert_parallel_degree", 2, other, 2]
    batch = ["--training.global_batch_size", 8, "--training.local_batch_size", 2, "--training.seq_len", 64]
    model = ["--model.name", "qwen3_moe", "--model.flavor", "debug", "--optimizer.name", "muon"]
    model += ["--optimizer.muon.adamw_lr", 1e-2, "--optimizer.muon.normuon_beta2", 0.95]
    line = ["-m", "torchtitan_style", "verify", *model, *degrees, *batch, "--job.dump_folder", tmp_path]
    done = python(*line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("experts of every token") >= 2  # in fp32 and in bf16
    assert "everything agrees" in done.stdout


def test_ties_are_told_apart_from_wrong_experts() -> None:
    tied = Otherwise(tokens=400, ties=("layer 0, row 1, position 2",), wrong=())
    check, more = check_routing([tied, Otherwise(tokens=0, ties=(), wrong=())])
    assert check.passed
    assert "as likely" in check.notes[0]
    assert more == 0.1
    check, _ = check_routing([tied, Otherwise(tokens=400, ties=(), wrong=("layer 1, row 0, position 9",))])
    assert not check.passed
    assert check.faults == ("layer 1, row 0, position 9",)
