"""Starting from a checkpoint and rewinding to one, on a tiny model in a group of one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from torchtitan_style.checkpoint.checkpointer import Checkpointer
from torchtitan_style.common.errors import RunError, UserError
from torchtitan_style.config import to_toml
from torchtitan_style.config.layout import Layout
from torchtitan_style.config.schema import LRScheduler, Optimizer
from torchtitan_style.distributed.world import World, destroy_world, init_world
from torchtitan_style.models.qwen3.spec import QWEN3
from torchtitan_style.models.section import schema_of
from torchtitan_style.optim.build import Optimizers
from torchtitan_style.optim.guard import StepGuard
from torchtitan_style.train.identity import Identity
from torchtitan_style.train.observer import Observer
from torchtitan_style.train.policy import StepPolicy
from torchtitan_style.train.resume import Resume
from torchtitan_style.train.rewind import rewind
from torchtitan_style.train.state import SkippedSteps, TrainState

IDENTITY: Identity = {"training": {"seed": 0}, "optimizer": {"name": "adamw"}}


@pytest.fixture
def world() -> Iterator[World]:
    yield init_world(Layout(), timeout_seconds=60)
    destroy_world()


class Run:
    """The parts of a run in ``folder``, as one start of the program makes them."""

    def __init__(self, world: World, folder: Path, *, identity: Identity = IDENTITY, **checkpoint: Any) -> None:
        self.said: list[str] = []
        self.config = schema_of(QWEN3).model_validate(
            {
                "model": {"flavor": "debug"},
                "job": {"dump_folder": str(folder)},
                "checkpoint": {"keep_latest_k": 0, "async_mode": "disabled"} | checkpoint,
                "training": {"max_skipped_steps": 1, "spike_action": "rewind", "spike_sigma": 2, "spike_window": 4},
            }
        )
        self.identity = identity
        self.model = nn.Linear(4, 4)
        self.optimizer = Optimizers(
            self.model, Optimizer(), LRScheduler(), total_steps=9, dtype=torch.float32, spec=QWEN3, head_dim=4
        )
        self.guard = StepGuard(2.0, 4, world.device)
        self.loaded: list[tuple[int, list[str]]] = []
        observer = Observer()
        observer.after_load = lambda step, tensors: self.loaded.append((step, sorted(tensors)))  # type: ignore[method-assign]
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        self.checkpointer = Checkpointer(
            self.config.checkpoint,
            folder / "checkpoint",
            model=self.model,
            optimizer=self.optimizer,
            settings=to_toml(self.config),
            tokenizer=folder / "tokenizer",
            about={"mesh": dataclasses.asdict(world.layout)},
            say=self.said.append,
        )
        display: Any = SimpleNamespace(say=self.said.append, warn=self.said.append)
        self.resume = Resume(
            self.config,
            self.checkpointer,
            self.guard,
            identity=identity,
            layout=world.layout,
            display=display,
            observer=observer,
        )

    def fill(self, value: float) -> None:
        for tensor in self.checkpointer._tensors().values():
            tensor.fill_(value)

    def values(self) -> dict[str, set[float]]:
        return {name: set(tensor.flatten().tolist()) for name, tensor in self.checkpointer._tensors().items()}

    def save(self, *states: TrainState) -> None:
        """Each with tensors that hold its step."""
        for state in states:
            self.fill(state.step)
            saved = {"state": dataclasses.asdict(state), "identity": self.identity}
            self.checkpointer.save(state.step, saved, figures={})
        self.checkpointer.finish()


@pytest.fixture
def start(world: World, tmp_path: Path) -> Callable[..., Run]:
    def start(**settings: Any) -> Run:
        return Run(world, tmp_path, **settings)

    return start


TWO = TrainState(step=2, rows_seen=8, data={"rows": [8]})
FOUR = TrainState(step=4, rows_seen=16, skipped=SkippedSteps(1, 0), recent_losses=[3.0, 2.0], data={"rows": [16]})


def test_a_new_run_starts_with_nothing(start) -> None:
    run = start()
    before = run.values()
    assert run.resume.start() == TrainState()
    assert run.values() == before
    assert (run.said, run.loaded) == ([], [])


def test_the_newest_checkpoint_is_restored_whole(start) -> None:
    start().save(TWO, FOUR)
    run = start()
    assert run.resume.start() == FOUR
    assert all(values == {4.0} for values in run.values().values())
    assert run.optimizer.updates == 3  # one step of four was skipped
    assert run.guard.losses == [3.0, 2.0]
    [(step, names)] = run.loaded
    assert step == 4
    assert names == sorted(run.values())
    assert run.said == []


def test_a_load_step_goes_back_once(start) -> None:
    start().save(TWO, FOUR)
    run = start(load_step=2)
    state = run.resume.start()
    assert (state.step, state.went_back_to) == (2, 2)
    assert all(values == {2.0} for values in run.values().values())
    state.step = 5
    run.save(state)
    again = start(load_step=2)  # the same command, after a stop
    assert again.resume.start().step == 5
    assert again.said == ["the run went back to step 2 before; resuming from its newest checkpoint since then"]


def test_a_different_run_is_refused_before_anything_is_read(start) -> None:
    start().save(TWO)
    run = start(identity=IDENTITY | {"training": {"seed": 7}})
    before = run.values()
    with pytest.raises(UserError, match=r"training\.seed was 0, is 7"):
        run.resume.start()
    assert run.values() == before
    assert run.loaded == []


def test_another_optimizer_starts_without_moments(start) -> None:
    start().save(TWO)
    run = start(identity=IDENTITY | {"optimizer": {"name": "muon"}}, switch_optimizer=True)
    run.fill(9)
    run.resume.start()
    for name, values in run.values().items():
        assert values == ({0.0} if name.startswith("optimizer.") else {2.0}), name
    assert run.optimizer.updates == 2


def test_a_state_that_no_run_wrote_is_a_clear_error(start) -> None:
    run = start()
    run.checkpointer.save(1, {"identity": 3}, figures={})
    run.checkpointer.finish()
    with pytest.raises(UserError, match=r"step-1: its train_state.json cannot be used: identity"):
        start().resume.start()


def test_a_restart_by_the_launcher_is_said(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    run = start()
    run.resume.start()
    assert run.said == ["a process of this run has died; restarting (1 of 3)"]


def test_a_rewind_restores_the_newest_and_lets_the_data_go_on(start) -> None:
    run = start()
    run.save(TWO, FOUR)
    state = TrainState(step=6, rows_seen=24, data={"rows": [24]}, recent_losses=[9.0])
    policy = StepPolicy(run.config.training, state, warn=pytest.fail)
    run.fill(6)
    assert rewind(state, policy, run.resume)
    assert (state.step, state.skipped, state.rewinds, state.furthest_step) == (4, FOUR.skipped, 1, 6)
    assert (state.rows_seen, state.data) == (24, {"rows": [24]})
    assert all(values == {4.0} for values in run.values().values())
    assert (run.optimizer.updates, run.guard.losses) == (3, [3.0, 2.0])
    assert run.checkpointer.saved_step is None  # the next save of step 4 is another one
    assert run.said == ["rewinding to step 4; the data continues after step 6"]

    state.step = 6  # the same spike again, and only one rewind is allowed
    run.fill(6)
    with pytest.raises(RunError, match="rewound 1 times without getting past step 6"):
        rewind(state, policy, run.resume)
    assert all(values == {6.0} for values in run.values().values())


def test_a_rewind_past_a_damaged_checkpoint_sets_it_aside(start) -> None:
    run = start()
    run.save(TWO, FOUR)
    (run.checkpointer.folder.path(4) / "train_state.json").write_text("{}")
    state = TrainState(step=6)
    assert rewind(state, StepPolicy(run.config.training, state, warn=pytest.fail), run.resume)
    assert state.step == 2
    assert run.checkpointer.folder.steps() == [2]


def test_there_may_be_nothing_to_rewind_to(start) -> None:
    run, warnings = start(), []
    state = TrainState(step=6, skipped=SkippedSteps(1, 1))
    assert not rewind(state, StepPolicy(run.config.training, state, warn=warnings.append), run.resume)
    assert warnings == ["there is no checkpoint yet to rewind to"]
    assert state == TrainState(step=6, skipped=SkippedSteps(1, 1))
