"""Which positions attend to which, and the attention itself.

Shapes: B batch, T positions, H query heads, K key/value heads, D head size. Where queries are those of some positions
only: t of them, in spans of t / n positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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

    That no query sees a later position is relied on by ``part_mask``, by the cache and by cpu/attention.py.
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


class PartMask(NamedTuple):
    """Where attention is allowed for the queries of some spans of a row, with the keys of all of it."""

    keys: tuple[tuple[int, int], ...]
    """For each span, which its queries may see at most: beginning and end."""
    masks: tuple[Tensor | BlockMask | None, ...]
    """For each span, of the keys from its beginning to its end, as of ``attend``. One for all spans if these are
    blocks."""


def part_mask(
    documents: Tensor | None,
    t: int,
    window: int | None,
    spans: tuple[tuple[int, int], ...],
    *,
    flex: bool,
    device: torch.device,
) -> PartMask:
    """As ``attention_mask``, for queries at the positions of ``spans``, equally long ones, of rows of ``t`` positions.

    documents: [B, T], of the whole rows. flex: as blocks for FlexAttention, with documents or without.
    """
    if flex:
        position = torch.cat([torch.arange(start, end, device=device) for start, end in spans])  # [t]

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = position[q] >= k
            if window is not None:
                seen = seen & (position[q] - k < window)
            return seen if documents is None else seen & (documents[b, position[q]] == documents[b, k])

        create: Any = create_block_mask if torch.compiler.is_compiling() else _compiled(create_block_mask)
        rows = None if documents is None else documents.shape[0]
        return PartMask(((0, t),), (create(allowed, rows, None, len(position), t, device=device),))
    keys = tuple((0 if window is None else max(0, start - window + 1), end) for start, end in spans)
    masks: list[Tensor | None] = []
    for (start, end), (first, _) in zip(spans, keys, strict=True):
        if documents is None and first == 0 and (window is None or window >= end):
            masks.append(None)
            continue
        back = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
        mask = back >= 0 if window is None else (back >= 0) & (back < window)
        if documents is not None:
            mask = mask & (documents[:, None, start:end, None] == documents[:, None, None, first:end])
        masks.append(mask)
    return PartMask(keys, tuple(masks))


def attend_from_part(
    attend: Callable[..., Tensor], gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Callable[..., Tensor]:
    """``attend``, but queries, keys and values are those of a part of a row where the mask is a ``PartMask``.

    gather: k, v [B, K, t, D] → those of the whole row, [B, K, T, D].
    """

    def attend_to_row(q: Tensor, k: Tensor, v: Tensor, mask: Any, *, dropout: float = 0.0) -> Tensor:
        if not isinstance(mask, PartMask):
            return attend(q, k, v, mask, dropout=dropout)
        k, v = gather(k, v)
        parts = zip(q.chunk(len(mask.keys), dim=2), mask.keys, mask.masks, strict=True)
        outputs = [attend(x, k[:, :, a:b], v[:, :, a:b], each, dropout=dropout) for x, (a, b), each in parts]
        return torch.cat(outputs, dim=2)

    return attend_to_row


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, *, dropout: float = 0.0) -> Tensor:
    """Grouped-query attention. q: [B, H, T, D]; k, v: [B, K, S, D]; mask: where it is allowed, [B, H, T, S] or what
    broadcasts to it or blocks; None: to all positions before, where the queries are those of the last T of S positions.
    → [B, H, T, D]."""
    if isinstance(mask, BlockMask):
        flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
        return flex(q, k, v, block_mask=mask, enable_gqa=True)
    if mask is None and 1 < q.shape[2] < k.shape[2]:
        mask = ends_causally(q.shape[2], k.shape[2], q.device)
    causal = mask is None and q.shape[2] > 1
    if q.shape[2] > 1 and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        # The kernel there that takes a mask, or fp32, wants keys for each query head; the one that takes fewer of them
        # holds all scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=True)


def ends_causally(t: int, s: int, device: torch.device) -> Tensor:
    """Where the last ``t`` of ``s`` positions look back, [T, S]."""
    return torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)


@functools.cache
def _compiled(function: Any) -> Any:
    """FlexAttention is a kernel only when compiled, also where all else is to run uncompiled, as in evaluation: by
    itself it would hold all scores. Wrapped, it is one operation for selective recomputation to see and keep."""
    compiled = torch.compile(function, options={"wrap_inductor_compiled_regions": True})

    def call(*args: Any, **named: Any) -> Any:
        with torch.compiler.set_stance("default"):
            return compiled(*args, **named)

    return call
