"""``preempted.json``: left in the dump folder by a run that was told to stop and has saved."""

from __future__ import annotations

import json
import time
from pathlib import Path

from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.common.files import write_in_one_go

__all__ = ["clear_preempted", "is_preempted", "leave_preempted", "write_preempted"]

_NAME = "preempted.json"


def write_preempted(folder: Path, *, step: int, checkpoint: str | None, signal: str) -> None:
    """step: the last one; checkpoint: its path, if there is one; signal: its name."""
    word = {"step": step, "checkpoint": checkpoint, "signal": signal, "time": time.time()}
    write_in_one_go(folder / _NAME, json.dumps(word) + "\n")


def leave_preempted(folder: Path, *, signal: str) -> None:
    """Leave it for a run that was told to stop before its first step. ``folder`` need not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = CheckpointFolder(folder / "checkpoint")
    newest = max(checkpoints.steps(), default=0)
    write_preempted(folder, step=newest, checkpoint=str(checkpoints.path(newest)) if newest else None, signal=signal)


def is_preempted(folder: Path) -> bool:
    """Whether the last run here has left it."""
    return (folder / _NAME).exists()


def clear_preempted(folder: Path) -> None:
    """A run has begun."""
    (folder / _NAME).unlink(missing_ok=True)
