"""Context parallelism: each rank has some positions of every row, and gathers the keys and values of the others.

Keys and values are the small part of attention, as several query heads share them, and block by block they are
gathered and freed: with 8 key/value heads of 128 a position is 4 KiB in bf16 (Llama Team 2024, section 3.3.2). A ring,
which never holds those of the whole row, would have to add up softmaxes piece by piece, and could hide no more.

Shapes: B rows, K key/value heads, t positions on this rank, T positions of the row, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_style.config.layout import RowPart

_collectives = torch.ops._c10d_functional
"""Called as such they are the same operations in an uncompiled block and in a graph."""


@dataclass(frozen=True)
class Context:
    """The ranks that share the positions of a row, and this one's part of them."""

    part: RowPart
    group_name: str

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Context | None:
        """None if each rank has whole rows."""
        return None if group.size() == 1 else cls(RowPart(group.rank(), group.size()), group.group_name)

    def gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of this part, [B, K, t, D], to those of the whole row in its order, [B, K, T, D]."""
        gathered: tuple[Tensor, Tensor] = _Gather.apply(k, v, self.part.ranks, self.group_name)
        return gathered


def _order(ranks: int) -> list[int]:
    """Where the spans of a row are among those that are gathered, which come by rank; see ``RowPart``."""
    return [2 * rank for rank in range(ranks)] + [2 * rank + 1 for rank in reversed(range(ranks))]


class _Gather(torch.autograd.Function):
    """All-gather; the gradient is summed over the ranks, each of which gets that of its positions."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, ranks: int, group: str) -> tuple[Tensor, Tensor]:
        ctx.ranks, ctx.group = ranks, group
        mine = torch.stack([x for span in zip(k.chunk(2, dim=2), v.chunk(2, dim=2), strict=True) for x in span])
        every = _collectives.all_gather_into_tensor(mine, ranks, group)
        spans = _collectives.wait_tensor(every).view(2 * ranks, 2, *mine.shape[1:])  # [2 · ranks, 2, B, K, t / 2, D]
        row = torch.cat([spans[place] for place in _order(ranks)], dim=3)  # [2, B, K, T, D]
        return row[0], row[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ranks = ctx.ranks
        of_row = list(zip(*(grad.chunk(2 * ranks, dim=2) for grad in grads), strict=True))
        order = _order(ranks)
        every = torch.stack([x for place in range(2 * ranks) for x in of_row[order.index(place)]])
        mine = _collectives.wait_tensor(_collectives.reduce_scatter_tensor(every, "sum", ranks, ctx.group))
        first_k, first_v, last_k, last_v = mine.unbind()
        return torch.cat((first_k, last_k), dim=2), torch.cat((first_v, last_v), dim=2), None, None
