"""``verify --config`` finds what is wrong with a pipeline, and says where: one thing is broken at a time."""

from __future__ import annotations

import pytest
from faulty_pipelines import FAULTS

from tests.verification.conftest import Checks

OVERRIDES = [
    *("--model.flavor", "debug", "--training.seq_len", "32", "--training.mixed_precision_param", "float32"),
    *("--training.global_batch_size", "8", "--training.local_batch_size", "2", "--lr_scheduler.warmup_steps", "2"),
    *("--parallelism.pipeline_parallel_degree", "2", "--parallelism.pipeline_parallel_blocks", "[1, 1]"),
]

# For each fault: the check that must fail, and what must be named.
EXPECTED = {
    "a stage boundary drops a gradient": ("every gradient of step 1", "layers.0.mlp.up_proj.weight (pipeline stage 0)"),
    "a tied copy not summed": ("every gradient of step 1", "model.embed_tokens.weight (pipeline stage 0)"),
    "a tied copy not brought up to date": ("loss of step 1", "step 1: "),
    "labels of other rows": ("loss of step 1", "model.layers.1.mlp.up_proj.weight (pipeline stage 1)"),
}


@pytest.fixture(scope="module")
def checks(find_faults) -> Checks:
    return find_faults("faulty_pipelines.py", OVERRIDES, 2)


def test_a_pipeline_that_is_right_passes(checks) -> None:
    assert [check.name for check in checks["none"].values() if not check.passed] == []
    assert all(check.cases > 0 for check in checks["none"].values())
    assert EXPECTED.keys() == FAULTS.keys() - {"none"}


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_fault_is_found_and_named(checks, fault: str) -> None:
    check, named = EXPECTED[fault]
    assert not checks[fault][check].passed
    assert any(named in line for each in checks[fault].values() if not each.passed for line in each.faults)


def test_the_stage_behind_a_boundary_alone_is_blamed(checks) -> None:
    found = checks["a stage boundary drops a gradient"]["every gradient of step 1"]
    assert all("(pipeline stage 0)" in line for line in found.faults)
    found = checks["a tied copy not summed"]["every gradient of step 1"]
    assert len(found.faults) == 1
