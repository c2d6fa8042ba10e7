"""Where figures go: metrics.jsonl always, TensorBoard and Weights & Biases if asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torchtitan_style.config.schema import Metrics
from torchtitan_style.errors import UserError

__all__ = ["Recorder"]


class Recorder:
    """Appends records to a run's files. One process has it.

    resumed_step: records of later steps, left by a run that was cut off, are dropped; 0 starts anew.
    """

    def __init__(self, config: Metrics, dump_folder: Path, *, resumed_step: int, settings: dict[str, Any]) -> None:
        self._file = dump_folder / "metrics.jsonl"
        kept = []
        if resumed_step and self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= resumed_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # cut short by a kill
        self._file.write_text("".join(kept), encoding="utf-8")
        self._tensorboard = self._wandb = None
        if config.enable_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(dump_folder / "tensorboard", purge_step=resumed_step + 1)
        if config.enable_wandb:
            try:
                import wandb
            except ImportError:
                raise UserError(
                    'metrics.enable_wandb: the wandb package is missing; install it (the "wandb" extra), or set '
                    "enable_wandb = false"
                ) from None
            self._wandb = wandb.init(
                project="torchtitan_style", name=dump_folder.name, dir=dump_folder, config=settings, resume="allow"
            )

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append ``records``, each with its "step"."""
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(_finite(record)) + "\n" for record in records)
        for record in records:
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
            if self._tensorboard is not None:
                for key, value in numbers.items():
                    group = "validation" if key.startswith("val_") else "train"
                    self._tensorboard.add_scalar(f"{group}/{key}", value, record["step"])
            if self._wandb is not None:
                self._wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity are not JSON: null stands for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
