"""A loss of the user's own over the LM head, which never holds the logits of all tokens.

Tokens are taken in chunks, and the logits of a chunk are computed again in the backward pass. Under tensor parallelism
they are gathered over the vocabulary: the function sees whole rows.

Shapes: N tokens of a chunk, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint

from .loss import IGNORE, LOGITS_PER_CHUNK, chunked_cross_entropy

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, V] in fp32, labels [N]) → the loss of each token, [N]."""


def plain_loss(function: TokenLoss) -> Callable[..., tuple[Tensor, Tensor]]:
    """The definition, for ``LMHead.loss_function``: all logits at once, on one device."""

    def loss_function(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        return _loss_of(F.linear(hidden, weight).flatten(0, 1).float(), labels.flatten(), function)

    return loss_function


def custom_loss(function: TokenLoss, tp_group: dist.ProcessGroup) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same in chunks, on any layout: (hidden [B, T, C], weight [V, C], labels [B, T], z_loss) → (sum of the token
    losses, number of labels that are the likeliest token). Without gradients, as in validation, it is cross entropy."""
    group = tp_group if tp_group.size() > 1 else None
    cross_entropy = chunked_cross_entropy(tp_group, compiled=False)

    def chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = F.linear(hidden, weight)
        if group is not None:
            logits = _GatherVocabulary.apply(logits, group)  # type: ignore[no-untyped-call]
        return _loss_of(logits.float(), labels, function)

    def loss_function(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return cross_entropy(hidden, weight, labels)
        if isinstance(hidden, DTensor) and isinstance(weight, DTensor):
            # Hidden states are whole on every tp rank: what a rank finds for them comes from its slice of the rows.
            hidden, weight = hidden.to_local(grad_placements=[Partial()]), weight.to_local()
        rows = max(1, LOGITS_PER_CHUNK // (weight.shape[0] * (1 if group is None else group.size())))
        parts = zip(hidden.flatten(0, 1).split(rows), labels.flatten().split(rows), strict=True)
        found: Any = [checkpoint(chunk_loss, h, weight, y, use_reentrant=False) for h, y in parts]
        return torch.stack([loss for loss, _ in found]).sum(), torch.stack([right for _, right in found]).sum()

    return loss_function


def _loss_of(logits: Tensor, labels: Tensor, function: TokenLoss) -> tuple[Tensor, Tensor]:
    """Sum of ``function`` over the labels that are not ignored, and how many of them are the likeliest token."""
    valid = labels != IGNORE
    losses = function(logits, labels.where(valid, 0))
    return losses.where(valid, 0.0).sum(), ((logits.argmax(-1) == labels) & valid).sum()


class _GatherVocabulary(torch.autograd.Function):
    """Logits [N, V / ranks] → [N, V]. All ranks compute the same loss of them: each takes its slice of the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        parts = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(parts, logits.contiguous(), group=group)
        ctx.rank, ctx.size = group.rank(), logits.shape[1]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][:, ctx.rank * ctx.size : (ctx.rank + 1) * ctx.size].contiguous(), None
