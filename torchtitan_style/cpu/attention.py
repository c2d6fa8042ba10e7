"""Causal attention in bf16 on CPUs, of documents too, with a gradient made of matrix multiplications.

Its backward pass takes a third to two thirds of the time of torch's own, if compiled (measured:
docs/performance.md). Shapes: B batch, T queries, those of the last T of S positions, H query heads, K key/value heads,
D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def with_fast_gradient(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``attend``, but for bf16 attention to what is before, without dropout, in compiled graphs: computed here.

    attend: (q [B, H, T, D], k, v [B, K, S, D], mask, dropout=) → [B, H, T, D]; the queries are those of the last T of S
    positions. A mask of booleans, as of documents, lets none of them see a later position.
    """

    def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Any, *, dropout: float = 0.0) -> Tensor:
        causal = mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool)
        if causal and q.shape[2] > 1 and not dropout and q.dtype == torch.bfloat16 and torch.compiler.is_compiling():
            return _CausalAttention.apply(q, k, v, mask)  # type: ignore[no-any-return, no-untyped-call]
        return attend(q, k, v, mask, dropout=dropout)

    return attend_on_cpu


class _CausalAttention(torch.autograd.Function):
    """Torch's forward pass; the gradient is ``_causal_attention_gradient``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        queries_per_key = q.shape[1] // k.shape[1]
        every_k, every_v = (x.repeat_interleave(queries_per_key, dim=1) for x in (k, v))
        t, s = q.shape[2], k.shape[2]
        allowed = mask
        if mask is None and t < s:
            allowed = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
        added = None if allowed is None else torch.where(allowed, 0.0, -torch.inf).to(q.dtype)
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, every_k, every_v, is_causal=added is None, attn_mask=added
        )
        ctx.save_for_backward(q, k, v, y, lse, mask)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *_causal_attention_gradient(*grad_outputs, *ctx.saved_tensors), None


def _causal_attention_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to q, k, v, block of queries by block (Dao et al. 2022, FlashAttention, algorithm 4).

    grad, q, y: [B, H, T, D]; k, v: [B, K, S, D]; lse: [B, H, T], of the scaled scores; mask: [T, S] or [B, 1, T, S], or
    None if causality is all there is. A block of queries meets all keys up to its last one, in matrix multiplications
    with nothing but element-wise operations between them, and the H/K query heads of a key head are rows of one matrix.
    """
    b, h, t, d = q.shape
    shape, n, heads, s = k.shape, b * k.shape[1], h // k.shape[1], k.shape[2]
    k, v = k.reshape(n, s, d), v.reshape(n, s, d)
    scale = d**-0.5
    delta = (grad.float() * y.float()).sum(-1)  # [B, H, T]
    grad_q, grads_k, grads_v = [], [], []
    # At most 8 blocks, as each is a part of the graph; below 128 queries they are no faster.
    size = max(128, -(-t // 8))
    for start in range(0, t, size):
        end = min(start + size, t)
        first, last = s - t + start, s - t + end  # positions of these queries

        def rows(x: Tensor, start: int = start, end: int = end) -> Tensor:
            return x[:, :, start:end].reshape(n, heads * (end - start), -1)

        q_block, grad_block, k_seen, v_seen = rows(q), rows(grad), k[:, :last], v[:, :last]
        scores = torch.bmm(q_block, k_seen.mT).float() * scale
        if mask is None:
            # As int32: half as many vectors to compare as for int64 (measured: docs/performance.md).
            position = torch.arange(last, dtype=torch.int32, device=q.device)
            seen = (position <= position[first:, None]).repeat(heads, 1)
        else:
            part = mask[..., start:end, :last].expand(b, 1, -1, -1)[:, :, None]
            seen = part.expand(-1, n // b, heads, -1, -1).reshape(n, heads * (end - start), last)
        p = torch.where(seen, torch.exp(scores - rows(lse[..., None])), 0.0)
        grad_scores = p * (torch.bmm(grad_block, v_seen.mT).float() - rows(delta[..., None])) * scale
        p, grad_scores = p.to(q.dtype), grad_scores.to(q.dtype)
        grad_q.append(torch.bmm(grad_scores, k_seen).view(b, h, end - start, d))
        unseen = (0, 0, 0, s - last)
        grads_k.append(F.pad(torch.bmm(grad_scores.mT, q_block).float(), unseen))
        grads_v.append(F.pad(torch.bmm(p.mT, grad_block).float(), unseen))
    grad_k, grad_v = (functools.reduce(torch.add, x).to(q.dtype).view(shape) for x in (grads_k, grads_v))
    return torch.cat(grad_q, dim=2), grad_k, grad_v
