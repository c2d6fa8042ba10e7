"""Expert parallelism: each rank has some of the experts, and tokens go to them and back.

Of a token k rows of C numbers are sent to their experts and brought back, forward and backward, except those whose
expert is on the rank itself (Lepikhin et al. 2021, "GShard").

Shapes: M rows of this rank, R rows that it is sent, E experts, L of them on this rank, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_style.distributed.local import local_tensor

from .experts import permute

Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def expert_parallel(run: Run, group: dist.ProcessGroup) -> Run:
    """``run``, of ``Experts``, over all ranks of ``group``, of which each has the next L experts."""

    @torch.compiler.disable  # how many rows arrive is known on the host only
    def exchange(rows: Tensor, counts: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
        gate_up, down = local_tensor(gate_up_proj), local_tensor(down_proj)
        ranks, here = group.size(), gate_up.shape[0]
        there = counts.view(ranks, here)  # [P, L], rows for each expert of each rank
        arriving = torch.empty_like(there)  # rows from each rank for each expert of this one
        dist.all_to_all_single(arriving, there.contiguous(), group=group)
        sent, received = torch.stack((there.sum(1), arriving.sum(1))).tolist()
        arrived = _AllToAll.apply(rows, sent, received, group)  # [R, C], by rank, then by expert
        experts = torch.arange(here, device=rows.device).repeat(ranks).repeat_interleave(arriving.flatten())
        order = experts.argsort(stable=True)
        place = order.argsort()
        outputs = run(permute(arrived, order, place), arriving.sum(0), gate_up, down)
        back: Tensor = _AllToAll.apply(permute(outputs, place, order), received, sent, group)
        return back

    return exchange


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group, so many to each, and the rows of all ranks for this one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.exchanged = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        sent, received, group = ctx.exchanged
        return _all_to_all(grad_outputs[0], received, sent, group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
