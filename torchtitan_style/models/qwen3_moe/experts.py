"""The experts of a layer: SwiGLU networks, each computed on the tokens that are routed to it.

The weights of all are stacked, as Transformers has them in memory. Tokens are sorted by expert, so that all matrix
products of a projection are one grouped product; no expert has a capacity, so no token is dropped.

Shapes: N tokens, k experts per token, M = N·k rows, E experts, C hidden size, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grouped import grouped_linear


def loop_over_experts(rows: Tensor, counts: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """down(silu(gate(x)) · up(x)) of each row by its expert: the definition, one expert after the other.

    rows: [M, C], those of the first expert first. counts: [E], rows of each expert. gate_up_proj: [E, 2I, C], the gate
    first. down_proj: [E, C, I]. → [M, C]
    """
    outputs = []
    for x, gate_up, down in zip(rows.split(counts.tolist()), gate_up_proj, down_proj, strict=True):
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, down))
    return torch.cat(outputs)


def grouped_experts(rows: Tensor, counts: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The same as ``loop_over_experts``, each projection as one grouped product."""
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = grouped_linear(rows, gate_up_proj, ends).chunk(2, dim=-1)
    return grouped_linear(F.silu(gate) * up, down_proj, ends)


class Experts(nn.Module):
    """All experts of a layer."""

    def __init__(self, hidden_size: int, *, experts: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))
        self.run: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = grouped_experts
        """As ``loop_over_experts``; training may set another way to compute the same."""

    def forward(self, x: Tensor, weights: Tensor, order: Tensor, counts: Tensor) -> Tensor:
        """x: [N, C]. weights: [N, k]. order, counts: of ``sort_by_expert``. → [N, C]"""
        n, k = weights.shape
        if n == 1 and not torch.is_grad_enabled() and self.run is grouped_experts:
            return self._one_token(x, weights, order, counts)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(n * k, device=order.device))
        rows = _Dispatch.apply(x, order, place, k)  # [M, C]
        rows = self.run(rows, counts, self.gate_up_proj, self.down_proj)
        return (weights[..., None] * permute(rows, place, order).view(n, k, -1)).sum(1)

    def _one_token(self, x: Tensor, weights: Tensor, order: Tensor, counts: Tensor) -> Tensor:
        """Of the weights, which take most of the time of a token, no more than the chosen experts' are read."""
        k = weights.shape[1]
        experts = torch.repeat_interleave(counts, output_size=k)  # [k], in the order of their numbers
        gate, up = (self.gate_up_proj[experts] @ x[0]).chunk(2, dim=-1)  # [k, I]
        outputs = (self.down_proj[experts] @ (F.silu(gate) * up)[..., None])[..., 0]  # [k, C]
        return weights[:, order] @ outputs


# Gradients of gathers, as gathers again: by themselves they would be scatters, which are slower and, on a GPU, add up
# in no certain order.


class _Dispatch(torch.autograd.Function):
    """[N, C] → [M, C], each token once for each of its experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return grad_outputs[0][place].view(-1, ctx.k, grad_outputs[0].shape[-1]).sum(1), None, None, None


def permute(rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """rows[order], where ``place`` is the inverse of ``order``. rows: [M, C]; order, place: [M]."""
    permuted: Tensor = _Permute.apply(rows, order, place)
    return permuted


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return grad_outputs[0][place], None, None
