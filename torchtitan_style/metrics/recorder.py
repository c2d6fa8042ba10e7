"""Where figures go: metrics.jsonl always, TensorBoard and Weights & Biases if asked for."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import fsync, write_in_one_go
from torchtitan_style.common.reading import json_lines, read_text
from torchtitan_style.config.schema import Metrics


class Recorder:
    """Appends records to a run's files. One process has it.

    resumed_step: records of later steps, left by a run that was cut off, are dropped; 0 starts anew. warn: told
    once when they cannot be written, as on a full disk; they are kept, and tried again with the next ones.
    """

    def __init__(
        self,
        config: Metrics,
        dump_folder: Path,
        *,
        resumed_step: int,
        settings: dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._warn, self._unwritten = warn, ""
        self._file = dump_folder / "metrics.jsonl"
        kept = []
        if resumed_step and self._file.exists():
            try:
                for line, record in json_lines(self._file):  # one may be cut short by a kill
                    step = record.get("step") if isinstance(record, dict) else None
                    if type(step) is int and step <= resumed_step:
                        kept.append(line.decode().rstrip("\n") + "\n")
            except OSError as error:
                raise UserError(f"{self._file}: cannot be read: {error.strerror or error}") from None
        write_in_one_go(self._file, "".join(kept))
        self._tensorboard = self._wandb = None
        if config.enable_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(dump_folder / "tensorboard", purge_step=resumed_step + 1)
        if config.enable_wandb:
            self._wandb = _start_wandb(dump_folder, settings, resumes=resumed_step > 0)

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append ``records``, each with its "step"."""
        self._append("".join(json.dumps(_finite(record)) + "\n" for record in records))
        for record in records:
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "time")}
            if self._tensorboard is not None:
                with self._tensorboard_errors():
                    for key, value in numbers.items():
                        group = "validation" if key.startswith("val_") else "train"
                        self._tensorboard.add_scalar(f"{group}/{key}", value, record["step"])
            if self._wandb is not None:
                with self._wandb_errors():
                    self._wandb.log(numbers, step=record["step"])

    def _append(self, lines: str) -> None:
        waited, lines = bool(self._unwritten), self._unwritten + lines
        try:
            # Unbuffered: what a failed write has left of a line must not be written twice.
            with self._file.open("ab", buffering=0) as file:
                end = file.tell()
                try:
                    data = lines.encode()
                    if file.write(data) < len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._file))
                except OSError:
                    file.truncate(end)
                    raise
            self._unwritten = ""
        except OSError as error:
            self._unwritten = lines
            if not waited:
                self._warn(f"{self._file} cannot be written: {error}; its lines are kept and written later")

    def sync(self) -> None:
        """Have the disk hold all records so far, so that no checkpoint outlives those of its steps."""
        with contextlib.suppress(OSError):  # one that matters is met, and told, at the next write
            fsync(self._file)

    def close(self) -> None:
        if self._unwritten:
            self._append("")
        if self._tensorboard is not None:
            with self._tensorboard_errors():
                self._tensorboard.close()
        if self._wandb is not None:
            with self._wandb_errors():
                self._wandb.finish()

    @contextlib.contextmanager
    def _tensorboard_errors(self) -> Iterator[None]:
        """TensorBoard's writer has a thread of its own; once that has failed, every call does."""
        try:
            yield
        except OSError as error:
            self._tensorboard = None
            self._warn(f"TensorBoard events cannot be written any more: {error}")

    @contextlib.contextmanager
    def _wandb_errors(self) -> Iterator[None]:
        """A failure of Weights & Biases during a run does not end the run: metrics.jsonl has every record."""
        try:
            yield
        except Exception as error:  # its own kinds, connection errors, a dead service process
            self._wandb = None
            self._warn(
                f"Weights & Biases receives no more records; metrics.jsonl has all of them: {_first_line(error)}"
            )


def _start_wandb(dump_folder: Path, settings: dict[str, Any], *, resumes: bool) -> Any:
    """A run of Weights & Biases. Raises UserError if there can be none."""
    try:
        import wandb

        return wandb.init(
            project="torchtitan_style",
            name=dump_folder.name,
            dir=dump_folder,
            config=settings,
            id=_wandb_id(dump_folder / "wandb_id", keep=resumes),
            resume="allow",
        )
    except Exception as error:  # no package, no login, no network, a wrong setting
        raise UserError(
            f"metrics.enable_wandb: Weights & Biases cannot start: {_first_line(error)}; correct that, set "
            "WANDB_MODE=offline, or set metrics.enable_wandb = false"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _wandb_id(file: Path, *, keep: bool) -> str:
    """What Weights & Biases knows the run by: the same after a resume."""
    if not (keep and file.exists()):
        write_in_one_go(file, uuid.uuid4().hex)
    try:
        return read_text(file, most=1000)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity are not JSON: null stands for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
