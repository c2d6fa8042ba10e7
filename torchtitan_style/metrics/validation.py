"""Loss, perplexity and token accuracy over held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["validate"]


@torch.no_grad()
def validate(
    model: Callable[..., tuple[Tensor, Tensor]],
    batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    dp_group: dist.ProcessGroup,
) -> dict[str, float]:
    """Mean over all tokens of all ranks' ``batches`` (inputs, labels, -100 for none, and documents or None; [B, T]).

    model: (inputs, labels, documents) → sum of the token losses, number of right guesses.
    """
    sums = None
    for inputs, labels, documents in batches:
        loss, right = model(inputs, labels, documents)
        part = torch.stack((loss.double(), right.double(), (labels != -100).sum().double()))
        sums = part if sums is None else sums + part
    assert sums is not None, "there is at least one row"
    dist.all_reduce(sums, group=dp_group)
    loss_sum, right_sum, tokens = sums.tolist()
    loss_mean = loss_sum / tokens
    return {
        "val_loss": loss_mean,
        "val_perplexity": math.exp(min(loss_mean, 700.0)),
        "val_accuracy": right_sum / tokens,
    }
