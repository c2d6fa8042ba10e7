"""Loss, perplexity and token accuracy over held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class HeldOutSet:
    """A named set. batches: those of this rank. tokens, bytes: of all ranks, those with a label and their text's."""

    name: str
    batches: Sequence[Sequence[Any]]
    tokens: int
    bytes: int

    def figures(self, found: dict[str, float]) -> dict[str, float]:
        """``found`` by ``validate``, under the names of this set, with bits per byte."""
        bits = found["val_loss"] * self.tokens / math.log(2)
        figures = found | {"val_bits_per_byte": bits / self.bytes if self.bytes else math.nan}
        return {f"{key}/{self.name}": value for key, value in figures.items()}


@torch.no_grad()
def validate(
    model: Callable[..., tuple[Tensor, Tensor]],
    batches: Iterable[Sequence[Any]],
    group: dist.ProcessGroup,
    *,
    copies: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Mean over all tokens of the ``batches`` of all ranks of ``group``.

    batches: inputs and labels (-100 for none), each [B, T], and what else the model takes (``Microbatch``). model:
    returns the sum of the token losses and the number of right guesses. copies: ranks of ``group`` that have the same
    batches, of which one returns the sums and the others 0. stop: asked before every batch, by all ranks
    equally often; once it says yes, None is returned.
    """
    sums = None
    for inputs, labels, *others in batches:
        if stop():
            return None
        loss, right = model(inputs, labels, *others)
        part = torch.stack((loss.double(), right.double(), (labels != -100).sum().double()))
        sums = part if sums is None else sums + part
    assert sums is not None, "there is at least one row"
    dist.all_reduce(sums, group=group)
    loss_sum, right_sum, tokens = sums.tolist()
    tokens /= copies
    loss_mean = loss_sum / tokens
    return {
        "val_loss": loss_mean,
        "val_perplexity": math.exp(min(loss_mean, 700.0)),
        "val_accuracy": right_sum / tokens,
    }
