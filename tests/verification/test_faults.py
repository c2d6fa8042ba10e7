"""``verify --config`` finds what is wrong with a layout, and says where: one thing is broken at a time."""

from __future__ import annotations

import pytest
from faulty_layouts import FAULTS

from tests.verification.conftest import Checks

OVERRIDES = [
    *("--model.flavor", "debug", "--training.seq_len", "32", "--training.mixed_precision_param", "float32"),
    *("--training.global_batch_size", "8", "--training.local_batch_size", "2"),
    *("--parallelism.tensor_parallel_degree", "2", "--lr_scheduler.warmup_steps", "2"),
]

# For each fault: the checks that must fail, and what they must name.
EXPECTED = {
    "down_proj of layer 1 not reduced": ("loss of step 1", "model.layers.1.mlp.down_proj.weight"),
    "embedding and head untied": ("names of parameters", "lm_head.weight"),
    "input_layernorm left out of the plan": ("every gradient of step 1", "model.layers.0.input_layernorm.weight"),
    "loss divided by the tokens of the rank": ("loss of step 1", "model.norm.weight"),
    "gradients averaged over ranks": ("every gradient of step 1", "the norm is 0.5 × the reference"),
    "weights drawn by rank": ("initial weights, bit for bit", "model.layers.1.self_attn.q_proj.weight"),
    "norm counts copies twice": ("gradient norm of steps 1 to 5", "step 1: "),
}


@pytest.fixture(scope="module")
def checks(find_faults) -> Checks:
    return find_faults("faulty_layouts.py", OVERRIDES, 4)


def test_a_layout_that_is_right_passes(checks) -> None:
    assert [check.name for check in checks["none"].values() if not check.passed] == []
    assert all(check.cases > 0 for check in checks["none"].values())


def test_every_fault_is_looked_for() -> None:
    assert EXPECTED.keys() == FAULTS.keys() - {"none"}


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_fault_is_found_and_named(checks, fault: str) -> None:
    check, named = EXPECTED[fault]
    found = checks[fault]
    assert not found[check].passed
    assert any(named in line for each in found.values() if not each.passed for line in each.faults)


def test_parameters_that_are_right_are_not_blamed(checks) -> None:
    found = checks["input_layernorm left out of the plan"]["every gradient of step 1"]
    assert found.cases == 24
    assert all("input_layernorm" in line for line in found.faults)
