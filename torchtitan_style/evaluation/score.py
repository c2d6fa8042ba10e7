"""How likely a model finds rows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchtitan_style.common.errors import UserError

from .windows import IGNORE, Window, stack

Source = TypeVar("Source")

_LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**25}
"""8 MiB in fp32, which stay in a CPU's cache (a sixth faster, benchmarks/evaluate.py); 128 MiB on a GPU."""
_POSITIONS_AT_ONCE = 256
"""At least, however large the vocabulary: a matrix product of few rows is slow."""


def score(
    model: Any, batches: Iterable[list[Window[Source]]], *, device: torch.device
) -> Iterator[tuple[Window[Source], float, int]]:
    """Each window with the sum of its token losses and its number of right guesses.

    Raises UserError if a batch does not fit into the GPU's memory.
    """
    for rows in batches:
        try:
            losses, right = row_sums(model, *stack(rows, device))
        except torch.OutOfMemoryError:
            shape = f"{len(rows)} × {len(rows[0].inputs):,} tokens"
            raise UserError(f"{shape} at once do not fit into the GPU's memory; lower --batch-size") from None
        yield from zip(rows, losses.tolist(), right.tolist(), strict=True)


@torch.inference_mode()
def row_sums(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the token losses of each row, and how many labels are the likeliest token: [B] in fp64, and [B].

    model: a causal language model with Transformers' names. ids, labels: [B, T]; -100 where nothing is scored.
    """
    return sums_of_hidden(model, model.model(ids), labels)


def sums_of_hidden(model: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``row_sums`` of rows whose last hidden states [B, T, C] are known.

    The logits of few positions are there at once, and none of those that are not scored.
    """
    rows = len(labels)
    wanted = labels != IGNORE
    row_of = wanted.nonzero()[:, 0]  # [N]
    hidden, labels = hidden[wanted], labels[wanted]  # [N, C], [N]
    size = max(_POSITIONS_AT_ONCE, _LOGITS_AT_ONCE[hidden.device.type] // model.config.vocab_size)
    losses = torch.zeros(rows, dtype=torch.float64, device=hidden.device)
    right = torch.zeros(rows, dtype=torch.long, device=hidden.device)
    for begin in range(0, len(labels), size):
        part = slice(begin, begin + size)
        logits = model.lm_head(hidden[None, part])[0].float()  # [n, V]
        of_label = logits.gather(1, labels[part, None])[:, 0]
        losses.index_add_(0, row_of[part], (logits.logsumexp(1) - of_label).double())
        right.index_add_(0, row_of[part], (logits.argmax(1) == labels[part]).long())
    return losses, right
