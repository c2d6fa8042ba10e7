"""``preempted.json``: tells a scheduler that a run stopped early, has saved, and can be started again."""

from __future__ import annotations

import json
import time
from pathlib import Path

from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.common.files import write_in_one_go

_NAME = "preempted.json"


def write_preempted(folder: Path, *, step: int, checkpoint: str | None, signal: str) -> None:
    """Write the file. step: the last one; checkpoint: the path of its checkpoint, if any; signal: as "SIGTERM"."""
    content = {"step": step, "checkpoint": checkpoint, "signal": signal, "time": time.time()}
    write_in_one_go(folder / _NAME, json.dumps(content) + "\n")


def leave_preempted(folder: Path, *, signal: str) -> None:
    """Write the file for a run that stopped before its first step. ``folder`` need not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = CheckpointFolder(folder / "checkpoint")
    newest = max(checkpoints.steps(), default=0)
    write_preempted(folder, step=newest, checkpoint=str(checkpoints.path(newest)) if newest else None, signal=signal)


def is_preempted(folder: Path) -> bool:
    """Whether the last run in ``folder`` stopped early."""
    return (folder / _NAME).exists()


def clear_preempted(folder: Path) -> None:
    """Remove the file: a run has started."""
    (folder / _NAME).unlink(missing_ok=True)
