"""Saving and loading the state of a run, on all ranks together.

Tensors go through torch.distributed.checkpoint (DCP): each rank writes and reads its shards, by
parameter name, so that the shape of the mesh is not part of the format.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan_style.common.errors import RunError, UserError
from torchtitan_style.common.files import refresh_names
from torchtitan_style.config.schema import Checkpoint
from torchtitan_style.distributed.world import on_main, patient_group
from torchtitan_style.optim.build import Optimizers

from .base import BASE, Base
from .folder import CheckpointFolder
from .manifest import problem_of
from .reader import SafeReader, reason_of, without_warnings
from .staging import Staging
from .writer import HashingWriter, StagedPlanner

__all__ = ["Checkpointer"]


_FAILURES = (OSError, UserError, CheckpointException)
"""What a save may fail with. UserError: a file that cannot be read back."""


class Checkpointer:
    """The checkpoints of one run. Every method is called by all ranks.

    settings: the run's config.toml. tokenizer: its folder. Both are kept in every checkpoint. about: what else
    their manifests say. saves: name of a parameter → whether it is saved. advance: called as saving and reading
    proceed, from any thread. before_write, after_write: called with the step of each save, by the thread that
    writes it.
    """

    def __init__(
        self,
        config: Checkpoint,
        folder: Path,
        *,
        model: nn.Module,
        optimizer: Optimizers,
        settings: str,
        tokenizer: Path,
        about: Mapping[str, Any],
        say: Callable[[str], None],
        saves: Callable[[str], bool] = lambda name: True,
        advance: Callable[[], None] = lambda: None,
        before_write: Callable[[int], None] = lambda step: None,
        after_write: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.config = config
        self.folder = CheckpointFolder(folder, advance=advance)
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.tokenizer = tokenizer
        self.about = about
        self.saves = saves
        self.base: Base | None = None
        """Of adapters: the weights that they belong to, which are not saved."""
        self.say, self.advance = say, advance
        self.before_write, self.after_write = before_write, after_write
        self.saved_step: int | None = None
        """The last step whose checkpoint is in its place."""
        # A save in the background must not get its messages mixed up with those of training.
        self._group = patient_group() if config.enable else None
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.under_way: Future[None] | None = None
        """A save, or the deletion of old checkpoints, that ``finish`` has not heard the end of."""
        self._asked_about: Future[None] | None = None
        self._step = 0
        self._failure: RunError | None = None

    # Saving

    def save(self, step: int, train_state: dict[str, Any], *, figures: Mapping[str, Any], best: bool = False) -> None:
        """Write the checkpoint of ``step``, or have it written. ``figures``: losses at the time, for the manifest;
        ``best``: name it the best.

        Raises RunError if it, or the one before, could not be saved and ``on_error`` is "stop".
        """
        self.finish()
        self._step = step
        tensors = self._tensors()
        about = {**self.about, "time": time.time(), "figures": dict(figures), "best": best}
        if self.config.async_mode == "async":
            copies = self._staging.copy(tensors)
            self.under_way = self._thread.submit(self._write, step, tensors, copies, train_state, about)
            return
        try:
            self._write(step, tensors, None, train_state, about)
        except _FAILURES as error:
            self._fail(error)
            return
        self._failure = None
        # Reading back what was written takes as long again, and training need not wait for it.
        self.under_way = self._thread.submit(self._retain)

    @property
    def is_busy(self) -> bool:
        """Whether this rank still writes, or has yet to hear how it went."""
        return self.under_way is not None and not self.under_way.done()

    def finish_when_idle(self, *, busy: bool) -> None:
        """Finish the save in the background if no rank is ``busy`` with it. Called by all ranks with the maximum over
        ranks of ``is_busy``, one call late (``Agreement``): a save that began since then waits for the next call."""
        if not busy and self._asked_about is self.under_way:
            self.finish()
        self._asked_about = self.under_way

    def finish(self) -> None:
        """Wait for a save in the background. All ranks hear the same of it.

        Raises RunError if it failed and ``on_error`` is "stop".
        """
        under_way, self.under_way = self.under_way, None
        if under_way is None:
            return
        self._failure = None
        try:
            under_way.result()
        except _FAILURES as error:
            self._fail(error)

    def _fail(self, error: OSError | UserError | CheckpointException) -> None:
        """Clean up after a save that has failed. Raises RunError if ``on_error`` is "stop"."""
        on_main(self.folder.remove_unfinished)
        self._failure = RunError(
            f"the checkpoint of step {self._step} could not be saved: {reason_of(error)}; {self._last_good()}"
        )
        if self.config.on_error == "stop":
            raise self._failure from None
        self.say(f'{self._failure}; continuing, because checkpoint.on_error = "warn"')

    def wait(self) -> None:
        """Wait for a save in the background, and ignore its outcome."""
        if self.under_way is not None:
            self.under_way.exception()

    def close(self) -> None:
        """Finish the last save. Raises RunError if it failed, whatever ``on_error`` says: there is no next one."""
        self.finish()
        if self._failure:
            raise self._failure

    def _write(
        self,
        step: int,
        tensors: dict[str, Any],
        copies: dict[str, Any] | None,
        train_state: dict[str, Any],
        about: dict[str, Any],
    ) -> None:
        """Write one checkpoint, from ``copies`` if given. In the background it must not touch ``tensors``' values."""
        try:
            self._write_files(step, tensors, copies, train_state, about)
        finally:
            self.after_write(step)
        if copies is not None:
            self._retain()

    def _write_files(
        self,
        step: int,
        tensors: dict[str, Any],
        copies: dict[str, Any] | None,
        train_state: dict[str, Any],
        about: dict[str, Any],
    ) -> None:
        temporary = Path(on_main(lambda: str(self.folder.begin(step)), self._group))
        refresh_names(self.folder.root)
        self.before_write(step)
        writer = HashingWriter(temporary, advance=self.advance)
        planner = StagedPlanner(copies) if copies is not None else None
        with without_warnings():
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=self._group)
        of_ranks: list[dict[str, dict[str, Any]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(of_ranks, writer.entries, group=self._group)
        known = {name: entry for entries in of_ranks for name, entry in entries.items()}

        def complete() -> None:
            (temporary / "config.toml").write_text(self.settings, encoding="utf-8")
            if self.base is not None:
                (temporary / BASE).write_text(self.base.to_json(), encoding="utf-8")
            shutil.copytree(self.tokenizer, temporary / "tokenizer")
            self.folder.commit(step, train_state, about=about, known=known)
            if about["best"]:
                self.folder.set_best(step)

        on_main(complete, self._group)
        self.saved_step = step

    def _retain(self) -> None:
        """Delete checkpoints that are not to be kept. Rank 0 does it."""
        if dist.get_rank() == 0:
            try:
                self.folder.retain(self.config.keep_latest_k, self.say, keep_every=self.config.keep_every)
            except OSError as error:
                self.say(f"old checkpoints in {self.folder.root} cannot be deleted: {error}")

    def _last_good(self) -> str:
        """Where to go on from, in words."""
        if not self.folder.root.parent.is_dir():
            return f"{self.folder.root.parent} is gone"
        steps = self.folder.steps()
        return f"the last one is {self.folder.path(steps[0])}" if steps else "there is none yet"

    # Loading

    def find(self, wanted: int) -> int | None:
        """The step to go on from, or None if there is none and none is needed.

        wanted: a step; -1: the newest that verifies; 0: none, and there must not be one. Raises UserError if what
        is wanted is not there, or no checkpoint is whole.
        """
        steps = on_main(self.folder.steps)
        refresh_names(self.folder.root)
        if not self.config.enable:
            if steps:
                raise UserError(
                    f"checkpoint.enable: false starts from scratch, but {self.folder.root} holds checkpoints; use "
                    "another --job.dump_folder, or delete them"
                )
            return None
        candidates = steps if wanted == -1 else [wanted] if wanted in steps else []
        for step in candidates:
            # Each rank reads its share of the files.
            problems: list[str | None] = [None] * dist.get_world_size()
            path, advance = self.folder.path(step), self.advance
            mine = problem_of(path, part=dist.get_rank(), of=len(problems), advance=advance)
            dist.all_gather_object(problems, mine, group=self._group)
            found = [problem for problem in problems if problem]
            if not found:
                return step
            if wanted != -1:
                raise UserError(f"checkpoint.load_step: {self.folder.path(step)}: {found[0]}")
            self.say(f"skipping the checkpoint {self.folder.path(step)}: {found[0]}")
        if wanted == 0 and steps:
            raise UserError(
                f"checkpoint.load_step: 0 starts from scratch, but {self.folder.root} holds checkpoints; "
                "use another --job.dump_folder, or delete them"
            )
        if wanted > 0:
            have = ", ".join(map(str, sorted(steps))) or "none"
            raise UserError(f"checkpoint.load_step: there is no checkpoint of step {wanted} (there are: {have})")
        if steps:
            raise UserError(
                f"{self.folder.root}: none of the {len(steps)} checkpoints is whole; to start from scratch, "
                "delete them or use another --job.dump_folder"
            )
        return None

    def load(self, step: int, *, optimizer: bool = True) -> dict[str, Any]:
        """Read weights and, if so wanted, optimizer state of ``step`` in place. Returns them by name."""
        tensors = self._tensors()
        if not optimizer:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}
        reader = SafeReader(self.folder.path(step), advance=self.advance)
        on_main(reader.check_metadata)
        try:
            dcp.load(tensors, storage_reader=reader, process_group=self._group)
        except CheckpointException as error:
            raise UserError(f"{self.folder.path(step)} cannot be loaded: {reason_of(error)}") from None
        self.saved_step = step
        return tensors

    def _tensors(self) -> dict[str, Any]:
        """Weights and optimizer state by parameter name. DCP writes from them and reads into them."""
        tensors: dict[str, Any] = {}
        state = self.optimizer.state
        for name, parameter in self.model.named_parameters():
            if self.saves(name):
                tensors[f"model.{name}"] = parameter.detach()
            for key, value in state.get(parameter, {}).items():  # none of what is frozen
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors
