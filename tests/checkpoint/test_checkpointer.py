"""Saving and deleting, in a group of one process; how long a checkpoint is expected to be."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchtitan_style.checkpoint.checkpointer import Checkpointer
from torchtitan_style.checkpoint.writer import HashingWriter
from torchtitan_style.common.errors import RunError, UserError
from torchtitan_style.config.layout import Layout
from torchtitan_style.config.schema import Checkpoint, LRScheduler, Optimizer
from torchtitan_style.distributed.world import World, destroy_world, init_world
from torchtitan_style.launch.preflight import checkpoint_bytes
from torchtitan_style.models.qwen3.spec import QWEN3
from torchtitan_style.models.section import schema_of
from torchtitan_style.optim.build import Optimizers
from torchtitan_style.train.step import build_optimizer, build_training_model


@pytest.fixture
def world() -> Iterator[World]:
    yield init_world(Layout(), timeout_seconds=60)
    destroy_world()


@pytest.fixture
def make(world: World, tmp_path: Path):
    (tmp_path / "tokenizer").mkdir()

    def make(model: nn.Module | None = None, optimizer: Any = None, said: Any = None, **settings: Any) -> Checkpointer:
        model = model or nn.Linear(8, 8)
        optimizer = optimizer or Optimizers(
            model, Optimizer(), LRScheduler(), total_steps=9, dtype=torch.float32, spec=QWEN3, head_dim=8
        )
        return Checkpointer(
            Checkpoint(**settings),
            tmp_path / "checkpoint",
            model=model,
            optimizer=optimizer,
            settings="",
            tokenizer=tmp_path / "tokenizer",
            about={},
            say=pytest.fail if said is None else said.append,
        )

    return make


def save(checkpointer: Checkpointer, *steps: int, best: bool = False) -> None:
    for step in steps:
        checkpointer.save(step, {}, figures={}, best=best)
    checkpointer.finish()


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_old_ones_go_when_a_newer_one_is_whole(make, mode: str) -> None:
    checkpointer = make(keep_latest_k=2, keep_every=30, async_mode=mode)
    save(checkpointer, 10, best=True)
    save(checkpointer, 20, 30, 40, 50)
    assert checkpointer.folder.steps() == [50, 40, 30, 10]
    checkpointer.close()


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_the_only_good_one_is_never_deleted(make, mode: str, monkeypatch) -> None:
    said: list[str] = []
    checkpointer = make(said=said, keep_latest_k=1, async_mode=mode)
    save(checkpointer, 1)
    real = HashingWriter.write_data

    def write_badly(self: HashingWriter, *args: Any) -> Any:
        """As a disk does that does not keep what it was given."""
        done = real(self, *args)
        for name in self.entries:
            os.truncate(Path(self.path) / name, 100)
        return done

    monkeypatch.setattr(HashingWriter, "write_data", write_badly)
    save(checkpointer, 2, 3)
    monkeypatch.undo()
    assert checkpointer.folder.steps() == [3, 2, 1]
    assert checkpointer.folder.problem(1) is None
    assert "was written but cannot be read back" in said[0]
    assert checkpointer.find(-1) == 1
    save(checkpointer, 4)
    assert checkpointer.folder.steps() == [4]
    checkpointer.close()


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_save_that_fails_leaves_the_one_before(make, mode: str, monkeypatch) -> None:
    said: list[str] = []
    checkpointer = make(said=said, keep_latest_k=1, async_mode=mode, on_error="warn")
    save(checkpointer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(HashingWriter, "write_data", fail)
        save(checkpointer, 2)
        assert checkpointer.folder.steps() == [1]
        assert checkpointer.saved_step == 1
        assert [path.name for path in checkpointer.folder.root.iterdir()] == ["step-1"]
        with pytest.raises(RunError, match=r"step 2 could not be saved: rank 0: .*No space"):
            checkpointer.close()
    save(checkpointer, 3)
    assert checkpointer.folder.steps() == [3]
    checkpointer.close()  # a later one was saved
    assert len(said) == 1


def fail(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_a_file_that_cannot_be_read_back_is_a_failed_save(make, mode: str, on_error: str, monkeypatch) -> None:
    said: list[str] = []
    checkpointer = make(async_mode=mode, on_error=on_error, said=said)
    save(checkpointer, 1)

    def sha256(path: Path, **_: object) -> str:
        raise UserError(f"{path}: cannot be read: Input/output error")

    monkeypatch.setattr("torchtitan_style.checkpoint.manifest.sha256", sha256)
    if on_error == "stop":
        with pytest.raises(RunError, match=r"the checkpoint of step 2 could not be saved: .*Input/output error"):
            save(checkpointer, 2)
    else:
        save(checkpointer, 2)
        assert "the checkpoint of step 2 could not be saved" in said[0]
    checkpointer.wait()
    assert [path.name for path in checkpointer.folder.root.iterdir()] == ["step-1"]


def test_the_watchdog_hears_of_reading(make, monkeypatch) -> None:
    checkpointer = make(keep_latest_k=1)
    save(checkpointer, 1)
    heard: list[str] = []
    checkpointer.advance = lambda: heard.append("reading")
    checkpointer.folder._advance = lambda: heard.append("reading back")
    checkpointer.find(-1)
    found = len(heard)
    checkpointer.load(1)
    assert 0 < found < len(heard)
    assert "reading back" not in heard
    save(checkpointer, 2)  # after which the one before is deleted
    assert "reading back" in heard


def test_training_goes_on_while_a_save_is_written(make, monkeypatch) -> None:
    checkpointer = make(async_mode="async")
    begun, go_on, real = threading.Event(), threading.Event(), HashingWriter.write_data

    def wait(self: HashingWriter, *args: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return real(self, *args)

    monkeypatch.setattr(HashingWriter, "write_data", wait)
    with torch.no_grad():
        checkpointer.model.weight.fill_(1)
        checkpointer.save(1, {}, figures={})
        assert begun.wait(60)
        assert checkpointer.is_busy
        assert checkpointer.folder.steps() == []
        checkpointer.model.weight.fill_(2)
        go_on.set()
        checkpointer.finish()
        assert not checkpointer.is_busy
        checkpointer.load(1)
    assert (checkpointer.model.weight == 1).all()
    checkpointer.close()


def test_a_checkpoint_of_another_model_is_refused(make) -> None:
    checkpointer = make()
    save(checkpointer, 1)
    other = make(model=nn.Linear(8, 9))
    with pytest.raises(UserError, match=r"step-1 cannot be loaded: rank 0: Size mismatch"):
        other.load(1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_expected_size_is_the_real_one(make, world: World, optimizer: str, tied: bool) -> None:
    config = schema_of(QWEN3).model_validate({
        "model": {"flavor": "debug", "hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": tied},
        "optimizer": {"name": optimizer},
        "training": {"steps": 2},
    })  # fmt: skip
    model = build_training_model(config, world, warn=pytest.fail)
    checkpointer = make(model, build_optimizer(model, config, world))
    save(checkpointer, 1)
    real = sum(path.stat().st_size for path in checkpointer.folder.path(1).rglob("*") if path.is_file())
    assert checkpoint_bytes(config) == pytest.approx(real, rel=0.02)
    checkpointer.close()
