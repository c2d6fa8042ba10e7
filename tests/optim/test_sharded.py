"""Sharded optimizers: the same weights as in one piece, given the same gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sharded_on_ranks import SHAPES, STEPS


@pytest.fixture(scope="module", params=[2, 4])
def found(request, run_ranks, tmp_path_factory) -> dict[str, dict[str, float]]:
    output = tmp_path_factory.mktemp("muon") / "found.json"
    run_ranks(Path(__file__).parent / "sharded_on_ranks.py", request.param, output)
    return json.loads(output.read_text())


def test_weights_and_state_are_those_of_one_piece(found) -> None:
    assert len(found) in (16, 40)
    for name, result in found.items():
        assert (result["weights"], result["state"]) == (0, 0), name


def test_adamw_is_that_of_one_piece(found) -> None:
    # Its kernel takes elements in groups, and rounds those that are left over otherwise.
    for name, result in found.items():
        assert result["adamw"] < 1e-6, name


def test_each_matrix_is_orthogonalized_once_a_step(found) -> None:
    for name, result in found.items():
        assert result["orthogonalized"] == STEPS * len(SHAPES), name
