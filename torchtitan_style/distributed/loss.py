"""Cross entropy of the LM head that never holds the logits of all tokens, nor those of all ranks.

For a vocabulary of 150,000 the logits are the largest tensor of a training step by far. Here the
tokens are taken in chunks: logits, loss and the gradients of both inputs are computed at once,
and the logits forgotten. As the loss is a sum over tokens, its gradient is known up to the factor
that backward brings. Nothing is recomputed: three matrix multiplications, as in the plain form.

Under tensor parallelism each rank holds a slice of the vocabulary; ranks exchange the maximum, the
sum of exponentials and the label's logit of each token (Shoeybi et al. 2019, section 3), never the
logits.

Shapes: N tokens of a chunk, C hidden size, V vocabulary rows on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

__all__ = ["chunked_cross_entropy"]

LOGITS_PER_CHUNK = 2**23
"""Logits held at once, on each rank: 32 MiB in fp32, and more tokens than a GEMM needs to be fast."""

IGNORE = -100
"""Label of a position with nothing to predict."""


def chunked_cross_entropy(*, tp_group: dist.ProcessGroup, compiled: bool) -> Callable[..., Tensor]:
    """A loss function for ``LMHead``: (hidden [B, T, C], weight [V, C], labels [B, T]) → sum, fp32."""
    chunk_loss = _chunk_loss if tp_group.size() > 1 or not compiled else torch.compile(_chunk_loss)
    group = tp_group if tp_group.size() > 1 else None

    def loss_function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if isinstance(hidden, DTensor) and isinstance(weight, DTensor):
            # Hidden states are whole on every tp rank, weights a slice: the gradient that a rank
            # finds for the hidden states is the part that comes from its slice.
            hidden, weight = hidden.to_local(grad_placements=[Partial()]), weight.to_local()
        return _ChunkedCrossEntropy.apply(
            hidden.flatten(0, 1), weight, labels.flatten(), group, partial(chunk_loss, group=group)
        )

    return loss_function


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup | None,
        chunk_loss: Callable[..., tuple[Tensor, Tensor]],
    ) -> Tensor:
        rows = max(1, LOGITS_PER_CHUNK // weight.shape[0])
        first = 0 if group is None else group.rank() * weight.shape[0]
        needs_grad = hidden.requires_grad or weight.requires_grad
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for h, y, start in zip(
            hidden.split(rows), labels.split(rows), range(0, len(hidden), rows), strict=True
        ):
            loss, logits_grad = chunk_loss(h @ weight.T, y, first)
            total += loss
            if hidden_grad is not None and weight_grad is not None:
                hidden_grad[start : start + rows] = logits_grad @ weight
                weight_grad += logits_grad.T @ h
        ctx.grads = hidden_grad, weight_grad
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.grads
        del ctx.grads
        factor = grad_outputs[0]
        dtype = hidden_grad.dtype
        return hidden_grad.mul_(factor), weight_grad.mul_(factor).to(dtype), None, None, None


def _chunk_loss(
    logits: Tensor, labels: Tensor, first: int, *, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Loss of a chunk and its gradient with respect to the logits.

    logits: [N, V], the vocabulary rows from ``first`` on. labels: [N]. Returns the sum of the N
    losses, fp32, the same on all ranks of ``group``, and [N, V] in the type of ``logits``.
    """
    z = logits.float()
    valid = labels != IGNORE
    local = labels - first
    here = (local >= 0) & (local < z.shape[1])
    index = torch.where(here, local, 0)[:, None]  # [N, 1]

    maximum = z.amax(1, keepdim=True)
    if group is not None:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    z = z - maximum
    label_logit = z.gather(1, index)[:, 0] * here
    exponentials = z.exp()
    normaliser = exponentials.sum(1)
    if group is not None:
        both = torch.stack((label_logit, normaliser))
        dist.all_reduce(both, group=group)
        label_logit, normaliser = both
    loss = ((normaliser.log() - label_logit) * valid).sum()

    # d loss / d logits = softmax - one-hot, and 0 for ignored tokens.
    grad = exponentials * (valid / normaliser)[:, None]
    columns = torch.arange(z.shape[1], device=z.device)
    one_hot = (columns == index) & (here & valid)[:, None]
    return loss, (grad - one_hot.to(grad.dtype)).to(logits.dtype)
