"""Causal attention on CPUs, where torch's own is slow.

In bf16, of documents too, its gradient can be made of matrix multiplications, which takes a third to two thirds of the
time of torch's if compiled. Queries that are the last of a row meet the keys before them without a mask. Both are
measured in docs/performance.md.

Shapes: B batch, T queries, those of the last T of S positions, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST_ROWS = 768
"""Queries from which torch's kernels take 256 at a time, else 64. With fewer, two calls take longer than one with a
mask."""


def on_cpu(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``attend``, but without dropout and where that is faster, computed here: bf16 attention to what is before in
    compiled graphs, and that of the last positions of a row.

    attend: (q [B, H, T, D], k, v [B, K, S, D], mask, dropout=) → [B, H, T, D]; the queries are those of the last T of S
    positions. A mask of booleans, as of documents, lets none of them see a later position.
    """

    def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Any, *, dropout: float = 0.0) -> Tensor:
        causal = mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool)
        if causal and q.shape[2] > 1 and not dropout:
            if q.dtype == torch.bfloat16 and torch.compiler.is_compiling():
                return _CausalAttention.apply(q, k, v, mask)  # type: ignore[no-any-return, no-untyped-call]
            if mask is None and q.shape[2] < k.shape[2] and _pays_in_parts(q, k):
                return _EndingCausally.apply(q, k, v)  # type: ignore[no-any-return, no-untyped-call]
        return attend(q, k, v, mask, dropout=dropout)

    return attend_on_cpu


class _CausalAttention(torch.autograd.Function):
    """Torch's forward pass; the gradient is ``_causal_attention_gradient``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        t, s = q.shape[2], k.shape[2]
        if mask is None and (t == s or _pays_in_parts(q, k)):
            y, lse = _ending_causally(q, k, v)
        else:
            allowed = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t) if mask is None else mask
            y, lse = _flash(q, k, v, attn_mask=torch.where(allowed, 0.0, -torch.inf).to(q.dtype))
        ctx.save_for_backward(q, k, v, y, lse, mask)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *_causal_attention_gradient(*grad_outputs, *ctx.saved_tensors), None


class _EndingCausally(torch.autograd.Function):
    """The queries meet the keys before the first of them, and those from there on, each in a call of torch's kernels.

    In one call, with a mask, these would compute all scores of both. Before the first query all keys are seen, so that
    the query heads of a key head are rows of one matrix, of which the kernels take 256 at a time instead of 64
    (measured: docs/performance.md).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, lse = _ending_causally(q, k, v)
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        before, n = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
        # With output and normaliser of the whole softmax each call gives its keys' part of the gradient.
        grad_q, *later = _flash_gradient(grad_outputs[0], q, k[:, :, before:], v[:, :, before:], y, lse, 0.0, True)
        grad, q, y = (_as_rows(x, n) for x in (grad_outputs[0], q, y))
        grad_rows, *earlier = _flash_gradient(
            grad, q, k[:, :, :before], v[:, :, :before], y, _as_rows(lse, n), 0.0, False
        )
        grad_k, grad_v = (torch.cat(parts, dim=2) for parts in zip(earlier, later, strict=True))
        return grad_q + _as_heads(grad_rows, n), grad_k, grad_v


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_gradient = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _pays_in_parts(q: Tensor, k: Tensor) -> bool:
    return q.shape[2] * (q.shape[1] // k.shape[1]) >= FEWEST_ROWS


def _ending_causally(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the last T of S positions to all before, and the log of its sums of exponentials, [B, H, T].

    Where T < S the outputs of two softmaxes are added up (Dao et al. 2022, FlashAttention, section 3.1).
    """
    before, n = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    y, lse = _flash(q, k[:, :, before:], v[:, :, before:], is_causal=True)
    if before == 0:
        return y, lse
    y_before, lse_before = (_as_heads(x, n) for x in _flash(_as_rows(q, n), k[:, :, :before], v[:, :, :before]))
    both = torch.logaddexp(lse_before, lse)
    return torch.lerp(y_before.float(), y.float(), torch.exp(lse - both)[..., None]).to(q.dtype), both


def _as_rows(x: Tensor, n: int) -> Tensor:
    """[B, K · n, T, …] → [B, K, n · T, …]"""
    return x.unflatten(1, (-1, n)).flatten(2, 3)


def _as_heads(x: Tensor, n: int) -> Tensor:
    """[B, K, n · T, …] → [B, K · n, T, …]"""
    return x.unflatten(2, (n, -1)).flatten(1, 2)


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
