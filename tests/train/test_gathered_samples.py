"""A sample of text gathers the weights once, and not for each token."""

from __future__ import annotations

import json
from pathlib import Path

TOKENS, BLOCKS = 6, 2


def test_weights_stay_gathered_for_a_sample_where_memory_allows(run_ranks, tmp_path: Path) -> None:
    run_ranks(Path(__file__).with_name("sample_of_ranks.py"), 2, tmp_path / "found")
    found = json.loads((tmp_path / "found").read_text())
    assert [gathers for _, gathers in found] == [1 + BLOCKS, 1 + TOKENS * BLOCKS, 1 + BLOCKS]
    assert len({text for text, _ in found}) == 1
    assert len(found[0][0]) == TOKENS
