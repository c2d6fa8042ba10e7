"""Where a run starts from: its own newest checkpoint, the weights of another model, or initial weights.

``Resume.start`` finds the checkpoint, checks that it belongs to this run and restores it. ``rewind.py`` restores one
in the middle of a run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from torchtitan_style.checkpoint.base import Base
from torchtitan_style.checkpoint.checkpointer import Checkpointer
from torchtitan_style.checkpoint.manifest import MANIFEST, read_manifest
from torchtitan_style.checkpoint.saved import SavedModel, open_base, open_model
from torchtitan_style.checkpoint.weights import load_weights
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.program import environment_number
from torchtitan_style.common.typed import typed
from torchtitan_style.config import Config, to_toml
from torchtitan_style.config.layout import Layout
from torchtitan_style.distributed.world import on_main
from torchtitan_style.metrics.display import Display
from torchtitan_style.models.registry import model_config
from torchtitan_style.models.trained import is_adapter
from torchtitan_style.optim.build import Optimizers
from torchtitan_style.optim.guard import StepGuard

from .data import RunData
from .identity import Identity, changed_settings, check_same_run, identity
from .observer import NO_OBSERVER, Observer
from .state import SavedState, TrainState

__all__ = ["Resume", "build_checkpointer", "identity_of_run"]


def identity_of_run(config: Config, data: RunData) -> Identity:
    """What a checkpoint must agree with for this run to resume from it."""
    found = identity(config, dp=data.world.layout.dp)
    found["data"] |= data.identity()
    return found


def build_checkpointer(
    config: Config,
    model: nn.Module,
    optimizer: Optimizers,
    data: RunData,
    *,
    identity: Identity,
    warn: Callable[[str], None],
    observer: Observer = NO_OBSERVER,
    record_progress: Callable[[], None] = lambda: None,
) -> Checkpointer:
    """For the checkpoints of this run, in its dump folder."""
    return Checkpointer(
        config.checkpoint,
        Path(config.job.dump_folder) / "checkpoint",
        model=model,
        optimizer=optimizer,
        settings=to_toml(config, dimensions=dataclasses.asdict(model_config(config.model))),
        tokenizer=data.prepared.tokenizer,
        about={
            "mesh": dataclasses.asdict(data.world.layout),
            "torch": torch.__version__,
            "tokenizer": identity["data"]["tokenizer"],
            "data": identity["data"]["content"],
        },
        say=warn,
        saves=is_adapter if config.lora.rank else lambda name: True,
        advance=record_progress,
        before_write=observer.before_save,
        after_write=observer.after_save,
    )


class Resume:
    """Restores the model, the optimizer and the guard from a checkpoint. Methods are called by all ranks.

    identity: what a checkpoint must agree with.
    """

    def __init__(
        self,
        config: Config,
        checkpointer: Checkpointer,
        guard: StepGuard,
        *,
        identity: Identity,
        layout: Layout,
        display: Display,
        observer: Observer,
    ) -> None:
        self.config, self.checkpointer, self.guard = config, checkpointer, guard
        self.identity, self.layout, self.display, self.observer = identity, layout, display, observer

    def start(self) -> TrainState:
        """Restore the checkpoint that the run resumes from, or start a new run. Returns its state.

        Raises UserError if there is no usable checkpoint where one is needed, or if it belongs to a different run.
        """
        if restarts := environment_number("TORCHELASTIC_RESTART_COUNT", 0):
            most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "?")
            self.display.warn(f"a process of this run has died; restarting ({restarts} of {most})")
        step = self.checkpointer.find(self._wanted())
        if step is None:
            self._start_from_weights()
            return TrainState()
        state, saved_identity = self.read(step)
        self._check(step, saved_identity)
        if self.config.checkpoint.load_step > 0:
            state.went_back_to = self.config.checkpoint.load_step
        if self.config.lora.rank:
            self._read_base(self._same_base(step))
        self.restore(step, state, saved_identity)
        return state

    def read(self, step: int) -> tuple[TrainState, Identity]:
        """State and identity in the checkpoint of ``step``. Raises UserError if they cannot be read."""
        path = self.checkpointer.folder.path(step)
        try:
            saved = typed(SavedState, on_main(lambda: self.checkpointer.folder.train_state(step)))
            state = TrainState.from_json(saved.state)
            if state.step != step:
                raise ValueError(f"it is of step {state.step}")
            return state, saved.identity
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: its train_state.json cannot be used: {error}") from None

    def restore(self, step: int, state: TrainState, saved_identity: Identity) -> None:
        """Read weights and optimizer state of ``step``; set the schedule and the guard to where ``state`` is."""
        optimizer = self.checkpointer.optimizer
        same_optimizer = saved_identity.get("optimizer") == self.identity["optimizer"]
        if not same_optimizer:
            optimizer.forget()
        tensors = self.checkpointer.load(step, optimizer=same_optimizer)
        optimizer.start_after(step - state.skipped.total)
        self.guard.losses = state.recent_losses
        self.observer.after_load(step, tensors)

    def _wanted(self) -> int:
        """checkpoint.load_step; but -1, the newest, if the run has gone back to that step before."""
        wanted = self.config.checkpoint.load_step
        if wanted > 0 and on_main(lambda: self.checkpointer.folder.newest_state().get("went_back_to")) == wanted:
            self.display.say(
                f"the run went back to step {wanted} before; resuming from its newest checkpoint since then"
            )
            return -1
        return wanted

    def _check(self, step: int, saved_identity: Identity) -> None:
        """Compare the checkpoint with this run and report what differs. Raises UserError for what must not."""
        path = self.checkpointer.folder.path(step)
        try:
            mesh = on_main(lambda: read_manifest(path).mesh)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: its {MANIFEST} cannot be used: {error}") from None
        for difference in check_same_run(saved_identity, self.identity, self.config, path):
            self.display.warn(difference)
        if changes := changed_settings(path, self.config):
            self.display.say(f"settings changed since the checkpoint: {', '.join(changes)}")
        shape = model_config(self.config.model)
        dropout = max(shape.dropout, shape.attention_dropout)
        if dropout and Layout(**mesh) != self.layout:
            self.display.warn("the layout changed since the checkpoint, so dropout draws different numbers")

    def _start_from_weights(self) -> None:
        """Read the initial weights, if the run starts from any; each rank reads its own part."""
        source, shape, advance = self.config.initial_weights, model_config(self.config.model), self.checkpointer.advance
        if not source:
            return

        def verified() -> tuple[Path, Base | None]:
            found = open_model(source, verify=True, say=self.display.warn, advance=advance)
            found.check(shape)
            return found.path, Base.of(source, found, advance=advance) if self.config.lora.rank else None

        path, self.checkpointer.base = on_main(verified)
        self._read_base(path)
        found = open_model(str(path), verify=False)
        self.display.say(f"starting from the weights of {source}")
        if found.tokenizer is None and self.config.data.tokenizer == "train":
            self.display.warn(
                f"{source} has no tokenizer: one was trained on the corpus, but its ids do not match those that the "
                "weights were trained with; set data.tokenizer to the right one"
            )

    def _same_base(self, step: int) -> Path:
        """Where the weights are that the adapters of ``step`` belong to. Raises UserError if they have changed."""
        saved, source = SavedModel(self.checkpointer.folder.path(step)), self.config.initial_weights

        def verified() -> tuple[Path, Base]:
            record = Base.read(saved.path)
            found = open_base(saved, source, verify=True, say=self.display.warn, advance=self.checkpointer.advance)
            return found.path, record.moved_to(source or record.source, found.path)

        path, self.checkpointer.base = on_main(verified)
        return path

    def _read_base(self, path: Path) -> None:
        """Fill the model with the weights in ``path``, but for its adapters."""
        weights = {n: p for n, p in self.checkpointer.model.named_parameters() if not is_adapter(n)}
        load_weights(open_model(str(path), verify=False), weights, advance=self.checkpointer.advance)
