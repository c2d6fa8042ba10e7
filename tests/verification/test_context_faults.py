"""``verify --config`` finds what is wrong where rows are shared out over ranks: one thing is broken at a time."""

from __future__ import annotations

import pytest
from faulty_contexts import FAULTS

from tests.verification.conftest import Checks

OVERRIDES = [
    *("--model.flavor", "debug", "--training.seq_len", "32", "--training.mixed_precision_param", "float32"),
    *("--training.global_batch_size", "4", "--training.local_batch_size", "2", "--lr_scheduler.warmup_steps", "2"),
    *("--parallelism.context_parallel_degree", "2", "--data.document_mask", "true"),
]

# For each fault: the check that must fail, and what must be named.
EXPECTED = {
    "a mask by local positions": ("loss of step 1", "model.layers.0.self_attn.q_proj.weight"),
    "a block of keys missing": ("loss of step 1", "model.layers.0.self_attn.k_proj.weight"),
    "gradients of keys not summed": ("every gradient of step 1", "model.layers.1.self_attn.v_proj.weight"),
    "ranks with the same part": ("loss of step 1", "model.embed_tokens.weight"),
}


@pytest.fixture(scope="module")
def checks(find_faults) -> Checks:
    return find_faults("faulty_contexts.py", OVERRIDES, 2)


def test_a_layout_that_is_right_passes(checks) -> None:
    assert [check.name for check in checks["none"].values() if not check.passed] == []
    assert all(check.cases > 0 for check in checks["none"].values())
    assert EXPECTED.keys() == FAULTS.keys() - {"none"}


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_fault_is_found_and_named(checks, fault: str) -> None:
    check, named = EXPECTED[fault]
    assert not checks[fault][check].passed
    assert any(named in line for each in checks[fault].values() if not each.passed for line in each.faults)


def test_what_is_behind_the_gathered_values_is_not_blamed(checks) -> None:
    faults = checks["gradients of keys not summed"]["every gradient of step 1"].faults
    assert not any("layers.1.mlp" in line or "layers.1.self_attn.o_proj" in line for line in faults)
