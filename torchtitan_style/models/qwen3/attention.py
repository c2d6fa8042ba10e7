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


def document_positions(documents: Tensor) -> Tensor:
    """Each token's position in its document. documents: [B, T], a number that changes from one to the next."""
    t = torch.arange(documents.shape[1], device=documents.device)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return t - torch.where(begins, t, 0).cummax(dim=1).values  # [B, T]


def attention_mask(
    documents: Tensor | None, t: int, window: int | None, *, flex: bool, device: torch.device
) -> Tensor | BlockMask | None:
    """Where attention is allowed: to positions before, of the same document, and not further back than ``window``.

    documents: [B, T], or None for rows that are one document. flex: with documents, as blocks for FlexAttention,
    which skips those that are not allowed at all; else as booleans that broadcast to [B, H, T, T]. None if causality is
    all there is. A cache builds its own (``KVCache``), as queries and keys have different positions there.
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
    if q.shape[2] > 1 and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        # The kernel there that takes a mask, or fp32, wants keys for each query head; the one that takes fewer of them
        # holds all scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=True)


@functools.cache
def _compiled(function: Any) -> Any:
    """FlexAttention is a kernel only when compiled, also where all else is to run uncompiled, as in evaluation: by
    itself it would hold all scores."""
    compiled = torch.compile(function)

    def call(*args: Any, **named: Any) -> Any:
        with torch.compiler.set_stance("default"):
            return compiled(*args, **named)

    return call
