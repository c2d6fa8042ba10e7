"""Which positions attend to which, and the attention itself.

Shapes: B batch, T positions, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

__all__ = ["attend", "attention_mask", "document_positions"]


def document_positions(documents: Tensor) -> Tensor:
    """Each token's position in its document. documents: [B, T], a number that changes from one to the next."""
    t = torch.arange(documents.shape[1], device=documents.device)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return t - torch.where(begins, t, 0).cummax(dim=1).values  # [B, T]


def attention_mask(
    documents: Tensor | None, t: int, window: int | None, *, flex: bool, device: torch.device
) -> Tensor | BlockMask | None:
    """Where attention is allowed: to positions before, of the same document, and not further back than ``window``.

    documents: [B, T], or None for rows that are one document. flex: as blocks for FlexAttention, which skips those
    that are not allowed at all; else as booleans that broadcast to [B, H, T, T]. None if causality is all there is.
    """
    if window is not None and window >= t:
        window = None
    if documents is None and window is None:
        return None
    if flex and documents is not None:

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            near = (q >= k) & (documents[b, q] == documents[b, k])
            return near if window is None else near & (q - k < window)

        create: Any = create_block_mask if torch.compiler.is_compiling() else _compiled(create_block_mask)
        return create(allowed, documents.shape[0], None, t, t, device=documents.device)
    back = torch.arange(t, device=device)[:, None] - torch.arange(t, device=device)  # [T, T]
    mask = back >= 0 if window is None else (back >= 0) & (back < window)
    return mask if documents is None else mask & (documents[:, None, :, None] == documents[:, None, None, :])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, *, dropout: float = 0.0) -> Tensor:
    """Grouped-query attention. q: [B, H, T, D]; k, v: [B, K, S, D]; mask: where it is allowed, [B, H, T, S] or what
    broadcasts to it or blocks; None: to all positions before (T = S), or to all (T = 1). → [B, H, T, D]."""
    if isinstance(mask, BlockMask):
        flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
        return flex(q, k, v, block_mask=mask, enable_gqa=True)
    causal = mask is None and q.shape[2] > 1
    if (
        causal
        and not dropout
        and q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and torch.compiler.is_compiling()
    ):
        return _CausalAttention.apply(q, k, v)  # type: ignore[no-any-return, no-untyped-call]
    if q.shape[2] > 1 and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        # The kernel there that takes a mask, or fp32, wants keys for each query head; the one that takes fewer of them
        # holds all scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=True)


class _CausalAttention(torch.autograd.Function):
    """Attention on CPU in bf16, with a gradient that takes a third to two thirds of the time of torch's own
    (measured: docs/performance.md), if compiled."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries_per_key = q.shape[1] // k.shape[1]
        every_k, every_v = (x.repeat_interleave(queries_per_key, dim=1) for x in (k, v))
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, every_k, every_v, is_causal=True)
        ctx.save_for_backward(q, k, v, y, lse)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return _causal_attention_gradient(*grad_outputs, *ctx.saved_tensors)


def _causal_attention_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to q, k, v, block of queries by block (Dao et al. 2022, FlashAttention, algorithm 4).

    grad, q, y: [B, H, T, D]; k, v: [B, K, T, D]; lse: [B, H, T], of the scaled scores. A block of queries meets all
    keys up to its last one, in matrix multiplications with nothing but element-wise operations between them, and the
    H/K query heads of a key head are rows of one matrix.
    """
    b, h, t, d = q.shape
    shape, n, heads = k.shape, b * k.shape[1], h // k.shape[1]
    k, v = k.reshape(n, t, d), v.reshape(n, t, d)
    scale = d**-0.5
    delta = (grad.float() * y.float()).sum(-1)  # [B, H, T]
    grad_q, grads_k, grads_v = [], [], []
    # At most 8 blocks, as each is a part of the graph; below 128 queries they are no faster.
    size = max(128, -(-t // 8))
    for start in range(0, t, size):
        end = min(start + size, t)

        def rows(x: Tensor, start: int = start, end: int = end) -> Tensor:
            return x[:, :, start:end].reshape(n, heads * (end - start), -1)

        q_block, grad_block, k_seen, v_seen = rows(q), rows(grad), k[:, :end], v[:, :end]
        scores = torch.bmm(q_block, k_seen.mT).float() * scale
        # As int32: half as many vectors to compare as for int64 (measured: docs/performance.md).
        position = torch.arange(end, dtype=torch.int32, device=q.device)
        seen = position <= position[start:, None]
        p = torch.where(seen.repeat(heads, 1), torch.exp(scores - rows(lse[..., None])), 0.0)
        grad_scores = p * (torch.bmm(grad_block, v_seen.mT).float() - rows(delta[..., None])) * scale
        p, grad_scores = p.to(q.dtype), grad_scores.to(q.dtype)
        grad_q.append(torch.bmm(grad_scores, k_seen).view(b, h, end - start, d))
        unseen = (0, 0, 0, t - end)
        grads_k.append(F.pad(torch.bmm(grad_scores.mT, q_block).float(), unseen))
        grads_v.append(F.pad(torch.bmm(p.mT, grad_block).float(), unseen))
    grad_k, grad_v = (functools.reduce(torch.add, x).to(q.dtype).view(shape) for x in (grads_k, grads_v))
    return torch.cat(grad_q, dim=2), grad_k, grad_v


@functools.cache
def _compiled(function: Any) -> Any:
    """FlexAttention is a kernel only when compiled, also where all else is to run uncompiled, as in evaluation: by
    itself it would hold all scores."""
    compiled = torch.compile(function)

    def call(*args: Any, **named: Any) -> Any:
        with torch.compiler.set_stance("default"):
            return compiled(*args, **named)

    return call
