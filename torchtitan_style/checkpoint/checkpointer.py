"""Saving and loading the state of a run, on all ranks together.

Tensors go through torch.distributed.checkpoint (DCP): each rank writes and reads its shards, by
parameter name, so that the shape of the mesh is not part of the format.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn

from torchtitan_style.config.schema import Checkpoint
from torchtitan_style.distributed.world import on_main
from torchtitan_style.errors import UserError
from torchtitan_style.optim.build import Optimizers

from .folder import CheckpointFolder
from .reader import SafeReader, without_warnings

__all__ = ["Checkpointer"]


class Checkpointer:
    """The checkpoints of one run. Every method is called by all ranks.

    settings: the run's config.toml. tokenizer: its folder. Both are kept in every checkpoint.
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
        say: Callable[[str], None],
    ) -> None:
        self.config = config
        self.folder = CheckpointFolder(folder)
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.tokenizer = tokenizer
        self.say = say

    def save(self, step: int, train_state: dict[str, Any], *, best: bool = False) -> None:
        """Write the checkpoint of ``step``; ``best``: name it the best."""
        temporary = on_main(lambda: str(self.folder.begin(step)))
        # With more than one thread DCP can take a failed write for a success.
        writer = dcp.FileSystemWriter(temporary, thread_count=1, sync_files=True)
        with without_warnings():
            dcp.save(self._tensors(), storage_writer=writer)
        on_main(lambda: self._complete(Path(temporary), step, train_state))
        if best:
            on_main(lambda: self.folder.set_best(step))
        on_main(lambda: self.folder.retain(self.config.keep_latest_k))

    def _complete(self, temporary: Path, step: int, train_state: dict[str, Any]) -> None:
        """Add what makes a checkpoint of use without its run."""
        (temporary / "config.toml").write_text(self.settings, encoding="utf-8")
        shutil.copytree(self.tokenizer, temporary / "tokenizer")
        self.folder.commit(step, train_state)

    def find(self) -> int | None:
        """The step to resume from, or None to start from scratch.

        Raises UserError if ``load_step`` asks for what is not there.
        """
        if not self.config.enable:
            return None
        return on_main(self._find)

    def _find(self) -> int | None:
        steps, wanted = self.folder.steps(), self.config.load_step
        if wanted == 0:
            if steps:
                raise UserError(
                    f"checkpoint.load_step: 0 starts from scratch, but {self.folder.root} holds checkpoints; "
                    "use another --job.dump_folder, or delete them"
                )
            return None
        if wanted == -1:
            found = self.folder.newest_verified(self.say)
            if found is None and steps:
                raise UserError(
                    f"{self.folder.root}: none of the {len(steps)} checkpoints is whole; to start from scratch, "
                    "delete them or use another --job.dump_folder"
                )
            return found
        if wanted not in steps:
            have = ", ".join(map(str, sorted(steps))) or "none"
            raise UserError(f"checkpoint.load_step: there is no checkpoint of step {wanted} (there are: {have})")
        if problem := self.folder.problem(wanted):
            raise UserError(f"checkpoint.load_step: {self.folder.path(wanted)}: {problem}")
        return wanted

    def load(self, step: int, *, optimizer: bool = True) -> None:
        """Read weights and, if so wanted, optimizer state of ``step`` in place."""
        tensors = self._tensors()
        if not optimizer:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}
        dcp.load(tensors, storage_reader=SafeReader(self.folder.path(step)))

    def _tensors(self) -> dict[str, Any]:
        """Weights and optimizer state by parameter name. DCP writes from them and reads into them."""
        tensors: dict[str, Any] = {}
        state = self.optimizer.state
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors
