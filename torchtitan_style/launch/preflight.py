"""What can be known to go wrong before anything is built. Needs no torch."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import readable_bytes
from torchtitan_style.config import Config
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.models.registry import model_config, spec_of
from torchtitan_style.train.identity import check_before_start

from .run_lock import check_free

__all__ = ["check_room", "checkpoint_bytes", "preflight"]


def preflight(config: Config, *, world_size: int, say: Callable[[str], None], is_first: bool = True) -> None:
    """Raise UserError if the dump folder cannot be written, is in use, has no room for the run's checkpoints, or
    holds those of another run, or if a setting names parameters that the model has not.

    is_first: whether this is the host that is to hold the folder.
    """
    folder = Path(config.job.dump_folder)
    check_writable(folder)
    if is_first:
        check_free(folder)
    check_patterns(config)
    check_before_start(config, dp=plan_layout(config.parallelism, world_size).dp)
    check_room(config, say)


def check_writable(folder: Path) -> None:
    """Raise UserError if ``folder``, which need not exist, cannot be made or written to."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"job.dump_folder: {folder} cannot be written: {error.strerror}") from None


def check_patterns(config: Config) -> None:
    """Raise UserError if a pattern of names matches no parameter: what it was meant for would go on as before."""
    names = spec_of(config.model.name).parameter_shapes(model_config(config.model))
    for pattern in config.optimizer.no_decay:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f'optimizer.no_decay: "{pattern}" matches no parameter; names are as model.embed_tokens.weight, and '
                "* stands for any part, as in *embed_tokens*"
            )


def check_room(config: Config, say: Callable[[str], None]) -> None:
    """Say how much room the run's checkpoints take; raise UserError if there is less."""
    checkpoint, folder = config.checkpoint, Path(config.job.dump_folder)
    if not checkpoint.enable:
        return
    size, steps = checkpoint_bytes(config), config.training.steps
    saves = math.ceil(steps / checkpoint.interval)
    kept = min(saves, checkpoint.keep_latest_k) if checkpoint.keep_latest_k else saves
    if checkpoint.keep_latest_k and checkpoint.keep_every:
        kept += steps // math.lcm(checkpoint.interval, checkpoint.keep_every)
    kept += config.validation.enable and checkpoint.keep_best
    kept += bool(checkpoint.keep_latest_k)  # an older one is deleted after a newer one is written
    have = len(CheckpointFolder(folder / "checkpoint").steps())
    needed = max(0, kept - have) * size
    free = shutil.disk_usage(_existing(folder)).free
    text = f"checkpoints take about {readable_bytes(size)} each, at most {readable_bytes(kept * size)} at once"
    if needed > free:
        fewer = "lower checkpoint.keep_latest_k" if checkpoint.keep_latest_k else "set checkpoint.keep_latest_k"
        raise UserError(
            f"job.dump_folder: {text}, but only {readable_bytes(free)} are free in {folder}: {fewer}, or use another "
            "--job.dump_folder"
        )
    say(f"{text}; {readable_bytes(free)} are free")


def checkpoint_bytes(config: Config) -> int:
    """Weights and optimizer state, in fp32; what else is in a checkpoint does not count beside them."""
    total = 0
    for name, shape in spec_of(config.model.name).parameter_shapes(model_config(config.model)).items():
        muon = config.optimizer.name == "muon" and len(shape) == 2 and ".layers." in name
        total += 4 * math.prod(shape) * (2 if muon else 3)
    return total


def _existing(folder: Path) -> Path:
    """``folder``, or the nearest of its parents that exists."""
    while not folder.is_dir():
        folder = folder.parent
    return folder
