"""What the log collects, reads, writes and returns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from torchtitan_style.config.layout import Layout
from torchtitan_style.config.schema import Metrics
from torchtitan_style.metrics.display import Display
from torchtitan_style.metrics.log import TrainingLog

SPEED = {"tokens_per_second": 5.0, "mfu": None, "peak_memory_gib": 0.1, "data_wait_fraction": 0.0}


class Meter:
    def __init__(self) -> None:
        self.tokens = 0

    def restart(self) -> None: ...

    def add_tokens(self, count: int) -> None:
        self.tokens += count

    def read(self) -> dict[str, Any]:
        return SPEED


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An opened log of two ranks that have the same: their sums are double."""
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: x.mul_(2))

    def open_log(first_step: int = 0, **settings: Any) -> TrainingLog:
        return TrainingLog(
            Metrics(log_freq=4, enable_tensorboard=False),
            SimpleNamespace(dp_group=None, is_main=True, layout=Layout()),  # type: ignore[arg-type]
            Display(is_main=True),
            tmp_path,
            first_step=first_step,
            last_step=10,
            tokens_per_step=64,
            meter=Meter(),  # type: ignore[arg-type]
            learning_rates=lambda update: {"lr": 0.5 * update},
            settings={},
            **{"corpora": [], "report_padding": False} | settings,
        )

    return open_log


def result(loss: float, *, update: int, taken: bool = True, **counts: Any) -> Any:
    tensors = {"loss": torch.tensor(loss), "grad_norm": torch.tensor(1.5)}
    tensors |= {"taken": torch.tensor(taken), "update": torch.tensor(update)}
    return SimpleNamespace(
        **tensors, **{"batch_hash": 7, "padding": 0, "corpus_rows": (), "unreadable": 0, "routing": None} | counts
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_due_after_the_first_step_every_so_many_and_the_last(log) -> None:
    assert [step for step in range(1, 11) if log().due(step)] == [1, 4, 8, 10]
    assert [step for step in range(6, 11) if log(5).due(step)] == [6, 8, 10]


def test_all_steps_since_the_last_flush_are_written_and_returned(log, tmp_path: Path) -> None:
    opened = log()
    assert opened.flush() == []
    opened.add(1, 64, result(3.0, update=1))
    opened.add(2, 128, result(math.nan, update=2, taken=False, unreadable=1))
    opened.add(3, 192, result(2.5, update=2))
    assert lines(tmp_path) == []
    figures = opened.flush()
    assert [(step.step, step.taken, step.update, step.unreadable) for step in figures] == [
        (1, True, 1, 0), (2, False, 2, 2), (3, True, 2, 0),
    ]  # fmt: skip
    assert opened.flush() == []
    found = lines(tmp_path)
    assert [list(line) for line in found[::2]] == [
        ["step", "loss", "grad_norm", "lr", "tokens_seen", *SPEED, "time", "batch_hash"]
    ] * 2
    assert [(line["loss"], line["lr"], line.get("skipped")) for line in found] == [
        (3.0, 0.5, None), (None, 1.0, True), (2.5, 1.0, None),
    ]  # fmt: skip
    assert found[0]["batch_hash"] == f"{14:016x}"
    assert opened.last["step"] == 3
    assert opened.meter.tokens == 3 * 64


def test_many_skipped_steps_are_written_and_no_more(log, tmp_path: Path) -> None:
    opened = log()
    for step in range(1, 9):
        opened.add(step, 64 * step, result(math.inf, update=1, taken=False))
    assert len(opened.flush()) == 8
    assert all(line["skipped"] for line in lines(tmp_path))


def test_what_rows_were_made_of_is_a_share_of_all_ranks(log, tmp_path: Path) -> None:
    opened = log(corpora=["a", "b"], report_padding=True)
    opened.add(1, 64, result(3.0, update=1, padding=8, corpus_rows=(3, 1)))
    opened.flush()
    [line] = lines(tmp_path)
    assert (line["share_a"], line["share_b"], line["padding_share"]) == (0.75, 0.25, 16 / 64)
