"""The ``checkpoint/`` folder of a run: which checkpoints there are, which are sound, and which are kept.

    checkpoint/step-500/           .metadata and *.distcp, the shards written by torch.distributed.checkpoint
    checkpoint/step-500/train_state.json
    checkpoint/step-500/config.toml      the run's settings, all dimensions of the model included
    checkpoint/step-500/tokenizer/
    checkpoint/step-500/base.json        which model adapters belong to, with LoRA
    checkpoint/step-500/manifest.json    see manifest.py, which also gives the folder its name; written last
    checkpoint/best                a line with the name of the best one, as "step-500"

A checkpoint is written under a temporary name and renamed when it is complete and on disk, so one
with its final name was whole once; the manifest tells whether it still is.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchtitan_style.common.files import fsync_ancestors, write_in_one_go
from torchtitan_style.common.reading import read_json_object, read_text

from .manifest import aside, problem_of, seal


class CheckpointFolder:
    """Names, verification and retention. Knows nothing of tensors; used by one process at a time.

    advance: called as verification gets on, from any thread.
    """

    def __init__(self, root: Path, *, advance: Callable[[], None] = lambda: None) -> None:
        self.root, self._advance = root, advance

    @classmethod
    def within(cls, folder: Path, *, advance: Callable[[], None] = lambda: None) -> CheckpointFolder | None:
        """Of a run, or ``folder`` itself: the one that has checkpoints."""
        folders = (cls(root, advance=advance) for root in (folder / "checkpoint", folder))
        return next((found for found in folders if found.steps()), None)

    def path(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps with a checkpoint, newest first; verified or not."""
        try:
            names = [path.name.removeprefix("step-") for path in self.root.glob("step-*") if path.is_dir()]
        except (OSError, ValueError):  # a name that there cannot be
            return []
        return sorted((int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,17}", name)), reverse=True)

    def newest_verified(self, say: Callable[[str], None]) -> int | None:
        """The newest step whose files are as they were written; says which ones are not, and why."""
        for step in self.steps():
            problem = self.problem(step)
            if problem is None:
                return step
            say(f"skipping the checkpoint {self.path(step)}: {problem}")
        return None

    def problem(self, step: int) -> str | None:
        """What is wrong with the files of ``step``, or None."""
        return problem_of(self.path(step), advance=self._advance)

    def begin(self, step: int) -> Path:
        """An empty temporary folder to write the checkpoint of ``step`` into.

        Raises OSError if there cannot be one: the run's own folder is not made again, should it be gone.
        """
        self.remove_unfinished()
        if not self.root.exists():
            self.root.mkdir()
            fsync_ancestors(self.root)
        temporary = self.root / f"tmp-step-{step}"
        temporary.mkdir()
        return temporary

    def commit(
        self,
        step: int,
        train_state: Mapping[str, Any],
        *,
        about: Mapping[str, Any] | None = None,
        known: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        """Complete the temporary folder of ``step`` and give it its final name.

        about: what the manifest is to say of it. known: its entries of files that are hashed and on disk.
        """
        temporary = self.root / f"tmp-step-{step}"
        (temporary / "train_state.json").write_text(json.dumps(train_state, indent=2) + "\n", encoding="utf-8")
        seal(temporary, self.path(step), about={"step": step, **(about or {})}, known=known)

    def train_state(self, step: int) -> dict[str, Any]:
        """Raises OSError or ValueError if it cannot be read."""
        return read_json_object(self.path(step) / "train_state.json")

    def newest_state(self) -> dict[str, Any]:
        """What the newest checkpoint, whole or not, says of the run's state; {} if it cannot be read."""
        try:
            state = self.train_state(self.steps()[0]).get("state")
            return state if isinstance(state, dict) else {}
        except (OSError, ValueError, IndexError):
            return {}

    def set_best(self, step: int) -> None:
        """Name ``step`` as the best, in one go."""
        write_in_one_go(self.root / "best", f"{self.path(step).name}\n")

    def best(self) -> int | None:
        try:
            return int(read_text(self.root / "best", most=1000).strip().removeprefix("step-"))
        except (OSError, ValueError):
            return None

    def retain(self, keep_latest_k: int, say: Callable[[str], None], *, keep_every: int = 0) -> None:
        """Delete all but the newest ``keep_latest_k`` (0: none are deleted), the best, and those of every
        ``keep_every``-th step; nothing, if the newest one is not whole."""
        steps = self.steps()
        kept = {*steps[:keep_latest_k], self.best(), *(s for s in steps if keep_every and s % keep_every == 0)}
        surplus = [step for step in steps if step not in kept] if keep_latest_k else []
        if not surplus:
            return
        if problem := self.problem(steps[0]):
            say(
                f"the checkpoint {self.path(steps[0])} was written but cannot be read back: {problem}; older ones are "
                "kept"
            )
            return
        for step in surplus:
            # Under another name first: cut short, this must not leave something that looks like a checkpoint.
            doomed = self.root / f"tmp-deleted-{self.path(step).name}"
            self.path(step).rename(doomed)
            shutil.rmtree(doomed)

    def set_aside_after(self, step: int, say: Callable[[str], None]) -> None:
        """Rename the checkpoints of steps past ``step``, which the run goes on from: they are damaged, or of
        a course that it leaves, and would be resumed from next time."""
        for later in self.steps():
            if later > step:
                name = aside(self.path(later))
                self.path(later).rename(name)
                say(f"the checkpoint of step {later} is now {name}")
        if (self.best() or 0) > step:
            (self.root / "best").unlink()

    def remove_unfinished(self) -> None:
        """Delete what a killed run left half written, or half deleted."""
        for path in self.root.glob("tmp-*"):
            shutil.rmtree(path, ignore_errors=True)
