"""The batches of one rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchtitan_style.config.layout import BatchPlan

from .rows import TokenFile, batch_hash, row_order

__all__ = ["Batch", "Loader", "validation_batches"]


@dataclass(frozen=True)
class Batch:
    """One rank's part of an optimizer step."""

    microbatches: list[tuple[Tensor, Tensor]]
    """Inputs and labels, each [local_batch_size, seq_len], on the device."""
    hash: int
    """This rank's part of the global batch's hash, as a signed 64-bit number."""


class Loader:
    """Reads a rank's rows of any step. Holds no position: the caller says which rows come next."""

    def __init__(self, tokens: TokenFile, plan: BatchPlan, *, dp_rank: int, seed: int, device: torch.device) -> None:
        self.tokens, self.plan, self.dp_rank, self.seed, self.device = tokens, plan, dp_rank, seed, device

    def batch(self, first_row: int) -> Batch:
        """This rank's part of the step whose rows are first_row … first_row + global_batch_size - 1."""
        mine = self.plan.local_batch_size * self.plan.accumulation_steps
        positions = np.arange(self.dp_rank * mine, (self.dp_rank + 1) * mine)
        order = row_order(first_row + int(positions[0]), mine, num_rows=self.tokens.num_rows, seed=self.seed)
        rows = self.tokens.rows(order)
        signed = (batch_hash(rows, positions) + 2**63) % 2**64 - 2**63
        return Batch([_to_device(part, self.device) for part in self._split(rows)], signed)

    def _split(self, rows: np.ndarray) -> list[np.ndarray]:
        return np.split(rows, self.plan.accumulation_steps)


def validation_batches(
    tokens: TokenFile, plan: BatchPlan, *, dp: int, dp_rank: int, steps: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """A rank's inputs and labels of the held-out rows, in file order, the same at every validation.

    steps: global batches to take at most; -1: all rows. Where the rows do not fill the last batch, its
    labels are -100, so that every rank runs as often as the others and no row counts twice.
    """
    count = tokens.num_rows if steps == -1 else min(tokens.num_rows, steps * plan.global_batch_size)
    size = plan.local_batch_size
    batches = []
    for start in range(0, count, size * dp):
        wanted = np.arange(start + dp_rank * size, start + (dp_rank + 1) * size)
        inputs, labels = _to_device(tokens.rows(np.minimum(wanted, count - 1)), device)
        labels[torch.from_numpy(wanted >= count)] = -100
        batches.append((inputs, labels))
    return batches


def _to_device(rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows [n, T + 1] as inputs and labels, each [n, T]."""
    tensor = torch.from_numpy(rows)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor[:, :-1].contiguous(), tensor[:, 1:].contiguous()
