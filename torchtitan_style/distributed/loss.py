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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

__all__ = ["chunked_cross_entropy"]

LOGITS_PER_CHUNK = 2**21
"""Logits held at once, on each rank: 8 MiB in fp32, which a CPU's cache can hold (measured: a quarter
less time than with 32 MiB)."""

MIN_TOKENS_PER_CHUNK = 512
"""However large the vocabulary, as many tokens as a matrix multiplication needs to be fast."""

IGNORE = -100
"""Label of a position with nothing to predict."""


def chunked_cross_entropy(tp_group: dist.ProcessGroup, *, compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """A loss function for ``LMHead``: (hidden [B, T, C], weight [V, C], labels [B, T], z_loss) → (sum of the
    token losses in fp32, number of labels that are the likeliest token)."""
    group = tp_group if tp_group.size() > 1 else None
    # Without collectives in it, one chunk is one fused kernel when compiled.
    chunk_loss = torch.compile(_chunk_loss, dynamic=False) if compiled and group is None else _chunk_loss

    def loss_function(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        if isinstance(hidden, DTensor) and isinstance(weight, DTensor):
            # Hidden states are whole on every tp rank, weights a slice: the gradient that a rank
            # finds for the hidden states is the part that comes from its slice.
            hidden, weight = hidden.to_local(grad_placements=[Partial()]), weight.to_local()
        needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return _ChunkedCrossEntropy.apply(
            hidden.flatten(0, 1), weight, labels.flatten(), group, chunk_loss, z_loss, needs_grad
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
        chunk_loss: Callable[..., tuple[Tensor, Tensor, Tensor]],
        z_loss: float,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = max(MIN_TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // weight.shape[0])
        first = 0 if group is None else group.rank() * weight.shape[0]
        total = hidden.new_zeros((), dtype=torch.float32)
        right = labels.new_zeros(())
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for h, y, start in zip(hidden.split(rows), labels.split(rows), range(0, len(hidden), rows), strict=True):
            loss, correct, logits_grad = chunk_loss(h @ weight.T, y, first, group, z_loss)
            total += loss
            right += correct
            if hidden_grad is not None and weight_grad is not None:
                hidden_grad[start : start + rows] = logits_grad @ weight
                weight_grad += logits_grad.T @ h
        ctx.grads = hidden_grad, weight_grad
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.grads
        del ctx.grads
        factor = grad_outputs[0]
        dtype = hidden_grad.dtype
        return hidden_grad.mul_(factor), weight_grad.mul_(factor).to(dtype), None, None, None, None, None


def _chunk_loss(
    logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup | None, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a chunk, right guesses, and the loss's gradient with respect to the logits.

    logits: [N, V], the vocabulary rows from ``first`` on. labels: [N]. Returns the sum of the N
    losses in fp32 and the number of labels with the highest logit (both the same on all ranks of
    ``group``), and [N, V] in the type of ``logits``.
    """
    valid = labels != IGNORE
    local = labels - first
    here = (local >= 0) & (local < logits.shape[1])
    index = torch.where(here, local, 0)[:, None]  # [N, 1]

    z = logits.float()
    maximum = z.amax(1, keepdim=True)
    if group is not None:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    z = z.sub_(maximum)  # a copy of the logits only where they are not fp32; they are not used again
    label_logit = z.gather(1, index)[:, 0] * here
    exponentials = z.exp_()
    normaliser = exponentials.sum(1)
    if group is not None:
        both = torch.stack((label_logit, normaliser))
        dist.all_reduce(both, group=group)
        label_logit, normaliser = both
    log_normaliser = normaliser.log()
    loss = ((log_normaliser - label_logit) * valid).sum()
    correct = ((label_logit >= 0) & valid).sum()  # 0 is the highest now

    # d loss / d logits = softmax - one-hot, and 0 for ignored tokens. That of z_loss is 2·z_loss·log Z · softmax.
    of_softmax = valid / normaliser
    if z_loss:
        log_z = log_normaliser + maximum[:, 0]
        loss = loss + z_loss * (log_z.square() * valid).sum()
        of_softmax = of_softmax * (1 + 2 * z_loss * log_z)
    grad = exponentials.mul_(of_softmax[:, None])
    grad.scatter_add_(1, index, -(here & valid).to(grad.dtype)[:, None])
    return loss, correct, grad.to(logits.dtype)
