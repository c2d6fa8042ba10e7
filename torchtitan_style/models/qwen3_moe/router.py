"""The router: which experts a token goes to, with which weights.

Shapes: N tokens, C hidden size, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """How one layer has routed some tokens: sums over them, fp32, for the load-balancing loss and the metrics."""

    counts: Tensor
    """[E]: for each expert, the tokens that were routed to it."""
    probabilities: Tensor
    """[E]: the router's probabilities, summed over the tokens; differentiable."""
    z: Tensor
    """[]: log² of the softmax's normaliser; differentiable."""
    entropy: Tensor
    """[]: entropy of the router's probabilities, in nats."""


class Router(nn.Module):
    """Softmax over all experts, of which the k likeliest are taken (Qwen3 Technical Report, section 2)."""

    def __init__(self, hidden_size: int, *, experts: int, chosen: int, normalise: bool) -> None:
        super().__init__()
        self.chosen, self.normalise = chosen, normalise
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.read_weight: Callable[[Tensor], Tensor] | None = None
        """Where the parameter is not a plain tensor: how to get one from it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [N, C]. → logits [N, E], weights [N, k] of the chosen experts, their numbers [N, k]."""
        weight = self.weight if self.read_weight is None else self.read_weight(self.weight)
        logits = F.linear(x, weight)
        weights, experts = logits.softmax(-1, dtype=torch.float32).topk(self.chosen, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(x.dtype), experts


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The order in which each expert's tokens follow one another, in the order they had, and how many each has.

    experts: [N, k]. → order [N·k], positions in ``experts.flatten()``; counts [E].
    """
    ordered, order = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(num_experts, device=experts.device), right=True)
    return order, ends.diff(prepend=ends.new_zeros(1))


def measure(logits: Tensor, counts: Tensor) -> Routing:
    """logits: [N, E]; counts: [E]."""
    logits = logits.float()
    probabilities = logits.softmax(-1)
    normaliser = logits.logsumexp(-1)  # [N]
    with torch.no_grad():  # -Σ p·log p, where log p is logit - normaliser
        entropy = (normaliser - (probabilities * logits).sum(-1)).sum()
    return Routing(counts.float(), probabilities.sum(0), normaliser.square().sum(), entropy)
