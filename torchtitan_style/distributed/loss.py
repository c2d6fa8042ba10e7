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

LOGITS_PER_CHUNK = 2**23
"""Logits held at once, on each rank: 16 MiB in bf16."""

MIN_TOKENS_PER_CHUNK = 1024
"""However large the vocabulary: each chunk adds to the gradient of the whole matrix, which at 512 tokens takes as
long as a quarter of the multiplications (measured: docs/performance.md)."""

IGNORE = -100
"""Label of a position with nothing to predict."""


def chunked_cross_entropy(tp_group: dist.ProcessGroup, *, compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """A loss function for ``LMHead``: (hidden [B, T, C], weight [V, C], labels [B, T], z_loss) → (sum of the
    token losses in fp32, number of labels that are the likeliest token)."""
    group = tp_group if tp_group.size() > 1 else None
    # Without collectives in it, what is done with a chunk is a graph of its own when compiled.
    chunk = torch.compile(_chunk, dynamic=False) if compiled and group is None else _chunk

    def loss_function(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        if isinstance(hidden, DTensor) and isinstance(weight, DTensor):
            # Hidden states are whole on every tp rank, weights a slice: the gradient that a rank
            # finds for the hidden states is the part that comes from its slice.
            hidden, weight = hidden.to_local(grad_placements=[Partial()]), weight.to_local()
        needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return _ChunkedCrossEntropy.apply(
            hidden.flatten(0, 1), weight, labels.flatten(), group, chunk, z_loss, needs_grad
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
        chunk: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
        z_loss: float,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        count = -(-len(hidden) // max(MIN_TOKENS_PER_CHUNK, LOGITS_PER_CHUNK // weight.shape[0]))
        rows = -(-len(hidden) // max(1, count))
        first = 0 if group is None else group.rank() * weight.shape[0]
        total = hidden.new_zeros((), dtype=torch.float32)
        right = labels.new_zeros(())
        hidden_grads: list[Tensor] = []
        weight_grad: Tensor | None = None
        for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
            loss, correct, hidden_grad, weight_grad = chunk(h, weight, y, weight_grad, first, group, z_loss, needs_grad)
            total += loss
            right += correct
            hidden_grads.append(hidden_grad)
        if needs_grad:
            ctx.grads = torch.cat(hidden_grads), weight_grad
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.grads
        del ctx.grads
        factor = grad_outputs[0]
        return hidden_grad.mul_(factor), weight_grad.mul_(factor).to(hidden_grad.dtype), None, None, None, None, None


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weight_grad: Tensor | None,
    first: int,
    group: dist.ProcessGroup | None,
    z_loss: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss of a chunk, right guesses, and the loss's gradients with respect to hidden [N, C] and weight [V, C]; the
    latter in fp32 and added to ``weight_grad``, if that is given."""
    loss, correct, grad = _logits_loss(hidden @ weight.T, labels, first, group, z_loss)
    if not needs_grad:
        return loss, correct, None, None
    # oneDNN multiplies bf16 matrices half as fast if the first is to be read by columns (docs/performance.md):
    # the hidden states, copied in that order, come first.
    product = (hidden.T.contiguous() @ grad).T if torch.compiler.is_compiling() else grad.T @ hidden
    weight_grad = product.float().contiguous() if weight_grad is None else weight_grad.add_(product)
    return loss, correct, grad @ weight, weight_grad


def _logits_loss(
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
    label_logit = (z.gather(1, index) - maximum)[:, 0] * here
    # In place on a copy of the logits, or on themselves where they are fp32; they are not used again.
    exponentials = z.sub_(maximum).exp_()
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
    if torch.compiler.is_compiling():  # one pass over memory, where a scatter would be another
        # Half as many vectors to compare as for int64 (measured: docs/performance.md).
        label = torch.where(here & valid, local, -1).int()[:, None]
        is_label = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device) == label
        grad = torch.where(is_label, grad - 1, grad)
    else:
        grad.scatter_add_(1, index, -(here & valid).to(grad.dtype)[:, None])
    return loss, correct, grad.to(logits.dtype)
