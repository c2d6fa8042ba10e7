"""The threads of gloo's groups, of which two would corrupt memory."""

from __future__ import annotations

import json
from pathlib import Path

from torch.distributed import distributed_c10d

from torchtitan_style.distributed.gloo import one_thread_each


def test_each_group_of_a_run_has_one_thread(run_ranks, tmp_path: Path) -> None:
    run_ranks(Path(__file__).with_name("threads_of_groups.py"), 2, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert len(found["threads"]) >= 2  # of all ranks, and of an axis
    assert set(found["threads"]) == {1}
    assert set(found["timeouts"]) == {120.0}  # 60 were asked for


def test_torch_is_left_as_it_was() -> None:
    before = distributed_c10d.ProcessGroupGloo
    with one_thread_each():
        assert distributed_c10d.ProcessGroupGloo is not before
    assert distributed_c10d.ProcessGroupGloo is before
