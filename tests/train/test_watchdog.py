"""What the watchdog makes of signs of life, without the ranks that give them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from torchtitan_style.train import watchdog
from torchtitan_style.train.watchdog import Watchdog


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """judged(sign of rank 1): what rank 0 of two does that has got nowhere for too long."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    monkeypatch.setattr(watchdog, "_TICK", 0.01)
    done: list[Any] = []
    monkeypatch.setattr(os, "_exit", lambda status: done.append(("exit", status)))
    monkeypatch.setattr(os, "kill", lambda pid, number: done.append(("kill", pid)))

    def judged(sign: dict[str, Any]) -> list[Any]:
        mine = Watchdog(tmp_path / "hang", limit=1000.0, warn=pytest.fail)
        mine.close()
        mine._closed.clear()
        mine.limit, mine._since, mine._heard = 5.0, time.monotonic() - 60, time.monotonic() + 60
        named = {"collective": 3, "name": "collective 3", "step": 7, "host": os.uname().nodename, "pid": 99, "tick": 4}
        mine._signs = {1: named | sign}
        mine._judge()
        return done

    yield judged
    dist.destroy_process_group()


def test_a_rank_that_is_silent_is_ended(judged, capsys) -> None:
    assert judged({"stalled": 60.0}) == [("kill", 99), ("exit", 1)]
    assert "rank 1 does not answer" in capsys.readouterr().err


def test_a_rank_that_is_done_is_not_silent(judged, capsys) -> None:
    assert judged({"stalled": 0.1, "closed": True}) == [("exit", 1)]  # and its process may be another one by now
    assert "does not answer" not in capsys.readouterr().err


def test_a_collective_that_cannot_be_told_ends_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def garbled(**_: Any) -> str:
        raise RuntimeError("not UTF-8")

    monkeypatch.setattr(watchdog.torch._C._distributed_c10d, "_dump_fr_trace_json", garbled)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    assert watchdog._last_collective() == (0, "a collective")


@pytest.mark.parametrize(
    ("signs", "named"),
    [
        # Ranks 0 and 1 are stage 0, ranks 2 and 3 stage 1, which has entered more collectives.
        ([(3, True), (3, True), (9, False), (9, True)], "rank 2 (pipeline stage 1) hangs"),
        ([(3, True), (2, True), (9, True), (9, True)], "rank 1 (pipeline stage 0) hangs"),
        ([(3, True), (3, True), (9, True), (9, True)], "all ranks hang"),
    ],
)
def test_a_pipelines_rank_is_named_with_its_stage(signs: list[tuple[int, bool]], named: str) -> None:
    answering = {
        rank: {"collective": number, "name": f"collective {number}", "waits": waits, "stalled": 60.0, "step": 7}
        for rank, (number, waits) in enumerate(signs)
    }
    assert watchdog._verdict([], answering, [0, 0, 1, 1]).startswith(named)
    assert "rank 3 (pipeline stage 1) does not answer" in watchdog._verdict([3], answering, [0, 0, 1, 1])
