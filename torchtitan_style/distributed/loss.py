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

from torchtitan_style.common.sizes import LOGITS_PER_CHUNK, MIN_TOKENS_PER_CHUNK, logits_rows

IGNORE = -100
"""Label of a position with nothing to predict."""


def chunked_cross_entropy(tp_group: dist.ProcessGroup, *, compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """A loss function for ``LMHead``: (hidden [B, T, C], weight [V, C], labels [B, T], z_loss) → (sum of the
    token losses in fp32, number of labels that are the likeliest token)."""
    group = tp_group if tp_group.size() > 1 else None
    operations = _Operations(compiled=compiled)

    def loss_function(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        if isinstance(hidden, DTensor) and isinstance(weight, DTensor):
            # Hidden states are whole on every tp rank, weights a slice: the gradient that a rank
            # finds for the hidden states is the part that comes from its slice.
            hidden, weight = hidden.to_local(grad_placements=[Partial()]), weight.to_local()
        needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        weight_needs_grad = needs_grad and weight.requires_grad  # not where it is frozen
        return _ChunkedCrossEntropy.apply(
            hidden.flatten(0, 1), weight, labels.flatten(), group, operations, z_loss, needs_grad, weight_needs_grad
        )

    return loss_function


class _Operations:
    """What there is beside the matrix multiplications, compiled or not."""

    def __init__(self, *, compiled: bool) -> None:
        self.compiled = compiled

        def maybe_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False) if compiled else function

        self.logits_loss = maybe_compiled(_logits_loss)
        self.add = maybe_compiled(Tensor.add_)
        self.finish = maybe_compiled(_finish)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup | None,
        operations: _Operations,
        z_loss: float,
        needs_grad: bool,
        weight_needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        """hidden: [B·T, C]; weight: [V, C]; labels: [B·T]."""
        least = MIN_TOKENS_PER_CHUNK[hidden.device.type]
        rows = logits_rows(len(hidden), weight.shape[0], most_logits=LOGITS_PER_CHUNK, least_rows=least)
        first = 0 if group is None else group.rank() * weight.shape[0]
        total = hidden.new_zeros((), dtype=torch.float32)
        right = labels.new_zeros(())
        # The largest tensors there are: all chunks use the same, as pages that are new take longer to write to.
        logits = hidden.new_empty(rows, weight.shape[0])
        logits_grad = torch.empty_like(logits) if operations.compiled and needs_grad else logits
        if needs_grad:
            hidden_grad = torch.empty_like(hidden)
        if weight_needs_grad:
            product = hidden.new_empty(weight.T.shape)
        weight_grad: Tensor | None = None  # [C, V]
        for start in range(0, len(hidden), rows):
            h, y = hidden[start : start + rows], labels[start : start + rows]
            z, grad = logits[: len(h)], logits_grad[: len(h)]
            torch.mm(h, weight.T, out=z)
            loss, correct = operations.logits_loss(z, y, grad if needs_grad else None, first, group, z_loss)
            total += loss
            right += correct
            if needs_grad:
                torch.mm(grad, weight, out=hidden_grad[start : start + rows])
            if weight_needs_grad:
                # Twice as fast on CPU in bf16 as grad.T @ h: the matrix that is to be read by columns is the small one,
                # and is copied in that order (docs/performance.md).
                torch.mm(h.T.contiguous(), grad, out=product)
                if weight_grad is None:
                    weight_grad = product.to(torch.float32, copy=True)
                else:
                    operations.add(weight_grad, product)
        if needs_grad:
            ctx.grads, ctx.finish = (hidden_grad, weight_grad), operations.finish
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.grads
        del ctx.grads
        factor = grad_outputs[0]
        hidden_grad.mul_(factor)
        return (
            hidden_grad,
            None if weight_grad is None else ctx.finish(weight_grad, factor, hidden_grad.dtype),
            None, None, None, None, None, None,
        )  # fmt: skip


def _finish(weight_grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, V] in fp32 to ``factor`` times its transpose."""
    return (weight_grad * factor).to(dtype).T.contiguous()


def _logits_loss(
    logits: Tensor,
    labels: Tensor,
    logits_grad: Tensor | None,
    first: int,
    group: dist.ProcessGroup | None,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """Loss of a chunk and right guesses; the loss's gradient with respect to the logits goes into ``logits_grad``.

    logits: [N, V], the vocabulary rows from ``first`` on; what is in them afterwards is of no use. labels: [N].
    logits_grad: [N, V], may be ``logits``. Returns the sum of the N losses in fp32 and the number of labels with the
    highest logit, both the same on all ranks of ``group``.
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
    # Compiled, as part of one pass. Else in place, on a copy of the logits or on themselves where they are fp32: they
    # are not used again.
    compiling = torch.compiler.is_compiling()
    exponentials = (z - maximum).exp() if compiling else z.sub_(maximum).exp_()
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
    if logits_grad is None:
        return loss, correct
    grad = exponentials * of_softmax[:, None] if compiling else exponentials.mul_(of_softmax[:, None])
    if compiling:  # one pass over memory, where a scatter would be another
        # Half as many vectors to compare as for int64 (measured: docs/performance.md).
        label = torch.where(here & valid, local, -1).int()[:, None]
        is_label = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device) == label
        grad = torch.where(is_label, grad - 1, grad)
    else:
        grad.scatter_add_(1, index, -(here & valid).to(grad.dtype)[:, None])
    logits_grad.copy_(grad)
    return loss, correct
