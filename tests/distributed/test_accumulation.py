"""Gradients over several microbatches: the same sums, and nothing whole kept in between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.parametrize("replicate", [1, 2])
@pytest.mark.parametrize(("reduce", "held"), [("each_microbatch", 0), ("last_microbatch", 1)])
def test_gradients_are_the_sum_and_whole_ones_are_kept_only_if_asked_for(
    run_ranks, tmp_path: Path, reduce: str, held: int, replicate: int
) -> None:
    output = tmp_path / "gradients.json"
    run_ranks(Path(__file__).parent / "accumulation_of_ranks.py", 2 * replicate, replicate, reduce, output)
    found = json.loads(output.read_text())
    assert found["held"] == held
    assert max(found["apart"].values()) < 1e-5
